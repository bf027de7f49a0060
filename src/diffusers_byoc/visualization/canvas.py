"""What the pictures of volumes share: checked input, the channels' colours, a black canvas in µm.

A picture is one set of axes whose unit is the µm, so that planes of any size and voxel spacing share one scale and one
scale bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from ..volumes import check_unit_range


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
    (0.75, 0.95, 0.45),  # lime
    (0.75, 0.75, 0.80),  # grey
)

TEXT_COLOR = "#e6e6e6"
FAINT_COLOR = "#8c8c8c"
FRAME_COLOR = "#2b2b2b"
DPI = 150
MAX_WIDTH_INCHES = 200


def composite_channels(image: np.ndarray, display_range: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Add the channels of an image up, each in its colour of `CHANNEL_COLORS`.

    Args:
        image: (M, H, W).
        display_range: the intensities shown as black and as the full colour; what lies outside is clipped.

    Returns:
        (H, W, 3) red, green, blue in [0, 1].
    """
    intensity = stretch_range(image, display_range)
    return np.clip(np.einsum("mhw,mc->hwc", intensity, channel_colors(len(intensity))), 0.0, 1.0)


def write_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG; missing folders are made.

    Args:
        figure: from any function of this package.
        path: ends in ``.png``.

    Returns:
        The path.

    Raises:
        ValueError: if the path has another ending.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"Expected a path that ends in .png, got {str(path)!r}. Call figure.savefig for other formats."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=figure.dpi, facecolor=figure.get_facecolor())
    return path


def channel_colors(num_channels: int) -> np.ndarray:
    """(M, 3) red, green, blue."""
    return np.asarray([CHANNEL_COLORS[index % len(CHANNEL_COLORS)] for index in range(num_channels)], np.float32)


def stretch_range(image: np.ndarray, display_range: tuple[float, float]) -> np.ndarray:
    low, high = display_range
    if not low < high:
        raise ValueError(f"Expected display_range (low, high) with low < high, got {display_range}. Raise high.")
    return np.clip((np.asarray(image, dtype=np.float32) - low) / (high - low), 0.0, 1.0)


# Input


def check_volumes(volumes: np.ndarray | torch.Tensor, name: str, channel_names: Sequence[str]) -> np.ndarray:
    """(M, D, H, W) or (B, M, D, H, W) in [0, 1] as float32 NumPy (B, M, D, H, W), or a ValueError."""
    if isinstance(channel_names, str):
        raise ValueError(
            f"Expected a sequence of channel_names, one for each channel, got the text {channel_names!r}. Give a list."
        )
    if hasattr(volumes, "detach"):
        volumes = volumes.detach().float().cpu().numpy()
    volumes = np.asarray(volumes, dtype=np.float32)
    if volumes.ndim not in (4, 5) or 0 in volumes.shape:
        raise ValueError(
            f"Expected {name} (M, D, H, W), or (B, M, D, H, W), got shape {volumes.shape}. Give one cell or more."
        )
    if volumes.ndim == 4:
        volumes = volumes[None]
    if volumes.shape[1] != len(channel_names):
        raise ValueError(
            f"Expected a name for each of {volumes.shape[1]} channels of {name}, got channel_names "
            f"{tuple(channel_names)}. Give {volumes.shape[1]}."
        )
    check_unit_range(volumes, name)
    return volumes


