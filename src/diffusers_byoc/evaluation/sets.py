"""The sets of cells that an evaluation compares: generated ones, real ones, and what is made of real ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from ..data import CellDataset, VolumeProcessor, read_volume
from ..data.sets.cells import check_channel_order, preprocess
from ..models.fingerprint import fingerprint_weights
from ..pipelines import BYOCPipeline


REAL, GENERATED = "real", "generated"
BLUR = 2.0  # voxels, of the Gaussian of the row "blurred"


@dataclass(frozen=True)
class Variant:
    """What is done to all cells of a set to get another row of the table.

    Args:
        identity: name and all settings, under which its features are kept.
        change: (B, M, D, H, W) -> the same, B ≥ M.
    """

    identity: str
    change: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class CellSet:
    """Cells of one kind, and the rows of the table that are made of them.

    Args:
        name: of the row.
        num_cells: how many there are.
        volume: index -> (M, D, H, W) float32 in [0, 1].
        labels: the class of each cell; None where nobody knows.
        variants: name of another row -> what makes it of these cells.
    """

    name: str
    num_cells: int
    volume: Callable[[int], np.ndarray]
    labels: tuple[str, ...] | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[str, ...]:
        return (self.name, *self.variants)

    def volumes(self, indices: Sequence[int], row: str | None = None) -> np.ndarray:
        """(B, M, D, H, W) of these cells, as they stand in one of the rows."""
        return self.changed(np.stack([self.volume(int(index)) for index in indices]), row)

    def changed(self, volumes: np.ndarray, row: str | None) -> np.ndarray:
        """(B, M, D, H, W) of some of these cells -> the same as they stand in one of the rows."""
        return self.variants[row].change(volumes) if row in self.variants else volumes

    def change_of(self, row: str) -> str:
        """What is done to the cells for a row, to be added to the identity of what is computed of them."""
        return f" of {self.variants[row].identity}" if row in self.variants else ""


def real_cells(
    cells: CellDataset,
    autoencoder: torch.nn.Module | None = None,
    textured: BYOCPipeline | None = None,
    has_controls: bool = True,
) -> CellSet:
    """Real cells; what an autoencoder makes of them; and two obviously bad generators.

    Args:
        cells: the data set.
        autoencoder: of the pipeline that is judged: how much of the gap is its own.
        textured: that pipeline, if it draws texture into what the autoencoder decodes.
        has_controls: False leaves out all but the real cells.
    """
    labels = tuple(cells.class_names[label] for label in cells.labels)
    real = CellSet(REAL, len(cells), lambda index: ((cells[index]["volumes"] + 1) / 2).numpy(), labels)
    if not has_controls:
        return real
    variants = {}
    if autoencoder is not None:
        identity = f"decoded {fingerprint_weights(autoencoder, dict(autoencoder.config))}"
        variants["encoded and decoded"] = Variant(identity, partial(_encode_and_decode, autoencoder))
    if textured is not None:
        parts = (fingerprint_weights(part, dict(part.config)) for part in (textured.vqvae, textured.texture_unet))
        identity = f"textured in {textured.config.default_num_texture_steps} steps {' '.join(parts)}"
        variants["with texture"] = Variant(identity, partial(_with_texture, textured))
    if cells.processor.config.num_channels > 1:
        variants["shuffled channels"] = Variant("shuffled", _shuffle_channels)
    variants["blurred"] = Variant(f"blurred {BLUR}", _blur)
    return replace(real, variants=variants)


def folder_cells(paths: Sequence[Path], processor: VolumeProcessor, labels: Sequence[str] | None = None) -> CellSet:
    """Generated volumes from files.

    One that fills the cube already is a generator's output and stays as it is, integers over their type's range,
    floats in [0, 1]; any other is a crop, and goes the way of the real ones.

    Args:
        paths: the files.
        processor: of the real cells.
        labels: the class of each; None where nobody knows.
    """
    config = processor.config
    cube = (config.num_channels, *(config.sample_size,) * 3)

    def volume(index: int) -> np.ndarray:
        path = paths[index]
        file = read_volume(path)
        if file.data.shape != cube:
            return ((preprocess(file, processor, str(path))[0] + 1) / 2).numpy()
        try:
            check_channel_order(file, processor)
        except ValueError as error:
            raise ValueError(f"{error} It is {path}.") from error
        return _unit_range(file.data, path)

    return CellSet(GENERATED, len(paths), volume, None if labels is None else tuple(labels))


def _unit_range(data: np.ndarray, path: Path) -> np.ndarray:
    low, high = data.min(), data.max()
    if data.dtype.kind in "bui":
        if low < 0:
            raise ValueError(f"Expected integers from 0 in {path}, got {low}. Shift and rescale them.")
        return data.astype(np.float32) / (1 if data.dtype.kind == "b" else np.iinfo(data.dtype).max)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"Expected floats in [0, 1] in {path}, got [{low:g}, {high:g}]. Rescale them.")
    return data.astype(np.float32)


@torch.no_grad()
def _encode_and_decode(autoencoder: torch.nn.Module, volumes: np.ndarray) -> np.ndarray:
    parameter = next(autoencoder.parameters())
    batches = (torch.from_numpy(volumes) * 2 - 1).to(parameter.device, parameter.dtype).split(8)
    decoded = torch.cat([autoencoder(batch).sample.float().cpu() for batch in batches])
    return (decoded / 2 + 0.5).clamp(0, 1).numpy()


def _with_texture(pipeline: BYOCPipeline, volumes: np.ndarray) -> np.ndarray:
    # the same texture for the same cell, whatever cells are beside it
    generators = [torch.Generator().manual_seed(crc32(volume.tobytes())) for volume in volumes]
    textured = pipeline.reconstruct(torch.from_numpy(volumes) * 2 - 1, generator=generators)
    return (textured.cpu() / 2 + 0.5).numpy()


def _shuffle_channels(volumes: np.ndarray) -> np.ndarray:
    """Every channel real, from another cell each: for what looks at one channel alone, nothing has changed."""
    return np.stack([np.roll(volumes[:, channel], -channel, axis=0) for channel in range(volumes.shape[1])], axis=1)


def _blur(volumes: np.ndarray) -> np.ndarray:
    return gaussian_filter(volumes, (0, 0, BLUR, BLUR, BLUR))
