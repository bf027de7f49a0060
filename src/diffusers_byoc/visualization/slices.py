"""Orthogonal slices through cells, one colour a channel, on black.

Every figure is one set of axes whose unit is the µm, so that slices of any size and voxel spacing share one scale and
one scale bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


#: Red, green, blue in [0, 1] of each channel; a further channel starts again at the first. The first two, cell and
#: nucleus, are complementary: they add up to white, and colour-blind readers can tell them apart.
CHANNEL_COLORS = (
    (0.00, 0.85, 0.60),  # cell: green-cyan
    (1.00, 0.15, 0.85),  # nucleus: magenta
    (1.00, 0.75, 0.10),  # amber
    (0.25, 0.50, 1.00),  # blue
    (1.00, 0.30, 0.20),  # red
)

_TEXT_COLOR = "#e6e6e6"
_FAINT_COLOR = "#8c8c8c"
_FRAME_COLOR = "#2b2b2b"
_DPI = 150


def composite_channels(image: np.ndarray, display_range: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Add the channels of an image up, each in its colour of `CHANNEL_COLORS`.

    Args:
        image: (M, H, W).
        display_range: the intensities shown as black and as the full colour; what lies outside is clipped.

    Returns:
        (H, W, 3) red, green, blue in [0, 1].
    """
    low, high = display_range
    if not low < high:
        raise ValueError(f"display_range must be (low, high) with low < high, got {display_range}.")
    intensity = np.clip((np.asarray(image, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    colors = np.asarray([CHANNEL_COLORS[index % len(CHANNEL_COLORS)] for index in range(len(intensity))], np.float32)
    return np.clip(np.einsum("mhw,mc->hwc", intensity, colors), 0.0, 1.0)


def orthogonal_slices(
    volumes: np.ndarray | torch.Tensor,
    channel_names: Sequence[str] = ("cell", "nucleus"),
    titles: Sequence[str] | None = None,
    voxel_size_um: float | Sequence[float] = 1.0,
    display_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """The XY, XZ and YZ slice through each cell, a column a cell and a row a plane.

    The planes meet in the intensity centre of the first channel; the ticks at a slice's edges show where the other two
    cut it.

    Args:
        volumes: (B, M, D, H, W) in [0, 1], D = z.
        channel_names: M names, for the legend.
        titles: B texts, one above each cell.
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        display_range: the intensities shown as black and as the full colour.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if the volumes are not (B, M, D, H, W) in [0, 1], or the names or titles do not match them.
        ImportError: if matplotlib is missing.
    """
    volumes = _check_volumes(volumes, "volumes", channel_names)
    if titles is not None and len(titles) != len(volumes):
        raise ValueError(f"titles must hold one text per cell: expected {len(volumes)}, got {len(titles)}.")
    spacing = _check_voxel_size(voxel_size_um)
    depth, height, width = (size * step for size, step in zip(volumes.shape[2:], spacing, strict=True))

    # 1. canvas: one column a cell, wide enough for the widest plane
    gutter = 0.03 * max(width, height, depth)
    column = max(width, height) + gutter
    tops = np.cumsum([0.0, height + gutter, depth + gutter])
    extent = max(width, height)
    margins = {"left": 0.22 * extent, "right": gutter, "top": 0.34 * extent, "bottom": gutter}
    if titles is None:
        margins["top"] = 0.20 * extent
    canvas = (len(volumes) * column - gutter, tops[-1] + depth)
    figure, axes, points = _black_canvas(canvas, margins, inches_per_um=1.6 / extent)

    # 2. slices
    for index, volume in enumerate(volumes):
        center = _intensity_center(volume[0])
        z, y, x = ((position + 0.5) * step for position, step in zip(center, spacing, strict=True))
        planes = _orthogonal_planes(volume, center)
        sizes = {"XY": (width, height), "XZ": (width, depth), "YZ": (height, depth)}
        cuts = {"XY": (x, y), "XZ": (x, z), "YZ": (y, z)}
        planes["YZ"] = planes["YZ"].swapaxes(1, 2)  # (M, D, H): here every plane but XY has z downwards
        for (name, plane), top in zip(planes.items(), tops, strict=True):
            left = index * column
            _draw_plane(axes, composite_channels(plane, display_range), left, top, sizes[name])
            _draw_cuts(axes, left, top, sizes[name], cuts[name], 0.05 * extent)
            if index == 0:
                axes.text(
                    -0.07 * extent,
                    top + sizes[name][1] / 2,
                    name,
                    color=_FAINT_COLOR,
                    size=points(0.085 * extent),
                    ha="right",
                    va="center",
                )
        if titles is not None:
            axes.text(
                index * column + width / 2,
                -0.06 * extent,
                titles[index],
                color=_TEXT_COLOR,
                size=points(0.085 * extent),
                ha="center",
                va="bottom",
            )

    # 3. legend and scale
    _draw_legend(axes, channel_names, 0.0, -margins["top"] + 0.10 * extent, points(0.085 * extent))
    _draw_scale_bar(axes, width - 0.06 * extent, height - 0.07 * extent, extent / 3, points(0.07 * extent))
    return figure


def compare_volumes(
    volumes: Mapping[str, np.ndarray | torch.Tensor],
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    display_range: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Sets of cells under one another, each cell as a mosaic of its XY slice, its XZ slice below and its YZ beside it.

    All sets share the display range and the scale, so that a difference in the picture is one in the data.

    Args:
        volumes: heading -> (B, M, D, H, W) in [0, 1], one row per entry; B and (D, H, W) may differ between entries.
        channel_names: M names, for the legend.
        voxel_size_um: voxel edge in µm, one number or (z, y, x), the same for all entries.
        display_range: the intensities shown as black and as the full colour.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if there is no entry, or one is not (B, M, D, H, W) in [0, 1] or does not match the names.
        ImportError: if matplotlib is missing.
    """
    if not isinstance(volumes, Mapping) or not volumes:
        got = "no entry" if isinstance(volumes, Mapping) else type(volumes).__name__
        raise ValueError(f'volumes must map headings to volumes, got {got}; pass {{"generated": volumes}}.')
    sets = {name: _check_volumes(batch, f"volumes[{name!r}]", channel_names) for name, batch in volumes.items()}
    spacing = _check_voxel_size(voxel_size_um)
    depth, height, width = (
        max(batch.shape[axis] for batch in sets.values()) * step for axis, step in zip((2, 3, 4), spacing, strict=True)
    )

    # 1. canvas: as many columns as the largest set has cells
    extent = max(width + depth, height + depth)
    seam, gutter, heading = 0.012 * extent, 0.07 * extent, 0.17 * extent
    tile_width, tile_height = width + seam + depth, height + seam + depth
    columns = max(len(batch) for batch in sets.values())
    row = heading + tile_height + gutter
    canvas = (columns * (tile_width + gutter) - gutter, len(sets) * row - gutter)
    margins = dict.fromkeys(("left", "right", "bottom"), 0.06 * extent) | {"top": 0.15 * extent}
    figure, axes, points = _black_canvas(canvas, margins, inches_per_um=2.2 / extent)

    # 2. mosaics
    for row_index, (name, batch) in enumerate(sets.items()):
        top = row_index * row + heading
        axes.text(0.0, top - 0.05 * extent, name, color=_TEXT_COLOR, size=points(0.085 * extent), va="bottom")
        for index, volume in enumerate(batch):
            left = index * (tile_width + gutter)
            d, h, w = (size * step for size, step in zip(volume.shape[1:], spacing, strict=True))
            planes = _orthogonal_planes(volume, _intensity_center(volume[0]))
            corners = {"XY": (left, top), "XZ": (left, top + h + seam), "YZ": (left + w + seam, top)}
            sizes = {"XY": (w, h), "XZ": (w, d), "YZ": (d, h)}
            for plane_name, plane in planes.items():
                _draw_plane(axes, composite_channels(plane, display_range), *corners[plane_name], sizes[plane_name])
                if index == 0:
                    x, y = corners[plane_name]
                    axes.text(
                        x + 0.02 * extent,
                        y + 0.02 * extent,
                        plane_name,
                        color=_FAINT_COLOR,
                        size=points(0.05 * extent),
                        ha="left",
                        va="top",
                    )

    # 3. legend above the first heading, scale bar in the free corner of the first mosaic
    _draw_legend(axes, channel_names, 0.0, -0.05 * extent, points(0.07 * extent))
    _draw_scale_bar(
        axes, tile_width - 0.05 * extent, heading + tile_height - 0.03 * extent, 0.5 * depth, points(0.06 * extent)
    )
    return figure


def write_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure of this module as PNG; missing folders are made.

    Args:
        figure: from `orthogonal_slices` or `compare_volumes`.
        path: ends in ``.png``.

    Returns:
        The path.

    Raises:
        ValueError: if the path has another ending.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"expected a path that ends in .png, got {str(path)!r}; call figure.savefig for other formats."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=figure.dpi, facecolor=figure.get_facecolor())
    return path


# Input


def _check_volumes(volumes: np.ndarray | torch.Tensor, name: str, channel_names: Sequence[str]) -> np.ndarray:
    """(B, M, D, H, W) in [0, 1] as float32 NumPy, or a ValueError."""
    if hasattr(volumes, "detach"):
        volumes = volumes.detach().float().cpu().numpy()
    volumes = np.asarray(volumes, dtype=np.float32)
    if volumes.ndim != 5 or 0 in volumes.shape:
        hint = "; add the batch axis with volume[None]" if volumes.ndim == 4 else ""
        raise ValueError(f"{name} must be (B, M, D, H, W) with at least one cell, got shape {volumes.shape}{hint}.")
    if volumes.shape[1] != len(channel_names):
        raise ValueError(
            f"{name} has {volumes.shape[1]} channels, but channel_names holds {len(channel_names)}: "
            f"{tuple(channel_names)}; pass one name per channel."
        )
    low, high = volumes.min(), volumes.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise ValueError(
            f"{name} must lie in [0, 1], got [{low:g}, {high:g}]; map volumes in [-1, 1] with (volumes + 1) / 2."
        )
    return volumes


def _check_voxel_size(voxel_size_um: float | Sequence[float]) -> tuple[float, float, float]:
    """(z, y, x) voxel edges in µm, or a ValueError."""
    spacing = np.atleast_1d(np.asarray(voxel_size_um, dtype=float))
    if spacing.shape not in ((1,), (3,)) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ValueError(f"voxel_size_um must be one positive number or (z, y, x) of them, got {voxel_size_um!r}.")
    return tuple(float(step) for step in np.broadcast_to(spacing, (3,)))


def _intensity_center(channel: np.ndarray) -> tuple[int, int, int]:
    """The voxel (z, y, x) at the intensity centre of a (D, H, W) channel; the middle of an even one.

    Only what exceeds the mean weighs, so that background does not pull the centre to the middle of the volume.
    """
    weights = np.clip(channel - channel.mean(), 0.0, None).astype(np.float64)
    total = weights.sum()
    if total == 0:
        return tuple(size // 2 for size in channel.shape)
    marginals = (weights.sum(axis=axes) for axes in ((1, 2), (0, 2), (0, 1)))
    return tuple(int(round(float(np.arange(len(m)) @ m / total))) for m in marginals)


def _orthogonal_planes(volume: np.ndarray, center: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """(M, D, H, W) -> {"XY": (M, H, W), "XZ": (M, D, W), "YZ": (M, H, D)}, cut at the voxel (z, y, x)."""
    z, y, x = center
    return {"XY": volume[:, z], "XZ": volume[:, :, y], "YZ": volume[:, :, :, x].swapaxes(1, 2)}


# Drawing, in µm from the top left


def _black_canvas(
    size: tuple[float, float], margins: Mapping[str, float], inches_per_um: float
) -> tuple[Figure, Axes, Callable[[float], float]]:
    """A black figure, its one set of axes, and the function from a length in µm to a font size in points."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib; run: pip install "diffusers_byoc[viz]"') from error

    width = size[0] + margins["left"] + margins["right"]
    height = size[1] + margins["top"] + margins["bottom"]
    # a picture of very many cells keeps to what image viewers open
    inches_per_um = min(inches_per_um, 200 / max(width, height))
    figure = Figure(figsize=(width * inches_per_um, height * inches_per_um), dpi=_DPI, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), facecolor="black")
    axes.set_xlim(-margins["left"], size[0] + margins["right"])
    axes.set_ylim(size[1] + margins["bottom"], -margins["top"])
    axes.set_aspect("auto")
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    return figure, axes, lambda length_um: length_um * inches_per_um * 72


def _draw_plane(axes: Axes, colors: np.ndarray, left: float, top: float, size: tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    extent = (left, left + size[0], top + size[1], top)
    axes.imshow(colors, extent=extent, aspect="auto", interpolation="bilinear")
    axes.add_patch(Rectangle((left, top), *size, fill=False, edgecolor=_FRAME_COLOR, linewidth=0.6))


def _draw_cuts(
    axes: Axes, left: float, top: float, size: tuple[float, float], cut: tuple[float, float], length: float
) -> None:
    """Ticks on the four edges of a slice, where the two other planes cut it."""
    right, bottom = left + size[0], top + size[1]
    x, y = left + cut[0], top + cut[1]
    segments = [
        ((x, x), (top, top + length)),
        ((x, x), (bottom - length, bottom)),
        ((left, left + length), (y, y)),
        ((right - length, right), (y, y)),
    ]
    for xs, ys in segments:
        axes.plot(xs, ys, color=_FAINT_COLOR, linewidth=0.8, solid_capstyle="butt")


def _draw_legend(axes: Axes, channel_names: Sequence[str], left: float, middle: float, size: float) -> None:
    """The channel names in their colours, on one line."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    colors = [CHANNEL_COLORS[index % len(CHANNEL_COLORS)] for index in range(len(channel_names))]
    words = [
        TextArea(name, textprops={"color": color, "size": size, "weight": "bold"})
        for name, color in zip(channel_names, colors, strict=True)
    ]
    line = HPacker(children=words, pad=0, sep=size)
    axes.add_artist(
        AnchoredOffsetbox(
            loc="center left",
            child=line,
            pad=0,
            borderpad=0,
            frameon=False,
            bbox_to_anchor=(left, middle),
            bbox_transform=axes.transData,
        )
    )


def _draw_scale_bar(axes: Axes, right: float, bottom: float, longest: float, size: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten µm, no longer than `longest`, its length above it."""
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= longest)
    axes.plot((right - length, right), (bottom, bottom), color="white", linewidth=2.5, solid_capstyle="butt")
    axes.annotate(
        f"{length:g} µm",
        (right - length / 2, bottom),
        xytext=(0, 4),
        textcoords="offset points",
        color="white",
        size=size,
        ha="center",
        va="bottom",
    )
