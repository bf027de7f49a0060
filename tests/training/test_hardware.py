import os
import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from diffusers_byoc.training import fair_num_threads, fastest_precision, is_cpu_training, keep_freed_memory
from diffusers_byoc.training.hardware import machine_name


def test_cores_are_shared_among_the_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for processes, threads in ((None, 8), ("1", 8), ("3", 2), ("16", 1)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert fair_num_threads() == threads


@pytest.mark.parametrize(
    ("cuda", "any_gpu", "bf16", "expected"),
    [(True, True, True, "fp16"), (False, False, True, "bf16"), (False, False, False, "no"), (False, True, True, "no")],
)
def test_fastest_precision(monkeypatch, cuda, any_gpu, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: any_gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert fastest_precision() == expected
    assert is_cpu_training() is not any_gpu


def test_the_name_of_a_cpu_ends_with_its_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert machine_name(1).endswith(", 1 thread") and machine_name(2).endswith(", 2 threads")


def pages_of_a_new_buffer(keep: bool) -> int:
    """How many pages the system provides for a buffer of 64 MB after ten of the same size were freed."""
    if keep:
        keep_freed_memory()
    for _ in range(10):
        torch.zeros(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
@pytest.mark.parametrize(("keep", "is_reused"), [(False, False), (True, True)])
def test_freed_memory_is_kept(keep, is_reused):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pages = pool.submit(pages_of_a_new_buffer, keep).result()
    assert (pages < 100) == is_reused
