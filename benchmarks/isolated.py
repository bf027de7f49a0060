"""Peak memory of one case, measured in a process of its own."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def in_new_process(function: Callable[..., object], *arguments: object) -> object:
    """`function(*arguments)`, run in a fresh process with this one's number of threads."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        executor.submit(torch.set_num_threads, torch.get_num_threads()).result()
        return executor.submit(function, *arguments).result()


def peak_gb(device: str) -> float:
    """GB (10⁹ bytes) that this process has held at most: on a GPU what torch allocated there, else resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent process held when it started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
