"""From one voxel size to another, with every point of the cell where it was."""

import math
from collections.abc import Sequence

import numpy as np

from ..optional import optional
from ..volumes import voxel_size_triple
from .formats.volume import MAX_VOLUME_BYTES


def resample_volume(
    data: np.ndarray,
    source_um: float | tuple[float, float, float],
    target_um: float | tuple[float, float, float],
    order: int = 1,
) -> np.ndarray:
    """A volume at another voxel size.

    The middle of the volume stays the middle and the new voxels are exactly `target_um` apart, so that the physical
    extent agrees with the old one to half a new voxel at either end. Where voxels grow, intensities are smoothed
    first (a Gaussian of (growth - 1) / 2 old voxels, cut off at two standard deviations): nothing aliases, nothing
    rings, and a background of exactly 0 stays so from two new voxels outside the cell on.

    Args:
        data: (C, Z, Y, X) intensities, or labels for `order=0`.
        source_um: edge of a voxel of `data` in µm, one number or three (z, y, x).
        target_um: the wanted one.
        order: 1 interpolates linearly; 0 takes the nearest voxel, which keeps labels what they are.

    Returns:
        (C, Z', Y', X') with Z' = Z * source / target, rounded, and at least 1. For order 1 float32, or float64 where
        float32 would lose digits; for order 0 of the type of `data`.

    Raises:
        ValueError: if an argument is out of range, or the result would be larger than `MAX_VOLUME_BYTES`.
        ImportError: if scipy is not installed and `order` is 1.
    """
    source, target = voxel_size_triple(source_um), voxel_size_triple(target_um)
    if data.ndim != 4 or 0 in data.shape:
        raise ValueError(f"Expected `data` of shape (C, Z, Y, X), got {data.shape}. Add the channel axis.")
    if order not in (0, 1):
        raise ValueError(f"Expected `order` 0 (labels) or 1 (intensities), got {order}. Choose one.")
    dtype = data.dtype if order == 0 else np.result_type(data.dtype, np.float32)
    growth = [new / old for old, new in zip(source, target, strict=True)]
    # the 1e-9 sends exact halves, which division may have made a little less, all the same way
    lengths = [max(1, math.floor(old / grown + 0.5 + 1e-9)) for old, grown in zip(data.shape[1:], growth, strict=True)]
    if math.prod(lengths) * len(data) * dtype.itemsize > MAX_VOLUME_BYTES:
        raise ValueError(
            f"Expected at most {MAX_VOLUME_BYTES} bytes after resampling, got {data.shape} voxels of {source} µm that"
            f" become {tuple(lengths)} of {target} µm (z, y, x). Check the units of both voxel sizes."
        )
    # where the first new voxel's centre lies, in old voxels
    starts = [
        (old - 1) / 2 - grown * (new - 1) / 2 for old, new, grown in zip(data.shape[1:], lengths, growth, strict=True)
    ]
    if order == 1:
        return sample_grid(data.astype(dtype), starts, growth, lengths)
    nearest = [
        np.floor(start + grown * np.arange(new) + 0.5 + 1e-9).astype(int)
        for start, grown, new in zip(starts, growth, lengths, strict=True)
    ]
    return _take(data, nearest)


def sample_grid(data: np.ndarray, starts: Sequence[float], steps: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """(C, *shape) values of float `data` (C, Z, Y, X) at `starts + steps * index`, both in its voxels.

    Linear, smoothed first where a step is longer than a voxel, as in `resample_volume`; where the grid lies on voxels,
    exactly these (and no scipy is needed). Outside, the outermost voxels go on.
    """
    if all(step == 1 for step in steps) and all(float(start).is_integer() for start in starts):
        indices = [int(start) + np.arange(length) for start, length in zip(starts, shape, strict=True)]
        return _take(data, indices)
    ndimage = _ndimage()
    sampled = np.empty((len(data), *shape), data.dtype)
    sigma = [max(0.0, (step - 1) / 2) for step in steps]
    for channel, output in zip(data, sampled, strict=True):
        smoothed = ndimage.gaussian_filter(channel, sigma, mode="nearest", truncate=2.0)
        ndimage.affine_transform(smoothed, steps, starts, output=output, order=1, mode="nearest")
    return sampled


def _take(data: np.ndarray, indices: Sequence[np.ndarray]) -> np.ndarray:
    inside = [np.clip(index, 0, length - 1) for index, length in zip(indices, data.shape[1:], strict=True)]
    return data[np.ix_(range(len(data)), *inside)]


def _ndimage():
    return optional("scipy.ndimage", "data")
