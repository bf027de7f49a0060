"""Size, shape, brightness, texture and soundness of single cells, in physical units.

Source: surfaces by marching cubes (Lewiner et al. 2003) and Taubin 1995, "A signal processing approach to fair surface
design"; texture by Haralick et al. 1973, "Textural features for image classification"; sphericity by Wadell 1935;
elongation and flatness as ITK names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from ..volumes import check_unit_range, voxel_size_triple
from .segmentation import Segmentation, bounding_box, segment_channel


if TYPE_CHECKING:
    import torch

#: Share of a nucleus that must lie in the cell for it to count as inside: the two segmentations blur alike, but not
#: equally.
INSIDE_SHARE = 0.95

_GRAY_LEVELS = 16  # of the co-occurrence matrices, over [0, 1]
# A mesh of voxels has the stairs of voxels in its area, 9 % too much for a ball of any size. After these passes a ball
# of radius 3 to 28 voxels has its area within 3 %, and its volume within 8 % at radius 3 and 1 % from 9 on.
_SMOOTHING_PASSES = 30


@dataclass(frozen=True)
class CellMorphology:
    """What `measure_cell` finds. A volume or a count of what is missing is 0, all else about it nan.

    Without a channel for the nucleus nobody can say whether it is missing: all about it is nan.

    The numbers of the cell stand before those of the nucleus, each of which means the same.

    Attributes:
        cell_volume_um3: volume in µm³, holes filled, specks dropped.
        cell_surface_um2: surface area in µm².
        cell_sphericity: area of the ball of the same volume over the surface area; 1 for a ball, less for all else.
        cell_long_axis_um: longest full axis, in µm, of the ellipsoid with the mask's second moments.
        cell_middle_axis_um: its middle axis.
        cell_short_axis_um: its shortest axis.
        cell_elongation: long over middle axis, ≥ 1.
        cell_flatness: middle over short axis, ≥ 1.
        cell_solidity: volume over that of the convex hull, in (0, 1]; little for a cell with long protrusions.
        cell_extent: share in (0, 1] of its bounding box that the mask fills. 1 for a box, π/6 for a ball.
        num_cell_components: connected parts (26 neighbours), specks dropped; 1 for a sound cell.
        largest_component_share: share in [0, 1] of the cell's foreground, specks included, in its largest part.
        cell_intensity_mean: mean over the mask of its own channel, in [0, 1].
        cell_intensity_std: standard deviation over the mask.
        cell_texture_contrast: mean squared difference of neighbouring voxels in a z plane, in 16 gray levels.
        cell_texture_homogeneity: in (0, 1], 1 where neighbours are equal.
        cell_texture_correlation: of the gray levels of neighbours, in [-1, 1].
        nucleus_to_cell_ratio: nucleus volume over cell volume.
        nucleus_offset_um: distance of the nucleus's centroid from the cell's.
        nucleus_inside_share: share in [0, 1] of the nucleus's voxels that lie in the cell.
        num_nuclei_inside: connected parts of the nucleus with at least `INSIDE_SHARE` of their voxels in the cell.
    """

    cell_volume_um3: float
    cell_surface_um2: float
    cell_sphericity: float
    cell_long_axis_um: float
    cell_middle_axis_um: float
    cell_short_axis_um: float
    cell_elongation: float
    cell_flatness: float
    cell_solidity: float
    cell_extent: float
    num_cell_components: int
    largest_component_share: float
    cell_intensity_mean: float
    cell_intensity_std: float
    cell_texture_contrast: float
    cell_texture_homogeneity: float
    cell_texture_correlation: float
    nucleus_volume_um3: float
    nucleus_surface_um2: float
    nucleus_sphericity: float
    nucleus_long_axis_um: float
    nucleus_middle_axis_um: float
    nucleus_short_axis_um: float
    nucleus_elongation: float
    nucleus_flatness: float
    nucleus_solidity: float
    nucleus_extent: float
    num_nucleus_components: int
    nucleus_intensity_mean: float
    nucleus_intensity_std: float
    nucleus_texture_contrast: float
    nucleus_texture_homogeneity: float
    nucleus_texture_correlation: float
    nucleus_to_cell_ratio: float
    nucleus_offset_um: float
    nucleus_inside_share: float
    num_nuclei_inside: int


#: Names of the columns of `morphology_features`.
MORPHOLOGY_NAMES = tuple(field.name for field in fields(CellMorphology))


def find_channels(channel_names: Sequence[str]) -> tuple[int, int | None]:
    """Positions of the cell and of the nucleus: the channels of these names, whatever their case and order.

    Where none has either name, the first channel is the cell and the second the nucleus. Where one of the two names is
    missing, there is no nucleus, or the first other channel is the cell.

    Args:
        channel_names: M names, M ≥ 1.

    Returns:
        (cell, nucleus), for `measure_cell`; None for a nucleus that has no channel.

    Raises:
        ValueError: if there is no channel.
    """
    names = [name.lower() for name in channel_names]
    if not names:
        raise ValueError("Expected at least one channel, got none. Name the channels.")
    if "cell" in names:
        return names.index("cell"), names.index("nucleus") if "nucleus" in names else None
    if len(names) == 1:
        return 0, None
    nucleus = names.index("nucleus") if "nucleus" in names else 1
    return (1 if nucleus == 0 else 0), nucleus


def measure_cell(
    volume: np.ndarray | torch.Tensor,
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
    cell_channel: int = 0,
    nucleus_channel: int | None = 1,
) -> CellMorphology:
    """Segment one cell and measure it.

    Args:
        volume: (M, D, H, W) in [0, 1].
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        thresholds: (cell, nucleus) in [0, 1], brighter voxels are foreground; None, for both or for one of them,
            takes Otsu's threshold, and no foreground where the channel's contrast is below `MIN_CONTRAST`. Otsu suits
            a dye that fills the cell. A membrane dye on a dark background needs a low number, as (0.05, None):
            Otsu finds the membrane alone, and where the image cuts it open there is no hole to fill.
        cell_channel: channel of the cell body.
        nucleus_channel: channel of the nucleus; None where there is none, and all about one is nan.

    Returns:
        The measurements; an empty channel gives zeros and nan, see `CellMorphology`.

    Raises:
        ValueError: if the volume is not (M, D, H, W) in [0, 1], or another argument does not fit it.
        ImportError: if SciPy, scikit-image or trimesh is missing.
    """
    volume = _check_volume(volume, cell_channel, nucleus_channel)
    spacing = np.array(voxel_size_triple(voxel_size_um))
    if thresholds is None:
        thresholds = (None, None)
    elif len(thresholds) != 2:
        raise ValueError(f"Expected thresholds (cell, nucleus), got {thresholds!r}. Give two, or None.")

    # 1. segment
    cell = segment_channel(volume[cell_channel], thresholds[0])
    nucleus = None if nucleus_channel is None else segment_channel(volume[nucleus_channel], thresholds[1])

    # 2. each by itself
    measures = dict.fromkeys(MORPHOLOGY_NAMES, float("nan"))
    measures |= _measure_channel("cell", volume[cell_channel], cell, spacing)
    measures["largest_component_share"] = cell.largest_part_share
    if nucleus is None:
        return CellMorphology(**measures)
    measures |= _measure_channel("nucleus", volume[nucleus_channel], nucleus, spacing)

    # 3. the nucleus in the cell
    part_sizes = np.bincount(nucleus.parts.ravel())[1:]
    part_sizes_inside = np.bincount(nucleus.parts[cell.mask], minlength=len(part_sizes) + 1)[1:]
    measures |= {
        "nucleus_to_cell_ratio": _share(nucleus.mask.sum(), cell.mask.sum()),
        "nucleus_offset_um": _distance(_centroid(nucleus.mask), _centroid(cell.mask), spacing),
        "nucleus_inside_share": _share(part_sizes_inside.sum(), part_sizes.sum()),
        "num_nuclei_inside": int((part_sizes_inside >= INSIDE_SHARE * part_sizes).sum()),
    }
    return CellMorphology(**measures)


def measure_cells(
    volumes: np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor],
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
    cell_channel: int = 0,
    nucleus_channel: int | None = 1,
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
        ValueError: as `measure_cell`; the message of a bad volume ends with its index.
        ImportError: if SciPy, scikit-image or trimesh is missing.
    """
    measurements = []
    for index, volume in enumerate(volumes):
        try:
            measurements.append(measure_cell(volume, voxel_size_um, thresholds, cell_channel, nucleus_channel))
        except ValueError as error:
            raise ValueError(f"{error} It is volumes[{index}].") from error
    return measurements


