"""Slices and projections of one cell as pictures of the page."""

from collections.abc import Sequence

import numpy as np

from ..optional import optional
from ..visualization import PLANE_COLORS, composite_channels


_EDGE_PIXELS = 384  # of the longest edge of a volume


def cell_center(volume: np.ndarray) -> tuple[int, int, int]:
    """(z, y, x) of the voxel in the middle of the intensities of the first channel of a volume (M, D, H, W)."""
    total = volume[0].sum()
    if total == 0:
        return tuple(length // 2 for length in volume.shape[1:])
    sums = (volume[0].sum(axis=axes) for axes in ((1, 2), (0, 2), (0, 1)))
    return tuple(round(float(np.arange(len(line)) @ line / total)) for line in sums)


def slice_pictures(
    volume: np.ndarray, position: Sequence[int], voxel_size_um: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The XY, XZ and YZ slices through one voxel, with lines where they cut one another.

    Args:
        volume: (M, D, H, W) in [0, 1].
        position: (z, y, x), voxels.
        voxel_size_um: (z, y, x).

    Returns:
        Three (h, w, 3) uint8 pictures of one scale: x to the right and y down, x to the right and z down, y to the
        right and z down.
    """
    z, y, x = (int(min(max(0, index), length - 1)) for index, length in zip(position, volume.shape[1:], strict=True))
    planes = {"XY": volume[:, z], "XZ": volume[:, :, y], "YZ": volume[:, :, :, x]}
    cuts = {"XY": {"XZ": (0, y), "YZ": (1, x)}, "XZ": {"XY": (0, z), "YZ": (1, x)}, "YZ": {"XY": (0, z), "XZ": (1, y)}}
    pictures = []
    for (name, plane), shape in zip(planes.items(), _shapes(volume, voxel_size_um), strict=True):
        picture = _enlarge(plane, shape)
        for other, (axis, index) in cuts[name].items():
            color = np.array([int(PLANE_COLORS[other][i : i + 2], 16) for i in (1, 3, 5)])
            place = int((index + 0.5) / plane.shape[axis + 1] * shape[axis])
            line = picture[place] if axis == 0 else picture[:, place]
            line[:] = line // 2 + (color // 2).astype(np.uint8)
        pictures.append(picture)
    return tuple(pictures)


def projection_pictures(
    volume: np.ndarray, voxel_size_um: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The maximum of every ray along z, y and x, laid out as `slice_pictures`; arguments likewise."""
    planes = (volume.max(axis=axis) for axis in (1, 2, 3))
    return tuple(_enlarge(plane, shape) for plane, shape in zip(planes, _shapes(volume, voxel_size_um), strict=True))


def _shapes(volume: np.ndarray, voxel_size_um: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of the XY, XZ and YZ planes."""
    lengths = np.array(volume.shape[1:]) * np.array(voxel_size_um)
    depth, height, width = (max(1, round(_EDGE_PIXELS * length / lengths.max())) for length in lengths)
    return (height, width), (depth, width), (depth, height)


def _enlarge(plane: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(M, h, w) intensities as a picture of that shape."""
    image = optional("PIL.Image", "app")
    picture = image.fromarray(np.rint(composite_channels(plane) * 255).astype(np.uint8))
    return np.array(picture.resize(shape[::-1], image.Resampling.BILINEAR))
