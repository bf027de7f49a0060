"""Cells as surfaces: the cell translucent, the nucleus inside it (BYOC, Figures 1, 5 and 8).

Parallel rays are cast through the volume and stopped where a channel crosses its threshold, so that nested translucent
surfaces are in the right order at every pixel, without OpenGL or a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from ..volumes import voxel_size_triple
from .canvas import channel_colors, check_columns, check_sets, check_texts, check_volumes, draw_tiles


if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure


#: A channel whose intensities span less than this, on the scale of [0, 1], is empty and has no surface of its own:
#: Otsu's threshold would split any noise in two.
MIN_SURFACE_RANGE = 0.05

# The volume is smoothed before it is cut, by this standard deviation in voxels: camera noise makes rough surfaces.
_SMOOTHING_VOXELS = 0.8

_LIGHT = np.array([-0.45, -0.6, -0.65])  # towards the light, in (right, down, into the picture)
_AMBIENT, _DIFFUSE, _SPECULAR, _SHININESS = 0.30, 0.70, 0.35, 25
_SUPERSAMPLING = 2


def surface_library(
    volumes: np.ndarray | torch.Tensor | Mapping[str, np.ndarray | torch.Tensor],
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
    opacities: Sequence[float] | None = None,
    azimuth_deg: float = 30.0,
    elevation_deg: float = 50.0,
    titles: Sequence[str] | None = None,
    num_columns: int | None = None,
) -> Figure:
    """The surfaces of cells, side by side: the cell translucent, the nucleus inside (BYOC, Figure 5).

    Args:
        volumes: (M, D, H, W) or (B, M, D, H, W) in [0, 1]; or heading -> such a batch, a block of cells a heading.
        channel_names: M names, for the legend.
        voxel_size_um: voxel edge in µm, one number or (z, y, x), the same for all cells.
        thresholds: M intensities in (0, 1) at which the surfaces lie; None, for all or for one, is Otsu's threshold of
            each volume's channel.
        opacities: M numbers in (0, 1]; None is 0.2 for the first channel, which holds the others, and 1 for those.
        azimuth_deg: how far the cell is turned about z.
        elevation_deg: from where it is seen: 90 from above, with x to the right and y down as in an XY slice; 0 from
            the side, with x to the right and z down as in an XZ slice.
        titles: B texts for the pictures' corners; only without headings.
        num_columns: cells in a row; None chooses by their number.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas. All cells have one scale.

    Raises:
        ValueError: if the volumes are of another shape or range, or another argument does not match them.
        ImportError: if matplotlib or scikit-image is missing.
    """
    sets = check_sets(volumes, channel_names)
    check_columns(num_columns)
    if titles is not None:
        if isinstance(volumes, Mapping):
            raise ValueError("Expected titles for one batch of volumes, got headings as well. Leave one of both out.")
        check_texts(titles, "titles", len(sets[""]))
    return _draw_surfaces(
        sets,
        [(azimuth_deg, elevation_deg)],
        channel_names,
        voxel_size_um,
        thresholds,
        opacities,
        num_columns,
        None if titles is None else {"": list(titles)},
    )


def surface_views(
    volumes: np.ndarray | torch.Tensor | Mapping[str, np.ndarray | torch.Tensor],
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
    opacities: Sequence[float] | None = None,
    views_deg: Sequence[tuple[float, float]] = ((0, 90), (0, 45), (60, 30), (120, 30), (0, 0), (90, 0)),
) -> Figure:
    """The surfaces of cells from several sides, a row a cell and a column a view (BYOC, Figure 8).

    Args:
        volumes: (M, D, H, W) or (B, M, D, H, W) in [0, 1]; or heading -> such a batch, a block of rows a heading.
        channel_names: M names, for the legend.
        voxel_size_um: voxel edge in µm, one number or (z, y, x), the same for all cells.
        thresholds: as in `surface_library`.
        opacities: as in `surface_library`.
        views_deg: (azimuth, elevation) of each column, as in `surface_library`.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas. All cells have one scale.

    Raises:
        ValueError: if the volumes are of another shape or range, or another argument does not match them.
        ImportError: if matplotlib or scikit-image is missing.
    """
    sets = check_sets(volumes, channel_names)
    views = np.asarray(views_deg, dtype=float)
    if views.ndim != 2 or views.shape[1] != 2 or len(views) == 0:
        raise ValueError(f"Expected views_deg of (azimuth, elevation) pairs, got {views_deg!r}. Give at least one.")
    captions = [f"az {azimuth:g}°  el {elevation:g}°" for azimuth, elevation in views]
    return _draw_surfaces(
        sets,
        [tuple(view) for view in views],
        channel_names,
        voxel_size_um,
        thresholds,
        opacities,
        len(views),
        {name: captions * len(batch) for name, batch in sets.items()},
    )


def render_surfaces(
    volume: np.ndarray | torch.Tensor,
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
    opacities: Sequence[float] | None = None,
    azimuth_deg: float = 30.0,
    elevation_deg: float = 50.0,
    field_um: float | None = None,
    size_pixels: int = 256,
) -> np.ndarray:
    """One picture of one volume's surfaces, for figures and films of one's own.

    Args:
        volume: (M, D, H, W) in [0, 1].
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        thresholds: as in `surface_library`.
        opacities: as in `surface_library`.
        azimuth_deg: as in `surface_library`.
        elevation_deg: as in `surface_library`.
        field_um: edge of the square that is seen, whose middle is the middle of the surfaces; None takes the smallest
            that holds them in every view.
        size_pixels: edge of the picture.

    Returns:
        (size_pixels, size_pixels, 3) red, green, blue in [0, 1] on black; black altogether where no channel has a
        surface.

    Raises:
        ValueError: if the volume is of another shape or range, or another argument does not match it.
        ImportError: if scikit-image is missing.
    """
    volume = np.asarray(volume.detach().float().cpu() if hasattr(volume, "detach") else volume, np.float32)
    if volume.ndim != 4:
        raise ValueError(f"Expected a volume (M, D, H, W), got shape {volume.shape}. Give one cell at a time.")
    volume = check_volumes(volume, "volume", [str(index) for index in range(len(volume))])[0]
    opacities = check_opacities(opacities, len(volume))
    if size_pixels < 1:
        raise ValueError(f"Expected size_pixels of at least 1, got {size_pixels}. Raise it.")
    if field_um is not None and not 0 < field_um < np.inf:
        raise ValueError(f"Expected field_um as a positive length in µm, got {field_um}. Leave it out to see all.")
    surfaces = Surfaces(volume, voxel_size_triple(voxel_size_um), check_thresholds(thresholds, len(volume)))
    return surfaces.render(opacities, azimuth_deg, elevation_deg, field_um or surfaces.field_um, size_pixels)


class Surfaces:
    """The smoothed channels of a volume with the levels at which they are cut, and the ball that holds the cuts."""

    def __init__(
        self, volume: np.ndarray, spacing: tuple[float, float, float], thresholds: Sequence[float | None]
    ) -> None:
        gaussian_filter = optional("scipy.ndimage", "viz").gaussian_filter
        threshold_otsu = optional("skimage.filters", "viz").threshold_otsu
        self.spacing = np.asarray(spacing)
        sigma = _SMOOTHING_VOXELS * min(spacing) / self.spacing
        smoothed = np.stack([gaussian_filter(channel, sigma, mode="nearest") for channel in volume])
        self.levels = []
        for channel, smooth, threshold in zip(volume, smoothed, thresholds, strict=True):
            if threshold is None and np.ptp(channel) >= MIN_SURFACE_RANGE:
                threshold = float(threshold_otsu(smooth))
            self.levels.append(np.inf if threshold is None else threshold)
        # a border of zeros closes the surface of a cell that the volume's edge cuts
        self.channels = np.pad(smoothed, ((0, 0), (1, 1), (1, 1), (1, 1)))

        inside = np.any([c > level for c, level in zip(self.channels, self.levels, strict=True)], axis=0)
        points = np.argwhere(inside) * self.spacing
        if len(points) == 0:
            points = np.array([np.zeros(3), np.asarray(inside.shape) * self.spacing])
        self.center_um = (points.min(axis=0) + points.max(axis=0)) / 2
        radius = np.linalg.norm(points - self.center_um, axis=1).max() + max(spacing)
        self.field_um = float(2.04 * radius)

    def render(
        self, opacities: Sequence[float], azimuth_deg: float, elevation_deg: float, field_um: float, size: int
    ) -> np.ndarray:
        """(size, size, 3) red, green, blue on black."""
        # 1. camera: (right, down, into the picture) in (z, y, x)
        azimuth, elevation = np.deg2rad(azimuth_deg), np.deg2rad(elevation_deg)
        right = np.array([0.0, np.sin(azimuth), np.cos(azimuth)])
        across = np.array([0.0, np.cos(azimuth), -np.sin(azimuth)])
        up = np.array([1.0, 0.0, 0.0])
        down = np.sin(elevation) * across + np.cos(elevation) * up
        forward = np.sin(elevation) * up - np.cos(elevation) * across
        camera = np.stack([right, down, forward])

        # 2. rays: where they cross the surfaces
        rays = size * _SUPERSAMPLING
        hits = [
            self._crossings(channel, level, camera, field_um, rays)
            for channel, level in zip(self.channels, self.levels, strict=True)
        ]
        colors = [
            _shade(normals, color, opacity)
            for (_, _, normals), color, opacity in zip(hits, channel_colors(len(hits)), opacities, strict=True)
        ]
        pixels = np.concatenate([pixel for pixel, _, _ in hits])
        depths = np.concatenate([depth for _, depth, _ in hits])
        colors = np.concatenate(colors)

        # 3. front to back: the k-th crossing of every ray at once
        order = np.lexsort((depths, pixels))
        pixels, colors = pixels[order], colors[order]
        rank = np.arange(len(pixels)) - np.searchsorted(pixels, pixels)
        image = np.zeros((rays * rays, 3), np.float32)
        transmitted = np.ones((rays * rays, 1), np.float32)
        for k in range(int(rank.max(initial=-1)) + 1):
            hit, color = pixels[rank == k], colors[rank == k]
            image[hit] += transmitted[hit] * color[:, 3:] * color[:, :3]
            transmitted[hit] *= 1.0 - color[:, 3:]
        image = image.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING, 3).mean(axis=(1, 3))
        return np.clip(image, 0.0, 1.0)

    def _crossings(
        self, channel: np.ndarray, level: float, camera: np.ndarray, field_um: float, rays: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rays (N,), depths in µm (N,) and unit normals (N, 3), outward in camera axes, of a channel's surface."""
        from scipy.ndimage import affine_transform, map_coordinates

        nothing = np.zeros(0, int), np.zeros(0), np.zeros((0, 3))
        if not channel.max() > level:
            return nothing
        # a grid of samples (down, right, into the picture) around what is inside, within the picture
        steps = np.array([field_um / rays, field_um / rays, self.spacing.min()])
        axes = camera[[1, 0, 2]]
        seen = (np.argwhere(channel > level) * self.spacing - self.center_um) @ axes.T
        margin = self.spacing.max()
        middle = np.array([(rays - 1) / 2, (rays - 1) / 2, 0.0])
        first = np.floor((seen.min(axis=0) - margin) / steps + middle).astype(int)
        last = np.ceil((seen.max(axis=0) + margin) / steps + middle).astype(int)
        first[:2], last[:2] = np.maximum(first[:2], 0), np.minimum(last[:2], rays - 1)
        if (last < first).any():
            return nothing
        matrix = (axes * steps[:, None]).T / self.spacing[:, None]  # sample -> voxel (z, y, x)
        offset = self.center_um / self.spacing + matrix @ (first - middle)
        samples = affine_transform(channel, matrix, offset, tuple(last - first + 1), order=1, mode="constant")

        inside = samples > level
        row, column, index = np.nonzero(inside[..., 1:] != inside[..., :-1])
        before, after = samples[row, column, index], samples[row, column, index + 1]
        position = index + (level - before) / (after - before)
        points = matrix @ np.stack([row, column, position]) + offset[:, None]
        gradient = np.stack(
            [
                map_coordinates(slope / length, points, order=1)
                for slope, length in zip(np.gradient(channel), self.spacing, strict=True)
            ],
            axis=1,
        )
        normals = -gradient @ camera.T
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
        return (row + first[0]) * rays + column + first[1], (position + first[2]) * steps[2], normals


