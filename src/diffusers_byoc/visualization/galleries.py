"""Many cells, or all of one cell, at a glance: libraries of samples and depth planes (BYOC, Figures 5, 7, 9-11)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..volumes import voxel_size_triple
from .canvas import (
    channel_colors,
    check_columns,
    check_sets,
    check_volumes,
    composite_channels,
    draw_tiles,
    stretch_range,
)


if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure


def sample_library(
    volumes: np.ndarray | torch.Tensor | Mapping[str, np.ndarray | torch.Tensor],
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    display_range: tuple[float, float] = (0.0, 1.0),
    num_columns: int | None = None,
) -> Figure:
    """Cells side by side, each as its maximum projection along z (BYOC, Figures 5 and 7).

    Args:
        volumes: (M, D, H, W) or (B, M, D, H, W) in [0, 1]; or heading -> such a batch, a block of cells a heading.
        channel_names: M names, for the legend.
        voxel_size_um: voxel edge in µm, one number or (z, y, x), the same for all cells.
        display_range: the intensities shown as black and as the full colour.
        num_columns: cells in a row; None chooses by their number.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if the volumes are of another shape or range, or the names do not match them.
        ImportError: if matplotlib is missing.
    """
    sets = check_sets(volumes, channel_names)
    spacing = voxel_size_triple(voxel_size_um)
    check_columns(num_columns)
    images = {
        name: [composite_channels(volume.max(axis=1), display_range) for volume in batch]
        for name, batch in sets.items()
    }
    sizes = {name: (batch.shape[4] * spacing[2], batch.shape[3] * spacing[1]) for name, batch in sets.items()}
    return draw_tiles(images, sizes, channel_names, num_columns)


def depth_planes(
    volume: np.ndarray | torch.Tensor,
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    display_range: tuple[float, float] = (0.0, 1.0),
    num_columns: int | None = None,
    merge_channels: bool = False,
) -> Figure:
    """Every XY plane of one cell, from z = 0 on, a block of planes a channel (BYOC, Figures 9 to 11).

    Args:
        volume: (M, D, H, W) or (1, M, D, H, W) in [0, 1].
        channel_names: M names, for the headings and the legend.
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        display_range: the intensities shown as black and as the full colour.
        num_columns: planes in a row of a block; None makes the blocks square, 8 x 8 for 64 planes.
        merge_channels: one block with all channels on top of one another, in place of one a channel.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas. The number in a plane's corner is
        its depth in voxels.

    Raises:
        ValueError: if it is not one volume of that shape and range, or the names do not match it.
        ImportError: if matplotlib is missing.
    """
    volumes = check_volumes(volume, "volume", channel_names)
    if len(volumes) != 1:
        raise ValueError(f"Expected a volume of one cell, got {len(volumes)}. Give volumes[0].")
    _, height_um, width_um = (
        size * step for size, step in zip(volumes.shape[2:], voxel_size_triple(voxel_size_um), strict=True)
    )
    check_columns(num_columns)
    channels, num_planes = volumes[0], volumes.shape[2]

    if merge_channels:
        blocks = {"": [composite_channels(channels[:, z], display_range) for z in range(num_planes)]}
    else:
        colors = channel_colors(len(channels))
        blocks = {
            name: list(stretch_range(channel, display_range)[..., None] * color)
            for name, channel, color in zip(channel_names, channels, colors, strict=True)
        }
        if len(blocks) != len(channels):
            raise ValueError(f"Expected channel_names that differ, got {tuple(channel_names)}. Rename one.")
    return draw_tiles(
        blocks,
        dict.fromkeys(blocks, (width_um, height_um)),
        channel_names,
        num_columns=num_columns or math.ceil(math.sqrt(num_planes)),
        captions=dict.fromkeys(blocks, [str(z) for z in range(num_planes)]),
        blocks_per_row=math.ceil(math.sqrt(len(blocks))),
        inches_per_tile=0.8,
    )
