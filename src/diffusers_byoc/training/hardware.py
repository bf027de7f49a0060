"""What this machine computes with: GPU or CPU, threads, precision, memory."""

import ctypes
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch


# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def is_cpu_training() -> bool:
    """Whether there is no GPU.

    accelerate must be told (`cpu=True`): without it, the processes that torchrun starts on a CPU do not know of each
    other, and each trains alone.
    """
    return not torch.accelerator.is_available()


def fastest_precision() -> str:
    """accelerate's `mixed_precision` for this machine: fp16 on a GPU, bf16 on a CPU that computes in it, else no."""
    if torch.cuda.is_available():
        return "fp16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if is_cpu_training() and has_bf16 else "no"


def fair_num_threads() -> int:
    """Threads for this process if those of this machine share its cores; launchers leave every process just one."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def processor_seconds() -> float:
    """Time of this process on the CPU, by thread: what a clock would show if the machine did nothing else."""
    return time.process_time() / torch.get_num_threads()


def machine_name(num_cpu_threads: int) -> str:
    """What a process of this run computes with, in words: the GPU's name, or the CPU's and its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # of Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {num_cpu_threads} thread{'s' if num_cpu_threads > 1 else ''}"


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, in place of handing every large buffer back to the system.

    On a CPU, the pages of fresh buffers are a third of an autoencoder's training step at batch 8; to keep them takes a
    fifth more memory (`docs/performance.md`). Nothing happens under another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            libc.mallopt(parameter, value)
