"""Run a function over a volume in overlapping tiles and blend the results, in bounded memory."""

from collections.abc import Callable
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor


class _Window(NamedTuple):
    """[start, stop) along one axis, and how many voxels it shares with the window before and after."""

    start: int
    stop: int
    fade_in: int
    fade_out: int


def _windows(length: int, tile_size: int, stride: int) -> list[_Window]:
    if length <= tile_size:
        return [_Window(0, length, 0, 0)]
    starts = [*range(0, length - tile_size, stride), length - tile_size]  # the last one overlaps more, to end flush
    shared = [0, *(before + tile_size - start for before, start in pairwise(starts)), 0]
    return [_Window(start, start + tile_size, shared[i], shared[i + 1]) for i, start in enumerate(starts)]


def _ramp(length: int, fade_in: int, fade_out: int, like: Tensor) -> Tensor:
    """Weights (length,) that rise over the first `fade_in` voxels and fall over the last `fade_out`."""
    weights = torch.ones(length, device=like.device)
    if fade_in:
        weights[:fade_in] = torch.arange(1, fade_in + 1, device=like.device) / (fade_in + 1)
    if fade_out:
        weights[-fade_out:] *= torch.arange(fade_out, 0, -1, device=like.device) / (fade_out + 1)
    return weights


def blend_tiles(
    function: Callable[[Tensor], Tensor], volume: Tensor, tile_size: int, overlap: int, scale: float
) -> Tensor:
    """`function(volume)`, computed tile by tile, each tile faded into its neighbours over the overlap.

    Args:
        function: maps (B, C, d, h, w) to (B, C', d*scale, h*scale, w*scale).
        volume: (B, C, d, h, w).
        tile_size: edge of a tile, in voxels of `volume`; shorter axes are taken whole.
        overlap: voxels that neighbouring tiles share at the least.
        scale: output voxels per input voxel along each axis.

    Returns:
        (B, C', d*scale, h*scale, w*scale).
    """
    sizes = volume.shape[2:]
    stride = max(1, tile_size - overlap)
    windows = [_windows(size, tile_size, stride) for size in sizes]
    result = weight_sum = None
    for window in product(*windows):
        tile = function(volume[(slice(None), slice(None), *(slice(w.start, w.stop) for w in window))])
        target = tuple(slice(round(w.start * scale), round(w.stop * scale)) for w in window)
        ramps = [
            _ramp(t.stop - t.start, round(w.fade_in * scale), round(w.fade_out * scale), tile)
            for t, w in zip(target, window, strict=True)
        ]
        weights = ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]
        if result is None:
            output_sizes = [round(size * scale) for size in sizes]
            result = tile.new_zeros(*tile.shape[:2], *output_sizes)
            weight_sum = torch.zeros(output_sizes, device=tile.device)
        result[(slice(None), slice(None), *target)] += tile * weights.to(tile.dtype)
        weight_sum[target] += weights
    return result / weight_sum.to(result.dtype)