def _shade(normals: np.ndarray, color: np.ndarray, opacity: float) -> np.ndarray:
    """(N, 4) red, green, blue, opacity. A translucent surface is denser where it is seen edge on, as glass is."""
    light = _LIGHT / np.linalg.norm(_LIGHT)
    halfway = light + np.array([0.0, 0.0, -1.0])
    halfway /= np.linalg.norm(halfway)
    facing = normals * np.where(normals[:, 2:] > 0, -1.0, 1.0)  # the back of a surface is lit as its front
    diffuse = np.clip(facing @ light, 0.0, 1.0)[:, None]
    specular = np.clip(facing @ halfway, 0.0, 1.0)[:, None] ** _SHININESS
    edge = (1.0 - np.abs(normals[:, 2:])) ** 2
    glow = (1.0 - opacity) * (0.25 + 0.5 * edge)
    shaded = np.clip(color * (_AMBIENT + _DIFFUSE * diffuse + glow) + _SPECULAR * specular, 0.0, 1.0)
    return np.concatenate([shaded, opacity + (1.0 - opacity) * 0.85 * edge], axis=1).astype(np.float32)


def _draw_surfaces(
    sets: Mapping[str, np.ndarray],
    views: Sequence[tuple[float, float]],
    channel_names: Sequence[str],
    voxel_size_um: float | Sequence[float],
    thresholds: Sequence[float | None] | None,
    opacities: Sequence[float] | None,
    num_columns: int | None,
    captions: Mapping[str, Sequence[str]] | None,
) -> Figure:
    """A tile for each view of each cell, all of one scale."""
    spacing = voxel_size_triple(voxel_size_um)
    thresholds = check_thresholds(thresholds, len(channel_names))
    opacities = check_opacities(opacities, len(channel_names))
    surfaces = {name: [Surfaces(volume, spacing, thresholds) for volume in batch] for name, batch in sets.items()}
    field_um = max(cell.field_um for cells in surfaces.values() for cell in cells)
    images = {
        name: [cell.render(opacities, *view, field_um, size=240) for cell in cells for view in views]
        for name, cells in surfaces.items()
    }
    return draw_tiles(
        images,
        dict.fromkeys(images, (field_um, field_um)),
        channel_names,
        num_columns,
        captions,
        inches_per_tile=1.6,
    )


def check_thresholds(thresholds: Sequence[float | None] | None, num_channels: int) -> Sequence[float | None]:
    if thresholds is None:
        return [None] * num_channels
    if np.ndim(thresholds) != 1 or len(thresholds) != num_channels:
        raise ValueError(f"Expected {num_channels} thresholds, one or None a channel, got {thresholds!r}. Match them.")
    if not all(threshold is None or 0 < threshold < 1 for threshold in thresholds):
        raise ValueError(f"Expected thresholds between 0 and 1, got {thresholds!r}. Correct them.")
    return thresholds


def check_opacities(opacities: Sequence[float] | None, num_channels: int) -> Sequence[float]:
    if opacities is None:
        return [1.0] if num_channels == 1 else [0.2, *[1.0] * (num_channels - 1)]
    if np.ndim(opacities) != 1 or len(opacities) != num_channels:
        raise ValueError(f"Expected {num_channels} opacities, one a channel, got {opacities!r}. Match them.")
    if not all(0 < opacity <= 1 for opacity in opacities):
        raise ValueError(f"Expected opacities in (0, 1], got {opacities!r}. Correct them.")
    return opacities
