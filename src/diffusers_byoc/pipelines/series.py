"""A series of generated cells in files: which file holds which cells, and what stands beside them."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.formats.reading import stored_volume, write_volume
from ..data.formats.shards import write_parquet
from ..whole_files import whole_or_absent


TABLE_NAME = "metadata.csv"  # as 🤗 Datasets and `CellFolder` read it
CELLS_PER_SHARD = 32  # of a Parquet file


def cell_seed(seed: int, index: int) -> int:
    """The seed of one cell of a series, in [0, 2⁶⁴): ``torch.Generator().manual_seed(cell_seed(seed, index))``."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def cell_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one cell of a series: with them, `pipeline` makes cell `index` of series `seed` again."""
    return torch.Generator().manual_seed(cell_seed(seed, index))


@dataclass(frozen=True)
class SeriesFile:
    """A file, and the numbers of its cells.

    Args:
        path: one cell's, or a Parquet file of several.
        cells: in the order of its rows.
    """

    path: Path
    cells: tuple[int, ...]

    @property
    def is_parquet(self) -> bool:
        return self.path.suffix == ".parquet"

    @property
    def is_whole(self) -> bool:
        """Whether it is there with all of its cells, or with more: a series may have grown since it was written."""
        if not (self.is_parquet and self.path.exists()):
            return self.path.exists()
        import pyarrow.parquet as pq

        return pq.read_metadata(self.path).num_rows >= len(self.cells)

    def write(
        self,
        volumes: Sequence[np.ndarray],
        columns: Sequence[Mapping],
        voxel_size_um: tuple[float, float, float] | None,
        channel_names: tuple[str, ...],
    ) -> None:
        """Write it, whole or not at all.

        Args:
            volumes: (M, D, H, W) in [0, 1] of each of its cells.
            columns: what stands beside each in a table, names -> values.
            voxel_size_um: (z, y, x), or None.
            channel_names: M names.
        """
        if not self.is_parquet:
            write_volume(self.path, volumes[0], voxel_size_um, channel_names)
            return
        stored = (stored_volume(volume, voxel_size_um, channel_names) for volume in volumes)
        with whole_or_absent(self.path) as temporary:
            write_parquet(temporary, zip(stored, columns, strict=True))


def files_of_series(folder: Path, cells: Sequence[int], suffix: str) -> list[SeriesFile]:
    """Where each cell lies, which depends on its number alone.

    Args:
        folder: of the series.
        cells: their numbers, in ascending order.
        suffix: one that `write_volume` knows, or ".parquet".

    Returns:
        ``cell_000000.ome.tif`` for each cell, or ``train-00000.parquet`` for each `CELLS_PER_SHARD` of them.
    """
    if suffix != ".parquet":
        return [SeriesFile(folder / f"cell_{cell:06}{suffix}", (cell,)) for cell in cells]
    shards: dict[int, list[int]] = {}
    for cell in cells:
        shards.setdefault(cell // CELLS_PER_SHARD, []).append(cell)
    return [SeriesFile(folder / f"train-{shard:05}.parquet", tuple(held)) for shard, held in shards.items()]


def write_table(folder: Path, files: Sequence[SeriesFile], columns: Sequence[Mapping]) -> None:
    """Write ``metadata.csv`` for files of a cell each: rows of other cells, and columns of other names, stay.

    Args:
        folder: of the series.
        files: to name.
        columns: of each file's cell, the same names for all.
    """
    path = folder / TABLE_NAME
    rows = {}
    if path.is_file():
        rows = {row["file_name"]: row for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))}
    for file, row in zip(files, columns, strict=True):
        rows[file.path.name] = {"file_name": file.path.name} | rows.get(file.path.name, {}) | dict(row)
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows.values() for name in row)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    with whole_or_absent(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
