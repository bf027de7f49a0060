"""Run a function over a volume in overlapping tiles and blend the results, in bounded memory."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def _starts(length: int, tile_size: int, stride: int) -> list[int]:
    if length <= tile_size:
        return [0]
    starts = list(range(0, length - tile_size, stride))
    return [*starts, length - tile_size]


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
    result = weight_sum = None
    for corner in product(*(_starts(size, tile_size, stride) for size in sizes)):
        window = tuple(slice(start, min(start + tile_size, size)) for start, size in zip(corner, sizes, strict=True))
        tile = function(volume[(slice(None), slice(None), *window)])
        target = tuple(slice(round(w.start * scale), round(w.stop * scale)) for w in window)
        fade = round(overlap * scale)
        ramps = [
            _ramp(t.stop - t.start, fade if w.start > 0 else 0, fade if w.stop < size else 0, tile)
            for t, w, size in zip(target, window, sizes, strict=True)
        ]
        weights = ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]
        if result is None:
            output_sizes = [round(size * scale) for size in sizes]
            result = tile.new_zeros(*tile.shape[:2], *output_sizes)
            weight_sum = torch.zeros(output_sizes, device=tile.device)
        result[(slice(None), slice(None), *target)] += tile * weights.to(tile.dtype)
        weight_sum[target] += weights
    return result / weight_sum.to(result.dtype)
