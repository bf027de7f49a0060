"""Size and soundness of single cells: volumes, connectedness, the nucleus's place in the cell.

Each channel is segmented on its own: Otsu's threshold on the whole channel, small specks dropped, holes filled (a cell
contains its nucleus, a nucleus its nucleoli, however dark they are in their own channel).

Source: Otsu 1979, "A threshold selection method from gray-level histograms", as in scikit-image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch


#: A component with less than this share of its channel's largest one is a speck: noise, not a second cell.
SPECK_SHARE = 0.01

#: Otsu splits any channel in two, noise as well. Where the two classes' mean intensities lie closer than this, on the
#: scale of [0, 1], the channel counts as empty.
MIN_CONTRAST = 0.05


@dataclass(frozen=True)
class CellMorphology:
    """What `measure_cell` finds. A share or ratio without a denominator is nan, a volume or a count then 0.

    Attributes:
        cell_volume_um3: volume of the cell in µm³, holes filled, specks dropped.
        nucleus_volume_um3: the same of the nucleus.
        nucleus_to_cell_ratio: nucleus volume over cell volume; nan without a cell.
        num_cell_components: connected parts of the cell (26 neighbours), specks dropped; 1 for a sound cell.
        largest_component_share: share in [0, 1] of the cell's foreground, specks included, that lies in its largest
            part; nan without a cell.
        nucleus_inside_share: share in [0, 1] of the nucleus that lies inside the cell; nan without a nucleus.
        cell_extent: share in (0, 1] of its bounding box that the cell fills; nan without a cell. 1 for a box, π/6
            for a sphere, little for a cell with long protrusions.
    """

    cell_volume_um3: float
    nucleus_volume_um3: float
    nucleus_to_cell_ratio: float
    num_cell_components: int
    largest_component_share: float
    nucleus_inside_share: float
    cell_extent: float


def measure_cell(
    volume: np.ndarray | torch.Tensor,
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
    cell_channel: int = 0,
    nucleus_channel: int = 1,
) -> CellMorphology:
    """Segment one cell and measure it.

    Args:
        volume: (M, D, H, W) in [0, 1], M ≥ 2.
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        thresholds: (cell, nucleus) in [0, 1], brighter voxels are foreground; None, for both or for one of them,
            takes Otsu's threshold, and no foreground where the channel's contrast is below `MIN_CONTRAST`. Otsu suits
            a dye that fills the cell. A membrane dye on a dark background needs a low number, as (0.05, None):
            Otsu finds the membrane alone, and where the image cuts it open there is no hole to fill.
        cell_channel: channel of the cell body.
        nucleus_channel: channel of the nucleus.

    Returns:
        The measurements; an empty channel gives zeros and nan, see `CellMorphology`.

    Raises:
        ValueError: if the volume is not (M, D, H, W) in [0, 1], or another argument does not fit it.
        ImportError: if SciPy or scikit-image is missing.
    """
    volume = _check_volume(volume, cell_channel, nucleus_channel)
    voxel_volume_um3 = _voxel_volume_um3(voxel_size_um)
    if thresholds is None:
        thresholds = (None, None)
    elif len(thresholds) != 2:
        raise ValueError(f"thresholds must be (cell, nucleus), got {thresholds!r}.")

    # 1. segment
    cell = _foreground(volume[cell_channel], thresholds[0])
    nucleus = _foreground(volume[nucleus_channel], thresholds[1])

    # 2. connected parts, before and after the specks go
    cell_mask, num_cell_components, largest_component_share = _drop_specks(cell)
    nucleus_mask, _, _ = _drop_specks(nucleus)

    # 3. measure
    num_cell_voxels, num_nucleus_voxels = int(cell_mask.sum()), int(nucleus_mask.sum())
    return CellMorphology(
        cell_volume_um3=num_cell_voxels * voxel_volume_um3,
        nucleus_volume_um3=num_nucleus_voxels * voxel_volume_um3,
        nucleus_to_cell_ratio=_share(num_nucleus_voxels, num_cell_voxels),
        num_cell_components=num_cell_components,
        largest_component_share=largest_component_share,
        nucleus_inside_share=_share(int((nucleus_mask & cell_mask).sum()), num_nucleus_voxels),
        cell_extent=_share(num_cell_voxels, _num_bounding_box_voxels(cell_mask)),
    )


def measure_cells(
    volumes: np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor],
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
    cell_channel: int = 0,
    nucleus_channel: int = 1,
) -> list[CellMorphology]:
    """`measure_cell` of each cell.

    Args:
        volumes: (B, M, D, H, W) in [0, 1], or B volumes (M, D, H, W) of any sizes.
        voxel_size_um: as in `measure_cell`.
        thresholds: as in `measure_cell`.
        cell_channel: as in `measure_cell`.
        nucleus_channel: as in `measure_cell`.

    Returns:
        B measurements.

    Raises:
        ValueError: as `measure_cell`; the message of a bad volume starts with its index.
        ImportError: if SciPy or scikit-image is missing.
    """
    measurements = []
    for index, volume in enumerate(volumes):
        try:
            measurements.append(measure_cell(volume, voxel_size_um, thresholds, cell_channel, nucleus_channel))
        except ValueError as error:
            raise ValueError(f"volumes[{index}]: {error}") from error
    return measurements


def _check_volume(volume: np.ndarray | torch.Tensor, cell_channel: int, nucleus_channel: int) -> np.ndarray:
    """(M, D, H, W) in [0, 1] as float32 NumPy, or a ValueError."""
    if hasattr(volume, "detach"):
        volume = volume.detach().float().cpu().numpy()
    volume = np.asarray(volume, dtype=np.float32)
    if volume.ndim != 4 or 0 in volume.shape:
        hint = "; call measure_cells for a batch" if volume.ndim == 5 else ""
        raise ValueError(f"a volume must be (M, D, H, W), got shape {volume.shape}{hint}.")
    for name, channel in (("cell_channel", cell_channel), ("nucleus_channel", nucleus_channel)):
        if not 0 <= channel < len(volume):
            raise ValueError(
                f"{name} is {channel}, but the volume of shape {volume.shape} has {len(volume)} channels; "
                "pass (M, D, H, W) with a cell and a nucleus channel."
            )
    low, high = volume.min(), volume.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise ValueError(
            f"a volume must lie in [0, 1], got [{low:g}, {high:g}]; map volumes in [-1, 1] with (volume + 1) / 2."
        )
    return volume


def _voxel_volume_um3(voxel_size_um: float | Sequence[float]) -> float:
    spacing = np.atleast_1d(np.asarray(voxel_size_um, dtype=float))
    if spacing.shape not in ((1,), (3,)) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ValueError(f"voxel_size_um must be one positive number or (z, y, x) of them, got {voxel_size_um!r}.")
    return float(np.prod(np.broadcast_to(spacing, (3,))))


def _foreground(channel: np.ndarray, threshold: float | None) -> np.ndarray:
    """(D, H, W) intensities -> (D, H, W) bool, holes filled."""
    try:
        from scipy.ndimage import binary_fill_holes
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise ImportError(
            'Measuring cells needs SciPy and scikit-image; run: pip install "diffusers_byoc[metrics]"'
        ) from error

    if threshold is None:
        mask = channel > threshold_otsu(channel)
        if not mask.any() or channel[mask].mean() - channel[~mask].mean() < MIN_CONTRAST:
            return np.zeros_like(mask)
    else:
        mask = channel > threshold
    return binary_fill_holes(mask)


def _drop_specks(mask: np.ndarray) -> tuple[np.ndarray, int, float]:
    """The mask without its specks, the number of parts left, and the largest part's share of all foreground."""
    from scipy.ndimage import label

    labels, num_components = label(mask, structure=np.ones((3, 3, 3)))
    if num_components == 0:
        return mask, 0, float("nan")
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # background
    keep = sizes >= SPECK_SHARE * sizes.max()
    keep[0] = False
    return keep[labels], int(keep.sum()), float(sizes.max() / sizes.sum())


def _num_bounding_box_voxels(mask: np.ndarray) -> int:
    if not mask.any():
        return 0
    indices = np.nonzero(mask)
    return int(np.prod([axis.max() - axis.min() + 1 for axis in indices]))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
