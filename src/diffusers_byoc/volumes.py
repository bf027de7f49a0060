"""What every part of the package takes for a volume: intensities in [0, 1], voxels of one size in µm."""

import math
from collections.abc import Sequence

import numpy as np


UNIT_RANGE_TOLERANCE = 1e-3  # what arithmetic of half precision may leave outside [0, 1]


def check_unit_range(volumes, name: str = "volumes") -> None:
    """Refuse intensities outside [0, 1].

    Args:
        volumes: a NumPy array or a tensor of any shape, not empty.
        name: of the argument, for the message.

    Raises:
        ValueError: if any value lies outside [0, 1] by more than `UNIT_RANGE_TOLERANCE`, or is NaN.
    """
    low, high = float(volumes.min()), float(volumes.max())
    if not (low >= -UNIT_RANGE_TOLERANCE and high <= 1 + UNIT_RANGE_TOLERANCE):  # also catches NaN
        raise ValueError(
            f"Expected {name} in [0, 1], got [{low:g}, {high:g}]. Map volumes in [-1, 1] with (volumes + 1) / 2."
        )


def voxel_size_triple(voxel_size_um: float | Sequence[float]) -> tuple[float, float, float]:
    """(z, y, x) edges of a voxel in µm from one number or three.

    Raises:
        ValueError: if it is not one or three positive, finite numbers.
    """
    try:
        sizes = [float(size) for size in np.broadcast_to(np.asarray(voxel_size_um, dtype=float), (3,))]
    except (TypeError, ValueError):  # no numbers, or neither one nor three
        sizes = [math.nan]
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        raise ValueError(
            f"Expected `voxel_size_um` as one positive number in µm or three (z, y, x), got {voxel_size_um!r}. Correct"
            " it, or leave it out where it is not known."
        )
    return tuple(sizes)
