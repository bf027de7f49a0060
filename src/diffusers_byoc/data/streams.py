"""Cells read in passing, for sets larger than memory and disk: no row is kept, and nothing is downloaded whole."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from .cells import keep_labels, preprocess
from .processor import VolumeProcessor
from .shards import find_shards, open_shards
from .tables import check_cells, population_of


class StreamedCells(IterableDataset):
    """A table of cells that is read where it lies: Parquet or webdataset shards in a folder or on the Hub.

    Iterating gives every cell once, in the order of the table, shared out among the workers of a DataLoader;
    `StreamBatches` is for training. Labels, groups and the like are read at construction, the volumes in passing.

    Args:
        name, processor, label, config_name, volume_column, label_column, group_column: as for `CellTable`.

    Attributes:
        processor, population, class_names, labels, ids, voxel_size_um: as for `CellDataset`.

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
    ):
        self.processor = processor
        self._shards = open_shards(find_shards(name, config_name), volume_column)
        self.population, class_names = population_of(self._shards, name, label_column, group_column)
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

    def subset(self, ids: Iterable[str]) -> "StreamedCells":
        """The cells among `ids`; classes are shared. Other ids are ignored."""
        wanted = set(ids)
        is_wanted = np.array([cell in wanted for cell in self.population.ids])
        subset = copy.copy(self)
        subset._class_of = np.where(is_wanted, self._class_of, -1).astype(np.int32)
        return subset

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
        except ValueError as err:
            raise ValueError(f"{where}: {err}") from err
        volume = preprocess(volume, self.processor, where)[0]
        return {"volumes": volume, "class_labels": torch.tensor(int(self._class_of[row]))}


class StreamBatches(IterableDataset):
    """Batches of a stream for a DataLoader with ``batch_size=None``; the counterpart of `training.StepBatches`.

    Every epoch the units of the table (row groups, or runs of an archive's samples) are put into a new order, and
    their rows dealt in runs of equal length, a cell more or less, to the processes, and each of these to the workers
    that will make the epoch's batches: each cell is seen once an epoch, with any number of workers, and nobody reads
    what others deal with, except the unit at which two runs meet. Each worker shuffles its run through a buffer. As
    epochs never end, all processes make the same number of steps.

    What a batch holds depends on the arguments, the number of workers and its own number alone, so that a run goes on
    at `first_batch` as the unbroken one would have; what that costs is reading one buffer. With other numbers of
    processes or workers the order is another.

    Args:
        cells: the stream.
        batch_size: cells of a batch of one process.
        first_batch: where to begin.
        num_batches: how many batches.
        seed: of the shuffling.
        buffer_size: rows, still compressed, that this process keeps; each of its workers draws from its share of them.
        process_index: of this process.
        num_processes: taking part.

    Raises:
        ValueError: if there are no cells, or `buffer_size` or `batch_size` is not positive.
    """

    def __init__(
        self,
        cells: StreamedCells,
        batch_size: int,
        first_batch: int,
        num_batches: int,
        seed: int,
        buffer_size: int = 1000,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if not len(cells) or batch_size < 1 or buffer_size < 1:
            raise ValueError(
                f"expected cells, and positive `batch_size` and `buffer_size`, got {len(cells)} cells, {batch_size}"
                f" and {buffer_size}"
            )
        self.cells, self.batch_size, self.seed, self.buffer_size = cells, batch_size, seed, buffer_size
        self.first_batch, self.num_batches = first_batch, num_batches
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        # a DataLoader takes turns: its worker 0 makes the first batch, which is not batch 0 in a run that goes on
        batch = self.first_batch + worker_id
        samples = self._samples(batch % num_workers, num_workers, batch // num_workers * self.batch_size)
        for _ in range(batch, self.first_batch + self.num_batches, num_workers):
            items = list(itertools.islice(samples, self.batch_size))
            yield default_collate(items)  # into shared memory at once; a copy would make a worker grow

    def _samples(self, worker: int, num_workers: int, position: int) -> Iterator[dict[str, Tensor]]:
        """The endless sequence of one worker's items, from a position on."""
        epoch = 0
        while position >= (length := len(self._run(epoch, worker, num_workers))):
            position, epoch = position - length, epoch + 1
        buffers = self._buffers(worker, num_workers, epoch, position)
        rng, skipped, size, rows = next(buffers)
        buffer = list(itertools.islice(rows, size))
        while True:
            next_rng, _, next_size, next_rows = next(buffers)
            next_buffer, order = [], rng.permutation(len(buffer))
            for index in order[:skipped]:
                buffer[index] = None
            for index in order[skipped:]:
                drawn, buffer[index] = buffer[index], None  # a row is let go as the next is read
                yield self.cells._item(*drawn)
                next_buffer.extend(itertools.islice(next_rows, min(1, next_size - len(next_buffer))))
            next_buffer.extend(itertools.islice(next_rows, next_size - len(next_buffer)))
            rng, skipped, buffer = next_rng, 0, next_buffer

    def _buffers(self, worker: int, num_workers: int, first_epoch: int, position: int):
        """Of each buffer: generator of its order, rows to skip, its size, and the reader of its epoch."""
        units, capacity = self.cells._kept_units(), max(1, self.buffer_size // num_workers)
        for epoch in itertools.count(first_epoch):
            run = self._run(epoch, worker, num_workers)
            num_buffers = -(-len(run) // capacity)
            bounds = [len(run) * index // max(num_buffers, 1) for index in range(num_buffers + 1)]
            # the run's first buffer that has not been used up
            first = sum(bound <= position for bound in bounds[1:]) if epoch == first_epoch else 0
            if first == num_buffers:  # more workers than cells
                continue
            order = np.random.default_rng([self.seed, epoch]).permutation(len(units))
            rows = self.cells._read(units, order, run.start + bounds[first], run.stop)
            for index in range(first, num_buffers):
                rng = np.random.default_rng([self.seed, epoch, self.process_index * num_workers + worker, index])
                skipped = position - bounds[index] if (epoch, index) == (first_epoch, first) else 0
                yield rng, skipped, bounds[index + 1] - bounds[index], rows

    def _run(self, epoch: int, worker: int, num_workers: int) -> range:
        """Where a worker of this process reads in the order of an epoch's rows."""
        # the runs of all processes in all epochs in a row; this process's place changes, and so who gets a cell more
        bounds = [len(self.cells) * (self.process_index + epoch + end) // self.num_processes for end in (0, 1)]
        seen = [bound - len(self.cells) * self.process_index // self.num_processes for bound in bounds]

        def made_below(worker: int) -> list[int]:
            """How many of the cells that the process has seen, before and after the epoch, workers below one made."""
            rounds = [divmod(count, self.batch_size * num_workers) for count in seen]
            return [self.batch_size * worker * whole + min(rest, self.batch_size * worker) for whole, rest in rounds]

        start = bounds[0] % len(self.cells)
        first, stop = (after - before for before, after in map(made_below, (worker, worker + 1)))
        return range(start + first, start + stop)
