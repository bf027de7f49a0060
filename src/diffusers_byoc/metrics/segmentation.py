"""Foreground of one channel of a cell: Otsu's threshold or a given one, holes filled, specks dropped.

Each channel is segmented on its own. Holes are filled because a cell contains its nucleus and a nucleus its nucleoli,
however dark they are in their own channel.

Source: Otsu 1979, "A threshold selection method from gray-level histograms", as in scikit-image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..optional import optional


#: A component with less than this share of its channel's largest one is a speck: noise, not a second cell.
SPECK_SHARE = 0.01

#: Otsu splits any channel in two, noise as well. Where the two classes' mean intensities lie closer than this, on the
#: scale of [0, 1], the channel counts as empty.
MIN_CONTRAST = 0.05


@dataclass(frozen=True)
class Segmentation:
    """The foreground of a channel.

    Attributes:
        mask: (D, H, W) bool, holes filled, specks dropped.
        parts: (D, H, W) integers, 0 background, 1 to `num_parts` the connected parts (26 neighbours).
        num_parts: their number.
        largest_part_share: share in [0, 1] of the foreground, specks included, that lies in its largest part; nan
            without a foreground.
    """

    mask: np.ndarray
    parts: np.ndarray
    num_parts: int
    largest_part_share: float


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...]:
    """The part of a volume that holds a mask, and some voxels around it as far as there are any.

    Args:
        mask: (D, H, W) bool, not empty.
        margin: voxels.

    Returns:
        A slice for each axis.
    """
    (box,) = optional("scipy.ndimage", "metrics").find_objects(mask.astype(np.uint8))
    return tuple(slice(max(axis.start - margin, 0), axis.stop + margin) for axis in box)


def foreground(channel: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """Voxels above a threshold, holes filled.

    Args:
        channel: (D, H, W) in [0, 1].
        threshold: in [0, 1]; None takes Otsu's, and no foreground where the contrast is below `MIN_CONTRAST`.

    Returns:
        (D, H, W) bool.

    Raises:
        ImportError: if SciPy or scikit-image is missing.
    """
    if threshold is None:
        mask = channel > optional("skimage.filters", "metrics").threshold_otsu(channel)
        if not mask.any() or channel[mask].mean() - channel[~mask].mean() < MIN_CONTRAST:
            return np.zeros_like(mask)
    else:
        mask = channel > threshold
    if mask.any():
        box = bounding_box(mask)  # outside it nothing can be a hole
        mask[box] = optional("scipy.ndimage", "metrics").binary_fill_holes(mask[box])
    return mask


def segment_channel(channel: np.ndarray, threshold: float | None = None) -> Segmentation:
    """The foreground of a channel and its connected parts.

    Args:
        channel: (D, H, W) in [0, 1].
        threshold: as in `foreground`.

    Returns:
        The segmentation; of an empty channel an empty one.

    Raises:
        ImportError: if SciPy or scikit-image is missing.
    """
    mask = foreground(channel, threshold)
    parts = np.zeros(mask.shape, np.int32)
    if not mask.any():
        return Segmentation(mask, parts, 0, float("nan"))
    box = bounding_box(mask)
    components, _ = optional("scipy.ndimage", "metrics").label(mask[box], structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel())
    sizes[0] = 0  # background
    keep = sizes >= SPECK_SHARE * sizes.max()
    keep[0] = False
    part_of_component = np.where(keep, np.cumsum(keep), 0)
    parts[box] = part_of_component[components]
    return Segmentation(parts > 0, parts, int(keep.sum()), float(sizes.max() / sizes.sum()))
