"""Orthogonal slices through cells, one colour a channel, on black (BYOC, Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..volumes import voxel_size_triple
from .canvas import (
    FAINT_COLOR,
    FRAME_COLOR,
    TEXT_COLOR,
    black_canvas,
    check_columns,
    check_texts,
    check_volumes,
    composite_channels,
    draw_legend,
    draw_plane,
    draw_scale_bar,
    legend_line,
)


if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


#: The colour of each slice: of its frame, and of the line where it cuts the other two. As in BYOC, Figure 4: the plane
#: across x yellow, across y red, across z blue, in tones that colour-blind readers can tell apart.
PLANE_COLORS = {"XY": "#4d9dff", "XZ": "#ff5533", "YZ": "#ffe14d"}


def orthogonal_slices(
    volumes: np.ndarray | torch.Tensor,
    channel_names: Sequence[str] = ("cell", "nucleus"),
    titles: Sequence[str] | None = None,
    voxel_size_um: float | Sequence[float] = 1.0,
    display_range: tuple[float, float] = (0.0, 1.0),
    show_planes: bool = False,
) -> Figure:
    """The XY, XZ and YZ slice through each cell, a column a cell and a row a plane.

    The planes meet in the intensity centre of the first channel; the ticks at a slice's edges show where the other two
    cut it, each in the colour of its plane (`PLANE_COLORS`).

    Args:
        volumes: (M, D, H, W) or (B, M, D, H, W) in [0, 1], D = z.
        channel_names: M names, for the legend.
        titles: B texts, one above each cell.
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        display_range: the intensities shown as black and as the full colour.
        show_planes: draw the ticks as lines through the whole slice.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if the volumes are of another shape or range, or the names or titles do not match them.
        ImportError: if matplotlib is missing.
    """
    volumes = check_volumes(volumes, "volumes", channel_names)
    check_texts(titles, "titles", len(volumes))
    spacing = voxel_size_triple(voxel_size_um)
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
    figure, axes, points = black_canvas(
        canvas, margins, inches_per_um=1.6 / extent, lines=[(legend_line(channel_names), 0.085 * extent)]
    )

    # 2. slices
    for index, volume in enumerate(volumes):
        center = _intensity_center(volume[0])
        z, y, x = ((position + 0.5) * step for position, step in zip(center, spacing, strict=True))
        planes = _orthogonal_planes(volume, center)
        sizes = {"XY": (width, height), "XZ": (width, depth), "YZ": (height, depth)}
        cuts = {"XY": {"YZ": x, "XZ": y}, "XZ": {"YZ": x, "XY": z}, "YZ": {"XZ": y, "XY": z}}
        planes["YZ"] = planes["YZ"].swapaxes(1, 2)  # (M, D, H): here every plane but XY has z downwards
        for (name, plane), top in zip(planes.items(), tops, strict=True):
            left = index * column
            frame = PLANE_COLORS[name] if show_planes else FRAME_COLOR
            draw_plane(axes, composite_channels(plane, display_range), left, top, sizes[name], frame)
            _draw_cuts(axes, left, top, sizes[name], cuts[name], None if show_planes else 0.05 * extent)
            if index == 0:
                axes.text(
                    -0.07 * extent,
                    top + sizes[name][1] / 2,
                    name,
                    color=PLANE_COLORS[name],
                    size=points(0.085 * extent),
                    ha="right",
                    va="center",
                )
        if titles is not None:
            axes.text(
                index * column + width / 2,
                -0.06 * extent,
                titles[index],
                color=TEXT_COLOR,
                size=points(0.085 * extent),
                ha="center",
                va="bottom",
            )

    # 3. legend and scale
    draw_legend(axes, channel_names, 0.0, -margins["top"] + 0.10 * extent, points(0.085 * extent))
    draw_scale_bar(axes, width - 0.06 * extent, height - 0.07 * extent, extent / 3, points(0.07 * extent))
    return figure


def compare_volumes(
    volumes: Mapping[str, np.ndarray | torch.Tensor],
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    display_range: tuple[float, float] = (0.0, 1.0),
    show_planes: bool = False,
) -> Figure:
    """Sets of cells under one another, each cell as a mosaic of its XY slice, its XZ slice below and its YZ beside it.

    All sets share the display range and the scale, so that a difference in the picture is one in the data.

    Args:
        volumes: heading -> (M, D, H, W) or (B, M, D, H, W) in [0, 1], one row per entry; B and (D, H, W) may differ
            between entries.
        channel_names: M names, for the legend.
        voxel_size_um: voxel edge in µm, one number or (z, y, x), the same for all entries.
        display_range: the intensities shown as black and as the full colour.
        show_planes: frame each slice in the colour of its plane and draw, in the same colour, the lines where it cuts
            the two others (BYOC, Figure 4B).

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if there is no entry, or one is of another shape or range or does not match the names.
        ImportError: if matplotlib is missing.
    """
    if not isinstance(volumes, Mapping) or not volumes:
        got = "no entry" if isinstance(volumes, Mapping) else type(volumes).__name__
        raise ValueError(f'Expected volumes to map headings to volumes, got {got}. Give {{"generated": volumes}}.')
    sets = {name: check_volumes(batch, f"volumes[{name!r}]", channel_names) for name, batch in volumes.items()}
    centers = {name: [_intensity_center(volume[0]) for volume in batch] for name, batch in sets.items()}
    return _draw_mosaics([sets], [centers], None, channel_names, voxel_size_um, display_range, show_planes)


def compare_pairs(
    samples: np.ndarray | torch.Tensor,
    partners: np.ndarray | torch.Tensor,
    titles: Sequence[str] | None = None,
    headings: tuple[str, str] = ("generated", "nearest training cell"),
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    display_range: tuple[float, float] = (0.0, 1.0),
    num_columns: int | None = None,
) -> Figure:
    """Each sample above its partner, cut at the same planes: does the generator repeat its training cells?

    The planes are those through the sample's intensity centre, for the partner as well: a memorised cell looks the
    same in all three.

    Args:
        samples: (M, D, H, W) or (B, M, D, H, W) in [0, 1].
        partners: the same shape; the i-th belongs to the i-th sample.
        titles: B texts, one above each sample, such as the distance to its partner.
        headings: of the samples' rows and of the partners' rows.
        channel_names: M names, for the legend.
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        display_range: the intensities shown as black and as the full colour.
        num_columns: pairs in a row; None takes up to 8.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if the two differ in shape, or are of another shape or range, or the texts do not match them.
        ImportError: if matplotlib is missing.
    """
    samples = check_volumes(samples, "samples", channel_names)
    partners = check_volumes(partners, "partners", channel_names)
    if samples.shape != partners.shape:
        raise ValueError(
            f"Expected one partner per sample and of its shape, got samples {samples.shape} and partners "
            f"{partners.shape}. Give training_cells[indices_of_the_nearest]."
        )
    check_texts(titles, "titles", len(samples))
    check_columns(num_columns)
    if isinstance(headings, str) or len(headings) != 2 or headings[0] == headings[1]:
        raise ValueError(f"Expected two different headings, got {headings!r}. Rename one.")

    columns = num_columns or min(8, len(samples))
    groups, centers, texts = [], [], []
    for start in range(0, len(samples), columns):
        part = slice(start, start + columns)
        groups.append(dict(zip(headings, (samples[part], partners[part]), strict=True)))
        centers.append(dict.fromkeys(headings, [_intensity_center(volume[0]) for volume in samples[part]]))
        texts.append(None if titles is None else titles[part])
    return _draw_mosaics(groups, centers, texts, channel_names, voxel_size_um, display_range, False)


def _draw_mosaics(
    groups: Sequence[Mapping[str, np.ndarray]],
    centers: Sequence[Mapping[str, Sequence[tuple[int, int, int]]]],
    titles: Sequence[Sequence[str] | None] | None,
    channel_names: Sequence[str],
    voxel_size_um: float | Sequence[float],
    display_range: tuple[float, float],
    show_planes: bool,
) -> Figure:
    """Groups of rows, a row a heading, each cell cut at its centre; titles stand above a group's first row."""
    spacing = voxel_size_triple(voxel_size_um)
    batches = [batch for group in groups for batch in group.values()]
    depth, height, width = (
        max(batch.shape[axis] for batch in batches) * step for axis, step in zip((2, 3, 4), spacing, strict=True)
    )

    # 1. canvas: as many columns as the largest row has cells
    extent = max(width + depth, height + depth)
    seam, gutter, heading = 0.012 * extent, 0.07 * extent, 0.17 * extent
    tile_width, tile_height = width + seam + depth, height + seam + depth
    columns = max(len(batch) for batch in batches)
    row = heading + tile_height + gutter
    has_titles = titles is not None and titles[0] is not None
    title_height = 0.10 * extent if has_titles else 0.0
    canvas = (
        columns * (tile_width + gutter) - gutter,
        len(batches) * row - gutter + len(groups) * title_height,
    )
    margins = dict.fromkeys(("left", "right", "bottom"), 0.06 * extent) | {"top": 0.15 * extent}
    lines = [(legend_line(channel_names), 0.07 * extent), *((name, 0.085 * extent) for name in groups[0])]
    figure, axes, points = black_canvas(canvas, margins, inches_per_um=2.2 / extent, lines=lines)

    # 2. mosaics
    top = 0.0
    for group_index, group in enumerate(groups):
        for row_index, (name, batch) in enumerate(group.items()):
            axes.text(
                0.0,
                top + heading - 0.05 * extent,
                name,
                color=TEXT_COLOR,
                size=points(0.085 * extent),
                va="bottom",
            )
            top += heading
            if row_index == 0 and has_titles:
                top += title_height
                for index, title in enumerate(titles[group_index]):
                    axes.text(
                        index * (tile_width + gutter),
                        top - 0.035 * extent,
                        title,
                        color=FAINT_COLOR,
                        size=points(0.065 * extent),
                        va="bottom",
                    )
            for index, volume in enumerate(batch):
                _draw_mosaic(
                    axes,
                    volume,
                    centers[group_index][name][index],
                    index * (tile_width + gutter),
                    top,
                    seam,
                    spacing,
                    display_range,
                    show_planes,
                    points(0.05 * extent) if index == 0 else None,
                )
            top += tile_height + gutter

    # 3. legend above the first heading, scale bar in the free corner of the first mosaic
    draw_legend(axes, channel_names, 0.0, -0.05 * extent, points(0.07 * extent))
    draw_scale_bar(
        axes,
        tile_width - 0.05 * extent,
        heading + title_height + tile_height - 0.03 * extent,
        0.5 * depth,
        points(0.06 * extent),
    )
    return figure


