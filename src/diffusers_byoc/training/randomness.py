"""Randomness as a function of the step: what a step draws depends on (seed, step) and on nothing before it.

A resumed run therefore sees the data, the noise and the timesteps of the unbroken one without restoring any generator,
and several processes draw the one global batch and take their shares of it.
"""

import numpy as np
import torch


def step_generator(seed: int, step: int, stream: str) -> torch.Generator:
    """CPU generator for one purpose (`stream`, any name) of one training step."""
    state = np.random.SeedSequence([seed, step, *stream.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


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


def process_share(global_batch: torch.Tensor, process_index: int, num_processes: int) -> torch.Tensor:
    """The rows of `global_batch` (B, ...) that belong to one of `num_processes` processes."""
    return global_batch.chunk(num_processes)[process_index]
