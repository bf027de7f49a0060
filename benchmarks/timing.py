"""How the benchmarks time."""

import os
import platform
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn


def best_ms(function: Callable[[], object], repetitions: int = 20) -> float:
    """Milliseconds of the fastest of `repetitions` calls after two that are not counted."""
    function(), function()
    return min(_one_ms(function) for _ in range(repetitions))


def interleaved_best_ms(functions: Mapping[str, Callable[[], object]], repetitions: int = 5) -> dict[str, float]:
    """Milliseconds of the fastest call of each function, after one that is not counted.

    The functions take turns, so that a machine that slows down or is shared slows all of them.
    """
    for function in functions.values():
        function()
    rounds = [{name: _one_ms(function) for name, function in functions.items()} for _ in range(repetitions)]
    return {name: min(times[name] for times in rounds) for name in functions}


def _one_ms(function: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return (time.perf_counter() - start) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(device: str) -> str:
    """One line on what the numbers depend on: versions, threads, instruction sets, allocator."""
    parts = [f"torch {torch.__version__}"]
    if device == "cuda":
        parts.append(torch.cuda.get_device_name())
    else:
        parts += [f"{torch.get_num_threads()} threads", _processor()]
        parts += [f"AMX {torch.cpu._is_amx_tile_supported()}", f"AVX-512 bf16 {torch.cpu._is_avx512_bf16_supported()}"]
        allocator = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_")]
        parts.append(" ".join(allocator) or "default allocator")
    return ", ".join(parts)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def convolution_peak(dtype: torch.dtype, device: str, backward: bool) -> float:
    """GFLOP/s of one 3x3x3 convolution of 64 features on 16³, batch 8, in its faster memory format.

    With `backward`, of its forward pass and both of its gradients together.
    """
    speeds = []
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        convolution = nn.Conv3d(64, 64, 3, padding=1, dtype=dtype, device=device).to(memory_format=memory_format)
        volume = torch.randn(8, 64, 16, 16, 16, dtype=dtype, device=device).contiguous(memory_format=memory_format)
        gflop = 2 * 8 * 16**3 * 64**2 * 27 / 1e9
        if backward:
            volume.requires_grad_()
            gradient = torch.randn_like(volume)
            inputs = (volume, convolution.weight)
            ms = best_ms(lambda c=convolution, i=inputs, g=gradient: torch.autograd.grad(c(i[0]), i, g))
            gflop *= 3
        else:
            with torch.no_grad():
                ms = best_ms(lambda c=convolution, v=volume: c(v))
        speeds.append(gflop / ms * 1e3)
    return max(speeds)


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a product of two 2048 x 2048 matrices."""
    left, right = (torch.randn(2048, 2048, dtype=dtype, device=device) for _ in range(2))
    return 2 * 2048**3 / best_ms(lambda: left @ right, repetitions=5) / 1e6
