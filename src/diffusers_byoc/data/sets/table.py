"""A table of cells, one row each, as a data set: Parquet or webdataset, from a folder or from the Hub."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ...optional import optional
from ...volumes import voxel_size_triple
from ..formats.records import decode_volume
from ..formats.shards import (
    TarShards,
    Unit,
    check_columns,
    class_names_of,
    find_shards,
    is_saved_dataset,
)
from ..formats.volume import Volume
from ..processor import VolumeProcessor
from .cells import ONLY_CLASS, CellDataset
from .splits import Population


_UNIT_ROWS = 32  # rows that a stream reads together


class CellTable(CellDataset):
    """A table of cells on this machine's disk, for training in random order.

    Parquet is converted once to the memory-mapped cache of 🤗 Datasets, and downloaded before if it is on the Hub; tar
    archives, which must be local, and what `datasets.Dataset.save_to_disk` wrote are read where they are. Volumes are
    unpacked at each access and never kept, so that memory does not grow with the table. At construction columns are
    checked, not voxels: a damaged volume is found when it is read, by an error that names its row.

    Args:
        name: a data set on the Hub, a folder, or a pattern of files, as in `find_shards`.
        processor: makes the crops into network input.
        label: keep only the cells of this label, or of these.
        config_name: configuration of the data set.
        volume_column: column of the volumes' bytes; see `encode_volume` for the others.
        label_column: column of the classes; None for `label`, if there is one.
        group_column: column of the groups that a split keeps together; None for `source`, if there is one. Without it
            every cell is a group.
        condition_columns: columns of the cells' `conditions`: of numbers, or of lists of numbers of one length.

    Raises:
        OSError: if there is no such data set, or the Hub cannot be reached.
        ValueError: if the table is empty, lacks a column, or has none of the label's cells.
        ImportError: if 🤗 Datasets is not installed.
    """

    def __init__(
        self,
        name: str,
        processor: VolumeProcessor,
        label: str | Sequence[str] | None = None,
        config_name: str | None = None,
        volume_column: str = "volume",
        label_column: str | None = None,
        group_column: str | None = None,
        condition_columns: Sequence[str] = (),
    ):
        self._table = _open_table(name, config_name, volume_column)
        population, class_names = population_of(self._table, name, label_column, group_column, condition_columns)
        super().__init__(processor, population, label, name, None if label else class_names)
        self.voxel_size_um = check_cells(self._table, processor, self._rows)

    def _read(self, row: int) -> Volume:
        try:
            return self._table.volume(row)
        except ValueError as error:
            raise ValueError(f"{self._where(row)}: {error}") from error

    def _where(self, row: int) -> str:
        return self._table.where(row)


def _open_table(name: str, config_name: str | None, volume_column: str) -> "TarShards | ArrowTable":
    if is_saved_dataset(name):
        return open_saved_dataset(name, volume_column)
    files = find_shards(name, config_name)
    if files[0].lower().endswith(".tar"):
        return TarShards(files)
    datasets = optional("datasets", "data")
    try:
        if name in files or not any(file.startswith("hf://") for file in files):
            rows = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            rows = datasets.load_dataset(name, config_name, split="train")
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"Expected readable Parquet, got {name}, which is not ({error.__cause__ or error}). Write it again."
        ) from error
    return ArrowTable(name, rows, volume_column)


def open_saved_dataset(name: str, volume_column: str) -> "ArrowTable":
    """The "train" split of what `save_to_disk` wrote, or the one split there is.

    Raises:
        ValueError: if it cannot be read, or has no such split.
    """
    datasets = optional("datasets", "data")
    try:
        rows = datasets.load_from_disk(name)
    except Exception as error:  # whatever a damaged file provokes in 🤗 Datasets and Arrow
        raise ValueError(
            f"Expected a data set of `save_to_disk`, got {name}, which cannot be read ({error}). Write it again."
        ) from error
    if isinstance(rows, dict):
        if "train" not in rows:
            raise ValueError(f'Expected a split "train" in {name}, got {sorted(rows) or "none"}. Name one so.')
        rows = rows["train"]
    return ArrowTable(name, rows, volume_column)


class ArrowTable:
    """A memory-mapped table of 🤗 Datasets, with the methods of `ParquetShards`."""

    def __init__(self, name: str, rows, volume_column: str):
        # whatever format was chosen for them when they were saved
        self._rows, self._name, self._volume_column = rows.with_format(None), name, volume_column
        self.num_rows = len(self._rows)
        firsts = range(0, self.num_rows, _UNIT_ROWS)
        self.units = [Unit(0, 0, first, min(_UNIT_ROWS, self.num_rows - first)) for first in firsts]
        check_columns(self._rows.features, volume_column, name)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"row {row}" for row in range(self.num_rows))

    @property
    def column_names(self) -> list[str]:
        return self._rows.column_names

    def column(self, name: str) -> Iterator:
        for batch in self._rows.select_columns(name).iter(batch_size=1000):
            yield from class_names_of(batch[name], self._rows.features[name])

    def volume(self, row: int) -> Volume:
        return self.decode(self._rows[row])

    def read(self, unit: Unit, rows: Collection[int]) -> Iterator[tuple[int, Mapping]]:
        """(number, content) of those `rows` of a unit, in its order; for `decode`."""
        for row in range(unit.first, unit.first + unit.count):
            if row in rows:
                yield row, self._rows[row]

    def decode(self, content: Mapping) -> Volume:
        return decode_volume(content, self._volume_column)

    def where(self, row: int) -> str:
        return f"{self._name}, row {row}"


def population_of(
    table, name: str, label_column: str | None, group_column: str | None, condition_columns: Sequence[str] = ()
) -> tuple[Population, list[str]]:
    """The cells of a table without their voxels, and the sorted names of their classes.

    Raises:
        ValueError: if the table is empty, lacks a column, or has no value in one.
    """
    if not table.num_rows:
        raise ValueError(f"Expected a row for each cell in {name}, got none. Write the data set again.")
    names = table.column_names

    def values_of(column: str | None, default: str) -> tuple[str, ...] | None:
        if column is None and default not in names:
            return None
        column = column or default
        if column not in names:
            raise ValueError(f"Expected a column {column} in {name}, got {', '.join(names)}. Name one of these.")
        distinct, texts = {}, []  # one text for all cells that share it
        for row, value in enumerate(table.column(column)):
            if not isinstance(value, (str, int)) or not str(value).strip():
                raise ValueError(
                    f"Expected text or a whole number in the column {column} of {table.where(row)}, got {value!r}."
                    " Fill it in, or leave the cell out."
                )
            texts.append(distinct.setdefault(str(value), str(value)))
        return tuple(texts)

    ids = table.ids
    labels = values_of(label_column, "label") or (ONLY_CLASS,) * len(ids)
    groups = values_of(group_column, "source") or ids
    conditions = {}
    for column in condition_columns:
        if column not in names:
            raise ValueError(f"Expected a column {column} in {name}, got {', '.join(names)}. Name one of these.")
        conditions[column] = condition_values(column, table.column(column), table.where)
    return Population(ids, labels, groups, conditions), sorted(set(labels))


def condition_values(column: str, values: Iterable, where: Callable[[int], str]) -> np.ndarray:
    """The numbers of a condition, (N, length) float64.

    Args:
        column: its name.
        values: of every cell, a number or its text, or a list of them.
        where: row -> how an error message names it.

    Raises:
        ValueError: if one is no finite number, or a list of another length. The message names the row.
    """
    rows = []
    for row, value in enumerate(values):
        try:
            numbers = np.atleast_1d(np.array(value, np.float64))
        except (TypeError, ValueError):
            numbers = np.array([np.nan])
        if numbers.ndim != 1 or not np.isfinite(numbers).all():
            raise ValueError(
                f"Expected a finite number, or a list of them, in the column {column} of {where(row)}, got {value!r}."
                " Fill it in, or leave the cell out."
            )
        rows.append(numbers)
        if len(numbers) != len(rows[0]):
            raise ValueError(
                f"Expected {len(rows[0])} numbers in the column {column} of {where(row)}, as before, got"
                f" {len(numbers)}. Correct it."
            )
    return np.stack(rows)


def check_cells(table, processor: VolumeProcessor, rows: Sequence[int]) -> tuple[float, float, float] | None:
    """Check what a table says of its cells beside their voxels.

    Returns:
        The (z, y, x) edge of a voxel in µm of all these cells after preprocessing; None if unknown or not the same.

    Raises:
        ValueError: if a cell has another number of channels.
    """
    num_channels, names = processor.config.num_channels, table.column_names
    is_kept = np.zeros(table.num_rows, bool)
    is_kept[rows] = True
    if not isinstance(table, TarShards):
        for row, shape in itertools.compress(enumerate(table.column("shape")), is_kept):
            if shape is None or len(shape) != 4 or shape[0] != num_channels:
                raise ValueError(
                    f"Expected shape (C, Z, Y, X) with {num_channels} channels"
                    f" ({', '.join(processor.config.channel_names)}) in {table.where(row)}, got {shape}. Leave the"
                    " cell out."
                )
    if processor.config.oversize == "rescale":
        return None  # every shrunk cell has a size of its own
    if processor.voxel_size_um is not None:
        return processor.voxel_size_um
    if "voxel_size_um" not in names:
        return None
    sizes = itertools.compress(table.column("voxel_size_um"), is_kept)
    distinct = {None if size is None else voxel_size_triple(size) for size in sizes}
    return distinct.pop() if len(distinct) == 1 else None
