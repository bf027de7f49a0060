"""What a perfect segmentation of a phantom cell would measure."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PhantomTruth:
    """What a perfect segmentation of a phantom would measure, from its unblurred, noiseless masks.

    An axis is the full length of a principal axis of the ellipsoid that has the mask's second moments.

    Attributes:
        cell_volume_um3: volume of the cell mask, nucleus included.
        nucleus_volume_um3: volume of the nucleus mask.
        nucleus_to_cell_ratio: nucleus volume over cell volume.
        cell_axes_um: three full principal axes of the cell, longest first.
        nucleus_axes_um: three full principal axes of the nucleus, longest first.
        nucleus_offset_um: distance between the two centroids.
        num_protrusions: processes that leave the body; branches of a process are not counted.
        mitochondria_volume_um3: volume of the mask of the mitochondria; None without them.
    """

    cell_volume_um3: float
    nucleus_volume_um3: float
    nucleus_to_cell_ratio: float
    cell_axes_um: tuple[float, float, float]
    nucleus_axes_um: tuple[float, float, float]
    nucleus_offset_um: float
    num_protrusions: int
    mitochondria_volume_um3: float | None = None


def axes_um(points_um: np.ndarray) -> tuple[float, float, float]:
    """Full principal axes, longest first: a solid ellipsoid of half axis a has variance a²/5 along it."""
    variances = np.linalg.eigvalsh(np.cov(points_um, rowvar=False))
    shortest, middle, longest = (2 * math.sqrt(5 * max(float(variance), 0.0)) for variance in variances)
    return longest, middle, shortest


def measure(masks: np.ndarray, voxel_size_um: float, num_protrusions: int) -> PhantomTruth:
    cell, nucleus, *others = (np.argwhere(mask) * voxel_size_um for mask in masks)
    return PhantomTruth(
        cell_volume_um3=len(cell) * voxel_size_um**3,
        nucleus_volume_um3=len(nucleus) * voxel_size_um**3,
        nucleus_to_cell_ratio=len(nucleus) / len(cell),
        cell_axes_um=axes_um(cell),
        nucleus_axes_um=axes_um(nucleus),
        nucleus_offset_um=float(np.linalg.norm(nucleus.mean(axis=0) - cell.mean(axis=0))),
        num_protrusions=num_protrusions,
        mitochondria_volume_um3=len(others[0]) * voxel_size_um**3 if others else None,
    )