def morphology_features(measurements: Sequence[CellMorphology]) -> np.ndarray:
    """Measurements as a table.

    Args:
        measurements: of N cells.

    Returns:
        (N, K) float64, columns as `MORPHOLOGY_NAMES`, nan for what a cell does not have; `standardize_features` makes
        them comparable and finite.
    """
    return np.array([astuple(cell) for cell in measurements], dtype=np.float64).reshape(-1, len(MORPHOLOGY_NAMES))


def _check_volume(volume: np.ndarray | torch.Tensor, cell_channel: int, nucleus_channel: int | None) -> np.ndarray:
    """(M, D, H, W) in [0, 1] as float32 NumPy, or a ValueError."""
    if hasattr(volume, "detach"):
        volume = volume.detach().float().cpu().numpy()
    volume = np.asarray(volume, dtype=np.float32)
    if volume.ndim != 4 or 0 in volume.shape:
        remedy = "Call measure_cells for a batch" if volume.ndim == 5 else "Give one cell"
        raise ValueError(f"Expected a volume (M, D, H, W), got shape {volume.shape}. {remedy}.")
    for name, channel in (("cell_channel", cell_channel), ("nucleus_channel", nucleus_channel)):
        if channel is not None and not 0 <= channel < len(volume):
            raise ValueError(
                f"Expected {name} among the {len(volume)} channels of {volume.shape}, got {channel}. "
                "Give the channel's number, or nucleus_channel=None where there is no nucleus."
            )
    check_unit_range(volume, "a volume")
    return volume