def check_sets(
    volumes: np.ndarray | torch.Tensor | Mapping[str, np.ndarray | torch.Tensor], channel_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Heading -> (B, M, D, H, W); a batch without heading becomes the only one, under an empty heading."""
    if not isinstance(volumes, Mapping):
        return {"": check_volumes(volumes, "volumes", channel_names)}
    if not volumes:
        raise ValueError('Expected at least one batch in volumes, got none. Give {"generated": volumes}.')
    return {name: check_volumes(batch, f"volumes[{name!r}]", channel_names) for name, batch in volumes.items()}


def check_texts(texts: Sequence[str] | None, name: str, num_cells: int) -> None:
    if texts is not None and (isinstance(texts, str) or len(texts) != num_cells):
        got = repr(texts) if isinstance(texts, str) else len(texts)
        raise ValueError(f"Expected {num_cells} {name}, one text for each cell, got {got}. Match their number.")


def check_columns(num_columns: int | None) -> None:
    if num_columns is not None and num_columns < 1:
        raise ValueError(f"Expected num_columns of at least 1, got {num_columns}. Raise it, or leave it out.")


# Drawing, in µm from the top left


def new_figure(width_inches: float, height_inches: float, facecolor: str, layout: str | None = None) -> Figure:
    """A figure that belongs to no window and leaves matplotlib's state as it is."""
    figure = optional("matplotlib.figure", "viz").Figure(
        figsize=(width_inches, height_inches), dpi=DPI, facecolor=facecolor, layout=layout
    )
    optional("matplotlib.backends.backend_agg", "viz").FigureCanvasAgg(figure)
    return figure


def black_canvas(
    size: tuple[float, float],
    margins: Mapping[str, float],
    inches_per_um: float,
    lines: Sequence[tuple[str, float]] = (),
) -> tuple[Figure, Axes, Callable[[float], float]]:
    """A black figure, its one set of axes, and the function from a length in µm to a font size in points.

    The canvas is widened to the right where one of the `lines`, texts that begin at x = 0 with their sizes in µm,
    would not fit.
    """
    figure = new_figure(1.0, 1.0, facecolor="black")
    width = size[0] + margins["left"] + margins["right"]
    height = size[1] + margins["top"] + margins["bottom"]
    # a picture of very many cells keeps to what image viewers open
    inches_per_um = min(inches_per_um, MAX_WIDTH_INCHES / max(width, height))
    longest = max((_text_width(text) * text_size for text, text_size in lines), default=0.0)
    width = max(width, margins["left"] + longest + margins["right"])

    figure.set_size_inches(width * inches_per_um, height * inches_per_um)
    axes = figure.add_axes((0, 0, 1, 1), facecolor="black")
    axes.set_xlim(-margins["left"], width - margins["left"])
    axes.set_ylim(size[1] + margins["bottom"], -margins["top"])
    axes.set_aspect("auto")
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    return figure, axes, lambda length_um: length_um * inches_per_um * 72


def _text_width(text: str) -> float:
    """Width of a bold text over its font size."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=100, prop={"weight": "bold"}).get_extents().xmax / 100 if text.strip() else 0.0


def legend_line(channel_names: Sequence[str]) -> str:
    """A text as wide as the legend."""
    return "mm".join(channel_names)


def draw_plane(
    axes: Axes, colors: np.ndarray, left: float, top: float, size: tuple[float, float], frame: str = FRAME_COLOR
) -> None:
    from matplotlib.patches import Rectangle

    extent = (left, left + size[0], top + size[1], top)
    axes.imshow(colors, extent=extent, aspect="auto", interpolation="bilinear")
    axes.add_patch(Rectangle((left, top), *size, fill=False, edgecolor=frame, linewidth=0.6))


def draw_legend(axes: Axes, channel_names: Sequence[str], left: float, middle: float, size: float) -> None:
    """The channel names in their colours, on one line."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    words = [
        TextArea(name, textprops={"color": color, "size": size, "weight": "bold"})
        for name, color in zip(channel_names, channel_colors(len(channel_names)).tolist(), strict=True)
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


def draw_scale_bar(axes: Axes, right: float, bottom: float, longest: float, size: float) -> None:
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


def draw_tiles(
    blocks: Mapping[str, Sequence[np.ndarray]],
    image_sizes: Mapping[str, tuple[float, float]],
    channel_names: Sequence[str],
    num_columns: int | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    blocks_per_row: int = 1,
    inches_per_tile: float = 1.2,
) -> Figure:
    """Pictures in a grid, a block a heading; legend above, scale bar below.

    Args:
        blocks: heading -> (H, W, 3) pictures; an empty heading takes no space.
        image_sizes: heading -> (width, height) in µm of its pictures, which stand in the middle of their tiles.
        channel_names: for the legend.
        num_columns: tiles in a row of a block; None makes the largest block about twice as wide as high.
        captions: heading -> a text for each picture's corner.
        blocks_per_row: blocks beside one another.
        inches_per_tile: the longer edge of a tile.
    """
    tile_width, tile_height = (max(size[axis] for size in image_sizes.values()) for axis in (0, 1))
    extent = max(tile_width, tile_height)
    most = max(len(images) for images in blocks.values())
    columns = num_columns or min(most, max(8, math.ceil(math.sqrt(2 * most * tile_height / tile_width))))
    columns = min(columns, most)

    # 1. canvas; blocks of one row are as high as the highest of them
    seam = 0.03 * extent
    heading = 0.22 * extent if any(blocks) else 0.0
    block_width = columns * (tile_width + seam) - seam
    block_gap = 3 * seam
    names = list(blocks)
    rows = [names[start : start + blocks_per_row] for start in range(0, len(names), blocks_per_row)]
    heights = [
        heading + max(math.ceil(len(blocks[name]) / columns) for name in row) * (tile_height + seam) - seam
        for row in rows
    ]
    across = min(blocks_per_row, len(names))
    canvas = (across * (block_width + block_gap) - block_gap, sum(heights) + block_gap * (len(rows) - 1))
    margins = {"left": 0.08 * extent, "right": 0.08 * extent, "top": 0.26 * extent, "bottom": 0.30 * extent}
    lines = [(legend_line(channel_names), 0.12 * extent), *((name, 0.12 * extent) for name in names[::blocks_per_row])]
    figure, axes, points = black_canvas(canvas, margins, inches_per_tile / extent, lines)

    # 2. tiles
    top = 0.0
    for row, height in zip(rows, heights, strict=True):
        for place, name in enumerate(row):
            left = place * (block_width + block_gap)
            size = image_sizes[name]
            if name:
                axes.text(
                    left,
                    top + heading - 0.06 * extent,
                    name,
                    color=TEXT_COLOR,
                    size=points(0.12 * extent),
                    va="bottom",
                )
            for index, image in enumerate(blocks[name]):
                x = left + index % columns * (tile_width + seam)
                y = top + heading + index // columns * (tile_height + seam)
                draw_plane(axes, image, x + (tile_width - size[0]) / 2, y + (tile_height - size[1]) / 2, size)
                if captions is not None:
                    axes.text(
                        x + 0.04 * extent,
                        y + 0.04 * extent,
                        captions[name][index],
                        color=FAINT_COLOR,
                        size=max(6.0, points(0.075 * extent)),
                        ha="left",
                        va="top",
                    )
        top += height + block_gap

    # 3. legend and scale, both outside the pictures
    draw_legend(axes, channel_names, 0.0, -0.13 * extent, points(0.12 * extent))
    draw_scale_bar(axes, canvas[0], canvas[1] + 0.24 * extent, 0.6 * tile_width, points(0.1 * extent))
    return figure
