"""Which cells make up which batch of a training: of cells that can be read in any order, and of a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from ...randomness import process_share, step_generator


if TYPE_CHECKING:
    from .stream import StreamedCells


def batch_indices(num_items: int, batch_size: int, batch: int, seed: int) -> torch.Tensor:
    """Items of the `batch`-th batch, (batch_size,) int64, of an endless run of shuffled epochs.

    Every epoch is a permutation of its own, and batches run across the seam between two, so that none is cut short.
    """
    first = batch * batch_size
    parts, remaining = [], batch_size
    while remaining:
        epoch, offset = divmod(first, num_items)
        order = torch.randperm(num_items, generator=step_generator(seed, epoch, "epoch"))
        parts.append(order[offset : offset + remaining])
        first, remaining = first + len(parts[-1]), remaining - len(parts[-1])
    return torch.cat(parts)


class StepBatches(torch.utils.data.Sampler[list[int]]):
    """This process's share of every batch from `first_batch` on; a `batch_sampler` for a DataLoader.

    For cells that can be read in any order; `StreamBatches` is for those that cannot.

    Args:
        num_items: size of the data set.
        batch_size: items per process and batch.
        first_batch: where to begin.
        num_batches: how many batches.
        seed: of the shuffling.
        process_index: of this process.
        num_processes: taking part.
    """

    def __init__(self, num_items, batch_size, first_batch, num_batches, seed, process_index=0, num_processes=1):
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.first_batch, self.num_batches = first_batch, num_batches
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        for batch in range(self.first_batch, self.first_batch + self.num_batches):
            indices = batch_indices(self.num_items, self.batch_size * self.num_processes, batch, self.seed)
            yield process_share(indices, self.process_index, self.num_processes).tolist()


class StreamBatches(IterableDataset):
    """Batches of a stream for a DataLoader with ``batch_size=None``; the counterpart of `StepBatches`.

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
                f"Expected cells, and `batch_size` and `buffer_size` of at least 1, got {len(cells)} cells,"
                f" {batch_size} and {buffer_size}. Give more."
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
        """Where a worker of this process reads in the order of an epoch's rows.

        Workers make batches in turn. Of 10 cells, in batches of 3 by 2 workers, worker 0 makes the cells 0-2, 6-8,
        12-14, 18-20, ... of all epochs in a row, worker 1 the cells 3-5, 9-11, 15-17, .... Epoch 0 are the cells 0-9,
        of which they make 6 and 4: one reads the rows [0, 6) of its order, the other [6, 10). Epoch 1 are the cells
        10-19, of which they make 5 (12-14, 18, 19) and 5 (10, 11, 15-17): [0, 5) and [5, 10).
        """
        num_cells = len(self.cells)
        # the runs of all processes in all epochs in a row; this process's place changes, and so who gets a cell more
        start, stop = (num_cells * (self.process_index + epoch + end) // self.num_processes for end in (0, 1))
        begin = num_cells * self.process_index // self.num_processes  # of this process
        before, after = (self._made_below(worker, num_workers, end - begin) for end in (start, stop))
        before_next, after_next = (self._made_below(worker + 1, num_workers, end - begin) for end in (start, stop))
        return range(start % num_cells + after - before, start % num_cells + after_next - before_next)

    def _made_below(self, worker: int, num_workers: int, num_cells: int) -> int:
        """How many of the first `num_cells` cells of this process the workers below `worker` make."""
        rounds, rest = divmod(num_cells, self.batch_size * num_workers)
        return self.batch_size * worker * rounds + min(rest, self.batch_size * worker)