def _measure_channel(name: str, channel: np.ndarray, segmentation: Segmentation, spacing: np.ndarray) -> dict:
    """The fields of `CellMorphology` that describe one channel."""
    mask = segmentation.mask
    measures = {
        "volume_um3": float(mask.sum() * spacing.prod()),
        **_shape(mask, spacing),
        **_brightness(channel, mask),
    }
    counts = {f"num_{name}_components": segmentation.num_parts}
    return counts | {f"{name}_{key}": value for key, value in measures.items()}


def _shape(mask: np.ndarray, spacing: np.ndarray) -> dict[str, float]:
    names = ("long_axis_um", "middle_axis_um", "short_axis_um", "elongation", "flatness")
    names += ("surface_um2", "sphericity", "solidity", "extent")
    if not mask.any():
        return dict.fromkeys(names, float("nan"))
    measure = optional("skimage.measure", "metrics")

    # 1. moments: an ellipsoid of full axis a has the variance a² / 20 along it
    region = measure.regionprops(mask[bounding_box(mask)].astype(np.uint8), spacing=spacing)[0]
    inertia = np.array(region.inertia_tensor)
    # each voxel is a box and adds its own variance; without it a plane of voxels would have no thickness
    covariance = np.eye(3) * inertia.trace() / 2 - inertia + np.diag(spacing**2) / 12
    short, middle, long = np.sqrt(20 * np.linalg.eigvalsh(covariance))

    # 2. surface
    trimesh = optional("trimesh", "metrics")
    vertices, faces, _, _ = measure.marching_cubes(
        np.pad(region.image, 1).astype(np.float32), 0.5, spacing=tuple(spacing)
    )
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    neighbours = trimesh.smoothing.laplacian_calculation(mesh).tocsr()  # quicker to multiply
    trimesh.smoothing.filter_taubin(mesh, iterations=_SMOOTHING_PASSES, laplacian_operator=neighbours)
    volume, area = abs(mesh.volume), mesh.area
    hull_volume = optional("scipy.spatial", "metrics").ConvexHull(mesh.vertices).volume
    ball_area = np.pi ** (1 / 3) * (6 * volume) ** (2 / 3)
    values = (long, middle, short, long / middle, middle / short)
    values += (area, ball_area / area, volume / hull_volume, region.extent)
    return {key: float(value) for key, value in zip(names, values, strict=True)}


def _brightness(channel: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    textures = ("contrast", "homogeneity", "correlation")
    names = ("intensity_mean", "intensity_std", *(f"texture_{texture}" for texture in textures))
    if not mask.any():
        return dict.fromkeys(names, float("nan"))
    feature = optional("skimage.feature", "metrics")

    # gray levels 1 to 16 in the mask; 0, for what is outside, is struck from the matrix
    box = bounding_box(mask)
    levels = np.clip((channel[box] * _GRAY_LEVELS).astype(np.uint8), 0, _GRAY_LEVELS - 1) + 1
    levels[~mask[box]] = 0
    angles = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
    matrix = sum(
        feature.graycomatrix(plane, [1], angles, levels=_GRAY_LEVELS + 1, symmetric=True)[1:, 1:].astype(np.float64)
        for plane in levels
    )
    if matrix.sum() == 0:  # no two neighbours in any plane
        values = (np.nan,) * len(textures)
    else:
        values = (feature.graycoprops(matrix, texture).mean() for texture in textures)
    inside = channel[mask]
    return {key: float(value) for key, value in zip(names, (inside.mean(), inside.std(), *values), strict=True)}


def _centroid(mask: np.ndarray) -> np.ndarray:
    """(3,) in voxels, nan for an empty mask."""
    return np.argwhere(mask).mean(0) if mask.any() else np.full(3, np.nan)


def _distance(point_1: np.ndarray, point_2: np.ndarray, spacing: np.ndarray) -> float:
    return float(np.linalg.norm((point_1 - point_2) * spacing))


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")