def _draw_mosaic(
    axes: Axes,
    volume: np.ndarray,
    center: tuple[int, int, int],
    left: float,
    top: float,
    seam: float,
    spacing: tuple[float, float, float],
    display_range: tuple[float, float],
    show_planes: bool,
    name_size: float | None,
) -> None:
    """XY, XZ below it, YZ beside it; the planes' names in the corners where they have a size."""
    depth, height, width = (size * step for size, step in zip(volume.shape[1:], spacing, strict=True))
    z, y, x = ((position + 0.5) * step for position, step in zip(center, spacing, strict=True))
    corners = {"XY": (left, top), "XZ": (left, top + height + seam), "YZ": (left + width + seam, top)}
    sizes = {"XY": (width, height), "XZ": (width, depth), "YZ": (depth, height)}
    cuts = {"XY": {"YZ": x, "XZ": y}, "XZ": {"YZ": x, "XY": z}, "YZ": {"XY": z, "XZ": y}}
    for name, plane in _orthogonal_planes(volume, center).items():
        frame = PLANE_COLORS[name] if show_planes else FRAME_COLOR
        draw_plane(axes, composite_channels(plane, display_range), *corners[name], sizes[name], frame)
        if show_planes:
            _draw_cuts(axes, *corners[name], sizes[name], cuts[name])
        if name_size is not None:
            axes.text(
                corners[name][0] + 0.02 * (width + depth),
                corners[name][1] + 0.02 * (width + depth),
                name,
                color=PLANE_COLORS[name] if show_planes else FAINT_COLOR,
                size=name_size,
                ha="left",
                va="top",
            )


def _draw_cuts(
    axes: Axes,
    left: float,
    top: float,
    size: tuple[float, float],
    cuts: Mapping[str, float],
    tick_length: float | None = None,
) -> None:
    """Where two other planes cut a slice: the first across, the second down; whole lines, or ticks on the edges."""
    right, bottom = left + size[0], top + size[1]
    (across, x), (down, y) = cuts.items()
    x, y = left + x, top + y
    if tick_length is None:
        segments = [(across, (x, x), (top, bottom)), (down, (left, right), (y, y))]
    else:
        segments = [
            (across, (x, x), (top, top + tick_length)),
            (across, (x, x), (bottom - tick_length, bottom)),
            (down, (left, left + tick_length), (y, y)),
            (down, (right - tick_length, right), (y, y)),
        ]
    for plane, xs, ys in segments:
        axes.plot(xs, ys, color=PLANE_COLORS[plane], linewidth=0.7, alpha=0.85, solid_capstyle="butt")


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
