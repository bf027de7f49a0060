"""A transformation of cells as a strip of pictures (BYOC, Figure 1) and as a film."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from .canvas import check_volumes, composite_channels
from .galleries import sample_library


if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure


def frame_strip(
    frames: np.ndarray | torch.Tensor,
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    display_range: tuple[float, float] = (0.0, 1.0),
    num_tiles: int = 8,
) -> Figure:
    """Frames of a transformation in a row, evenly apart, the first and the last among them.

    Args:
        frames: (B, M, D, H, W) in [0, 1], as `BYOCPipeline.interpolate` returns them.
        channel_names: M names, for the legend.
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        display_range: the intensities shown as black and as the full colour.
        num_tiles: how many are shown, at least 2; all, if there are no more.

    Returns:
        A figure on a black background, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if the frames are of another shape or range, or the names do not match them.
        ImportError: if matplotlib is missing.
    """
    frames = check_volumes(frames, "frames", channel_names)
    if num_tiles < 2:
        raise ValueError(f"Expected num_tiles of at least 2, got {num_tiles}. Raise it.")
    shown = np.linspace(0, len(frames) - 1, min(num_tiles, len(frames))).round().astype(int)
    return sample_library(frames[shown], channel_names, voxel_size_um, display_range, num_columns=len(shown))


def write_film(
    frames: np.ndarray | torch.Tensor,
    path: str | Path,
    display_range: tuple[float, float] = (0.0, 1.0),
    fps: int = 12,
    magnification: int = 4,
) -> Path:
    """Write a transformation as a film, each frame as its maximum projection along z.

    Args:
        frames: (B, M, D, H, W) in [0, 1].
        path: ends in ``.gif``, or in ``.mp4``, which needs ``pip install "diffusers_byoc[film]"``. Missing folders
            are made.
        display_range: the intensities shown as black and as the full colour.
        fps: frames a second.
        magnification: pixels along a voxel's edge.

    Returns:
        The path.

    Raises:
        ValueError: if the frames are of another shape or range, a number is below 1, or the path has another ending.
        ImportError: if the package that writes it is missing.
    """
    path = Path(path)
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"Expected a path that ends in .gif or .mp4, got {str(path)!r}. Rename it.")
    if fps < 1 or magnification < 1:
        raise ValueError(f"Expected fps and magnification of at least 1, got {fps} and {magnification}. Raise them.")
    shape = np.shape(frames)
    frames = check_volumes(frames, "frames", [""] * (shape[1] if len(shape) == 5 else 0))
    image = optional("PIL.Image", "viz")
    pixels = [composite_channels(frame.max(axis=1), display_range) for frame in frames]
    pixels = [picture.repeat(magnification, axis=0).repeat(magnification, axis=1) for picture in pixels]
    pictures = [image.fromarray((picture * 255).round().astype(np.uint8)) for picture in pixels]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gif":
        optional("diffusers.utils.export_utils", "viz").export_to_gif(pictures, str(path), fps)
    else:
        optional("imageio_ffmpeg", "film")
        optional("diffusers.utils.export_utils", "film").export_to_video(pictures, str(path), fps)
    return path
