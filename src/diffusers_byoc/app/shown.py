"""The cells that one visitor looks at, and their files."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data import write_volume
from ..visualization import write_glb
from .models import Request


@dataclass(eq=False)
class Shown:
    """Cells on the page; their files live as long as they do.

    Args:
        volumes: (B, M, D, H, W) in [0, 1].
        titles: B texts.
        channel_names: M names.
        voxel_size_um: (z, y, x).
        label: class of all of them; None where there is none, or several.
        pipeline: name of the one that made them.
        request: what they were made by, if each cell of it is shown as it was made; None for all others.
        measured: (B, number of measurements) of `numbers.measure`, once it is known.
    """

    volumes: np.ndarray
    titles: list[str]
    channel_names: tuple[str, ...]
    voxel_size_um: tuple[float, float, float]
    label: str | None = None
    pipeline: str | None = None
    request: Request | None = None
    measured: np.ndarray | None = None
    _folder: tempfile.TemporaryDirectory = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="byoc-app-", ignore_cleanup_errors=True)
    )

    def ome_tiffs(self) -> list[str]:
        """A file for each cell."""
        paths = [Path(self._folder.name) / f"{title.replace(' ', '_')}.ome.tif" for title in self.titles]
        for path, volume in zip(paths, self.volumes, strict=True):
            if not path.exists():
                write_volume(path, volume, self.voxel_size_um, self.channel_names)
        return list(map(str, paths))

    def glb(self, index: int) -> str | None:
        """The surfaces of one cell as a file; None for an empty volume."""
        path = Path(self._folder.name) / f"{self.titles[index].replace(' ', '_')}.glb"
        if not path.exists():
            if np.ptp(self.volumes[index]) == 0:
                return None
            write_glb(path, self.volumes[index], self.channel_names, self.voxel_size_um)
        return str(path)
