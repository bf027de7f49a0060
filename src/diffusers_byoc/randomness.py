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


def process_share(global_batch: torch.Tensor, process_index: int, num_processes: int) -> torch.Tensor:
    """The rows of `global_batch` (B, ...) that belong to one of `num_processes` processes."""
    return global_batch.chunk(num_processes)[process_index]
