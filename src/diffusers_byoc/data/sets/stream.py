"""Cells read in passing, for sets larger than memory and disk: no row is kept, and nothing is downloaded whole."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..formats.shards import find_shards, is_saved_dataset, open_shards
from ..processor import VolumeProcessor
from .batches import StreamBatches
from .cells import conditions_item, keep_labels, preprocess
from .table import check_cells, open_saved_dataset, population_of


class StreamedCells(IterableDataset):
    """A table of cells that is read where it lies: Parquet or webdataset shards in a folder or on the Hub.

    Iterating gives every cell once, in the order of the table, shared out among the workers of a DataLoader;
    `StreamBatches` is for training. Labels, groups and the like are read at construction, the volumes in passing.

    Args:
        name, processor, label, config_name, volume_column, label_column, group_column, condition_columns: as for
            `CellTable`.

    Attributes:
        processor, population, class_names, labels, ids, conditions, voxel_size_um, is_indexable, is_phantom: see
            `Cells`.

    Raises:
        OSError: if there is no such data set, or the Hub cannot be reached.
        ValueError: if the table is empty, lacks a column, or has none of the label's cells.
        ImportError: if 🤗 Datasets is not installed.
    """

    is_indexable, is_phantom = False, False

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
        self.processor = processor
        if is_saved_dataset(name):
            self._shards = open_saved_dataset(name, volume_column)
        else:
            self._shards = open_shards(find_shards(name, config_name), volume_column)
        self.population, class_names = population_of(self._shards, name, label_column, group_column, condition_columns)
        rows, names = keep_labels(self.population, label, name)
        self.class_names = sorted(set(names)) if label else class_names
        index_of = {name: index for index, name in enumerate(self.class_names)}
        self._class_of = np.full(len(self.population.ids), -1, np.int32)  # -1 for a row that is not kept
        self._class_of[rows] = [index_of[name] for name in names]
        self.voxel_size_um = check_cells(self._shards, processor, rows)

    @property
    def labels(self) -> list[int]:
        return self._class_of[self._class_of >= 0].tolist()

    @property
    def ids(self) -> list[str]:
        return [self.population.ids[row] for row in np.flatnonzero(self._class_of >= 0)]

    @property
    def conditions(self) -> dict[str, np.ndarray]:
        return {name: values[self._class_of >= 0] for name, values in self.population.conditions.items()}

    def subset(self, ids: Iterable[str]) -> "StreamedCells":
        """The cells among `ids`; classes are shared. Other ids are ignored."""
        wanted = set(ids)
        is_wanted = np.array([cell in wanted for cell in self.population.ids])
        subset = copy.copy(self)
        subset._class_of = np.where(is_wanted, self._class_of, -1).astype(np.int32)
        return subset

    def with_classes(self, class_names: Sequence[str], indices: Sequence[int]) -> "StreamedCells":
        """See `Cells.with_classes`."""
        same = copy.copy(self)
        same.class_names = list(class_names)
        same._class_of = np.array([*indices, -1], np.int32)[self._class_of]  # -1, of no class, is the last
        return same

    def loader(
        self,
        batch_size: int,
        first_batch: int,
        num_batches: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        buffer_size: int = 1000,
        **options,
    ) -> DataLoader:
        """See `Cells.loader`; the batches are those of `StreamBatches`."""
        batches = StreamBatches(
            self, batch_size, first_batch, num_batches, seed, buffer_size, process_index, num_processes
        )
        return DataLoader(batches, batch_size=None, **options)

    def indexable(self, num_cells: int, seed: int) -> list[dict[str, Tensor]]:
        """Up to `num_cells` random cells, in memory."""
        batches = StreamBatches(self, 1, 0, min(num_cells, len(self)), seed)
        return [tree_map(lambda value: value[0], batch) for batch in batches]

    def __len__(self) -> int:
        return int((self._class_of >= 0).sum())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        part, num_parts = (worker.id, worker.num_workers) if worker else (0, 1)
        units = self._kept_units()
        order = range(len(units))
        start, stop = (len(self) * bound // num_parts for bound in (part, part + 1))
        for row, content in self._read(units, order, start, stop):
            yield self._item(row, content)

    def _kept_units(self) -> list[tuple]:
        """(unit, its rows that are kept) of all units that have any."""
        kept = np.flatnonzero(self._class_of >= 0)
        units = self._shards.units
        bounds = np.searchsorted(kept, [unit.first for unit in units] + [self._shards.num_rows])
        return [
            (unit, kept[start:stop])
            for unit, start, stop in zip(units, bounds[:-1], bounds[1:], strict=True)
            if stop > start
        ]

    def _read(self, units: list[tuple], order: Iterable[int], start: int, stop: int) -> Iterator[tuple[int, Mapping]]:
        """Rows [start, stop) of the kept ones, if the units stood in this order; other units are not opened."""
        first = 0
        for index in order:
            unit, rows = units[index]
            wanted = rows[max(start - first, 0) : max(stop - first, 0)]
            first += len(rows)
            if len(wanted):
                yield from self._shards.read(unit, set(wanted.tolist()))
            if first >= stop:
                return

    def _item(self, row: int, content: Mapping) -> dict[str, Tensor]:
        where = self._shards.where(row)
        try:
            volume = self._shards.decode(content)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        volume = preprocess(volume, self.processor, where)[0]
        item = {"volumes": volume, "class_labels": torch.tensor(int(self._class_of[row]))}
        return item | conditions_item(self.population, row)
