"""From raw crops of single cells to the network's input, and back."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from ..volumes import voxel_size_triple
from .resampling import sample_grid


SAME_SIZE = 1e-3  # voxel sizes that differ by less are equal: 64 voxels are then not a tenth of a voxel off


@dataclass(frozen=True)
class PreprocessingRecord:
    """What `VolumeProcessor` did to one crop. JSON takes it as `dataclasses.asdict`.

    Args:
        shape: (d, h, w) of the crop.
        dtype: of the crop.
        intensity_ranges: M times (low, high), the crop's intensities that went to -1 and 1.
        start: (z, y, x) position of the cube's first voxel in the crop, in the crop's voxels; may lie outside.
        step: (z, y, x) voxels of the crop from one voxel of the cube to the next; 1 where nothing was resampled.
        voxel_size_um: (z, y, x) edge of the cube's voxels in µm, shrinking included; None if the crop's is unknown.
    """

    shape: tuple[int, int, int]
    dtype: str
    intensity_ranges: tuple[tuple[float, float], ...]
    start: tuple[float, float, float]
    step: tuple[float, float, float]
    voxel_size_um: tuple[float, float, float] | None


class VolumeProcessor(ConfigMixin):
    r"""Raw crops of any size and dtype to (M, S, S, S) in [-1, 1].

    The same object serves training, sampling and evaluation, and is saved beside the pipeline:
    ``processor.save_config(folder)``, ``VolumeProcessor.from_config(VolumeProcessor.load_config(folder))``.

    A crop goes through three steps:

    1. Intensities, channel by channel: the range [low, high] goes to [-1, 1], values outside it are clipped.
       A channel's background is its lowest value (0 in masked crops) and goes to -1 exactly.
    2. The bounding box of all that is above background in any channel, which is the cell, is found: an empty margin
       neither moves the cell nor makes it too large. A cell larger than the cube is refused, shrunk or cut, as
       `oversize` says.
    3. The cube is laid with its middle on the box's middle and its voxels `voxel_size_um` apart. Outside the crop is
       background (-1). If the voxel size is that of the crop, voxels are copied; otherwise they are interpolated
       linearly, and smoothed first where they grow (see `resample_volume`).

    What was done to a crop is its `PreprocessingRecord` (`preprocess_with_record`).

    Args:
        sample_size: edge S of the cube in voxels.
        num_channels: number M of biological channels.
        channel_names: M names, in the order of the channels.
        normalization: where [low, high] comes from, per channel. "percentile": `percentiles`; "minmax": lowest and
            highest value; "fixed": `intensity_range`, which keeps brightness comparable between cells.
        percentiles: (low, high) in [0, 100] for "percentile". Low is taken over the whole channel, high over the
            voxels above background, so that the amount of background around a cell does not change its brightness.
        intensity_range: for "fixed", one (low, high) for all channels or M of them, in the units of the files.
        voxel_size_um: edge of the cube's voxels in µm, one number or three (z, y, x); crops of another voxel size are
            resampled to it. None takes every crop as it is, if its voxels are cubic or their size is unknown.
        oversize: what happens to a cell larger than the cube. "error": it is refused; "rescale": it is shrunk by the
            same factor in z, y and x until it fits (its voxels are then larger, as its record says); "crop": the
            middle is kept.

    Attributes:
        voxel_size_um: (z, y, x), or None.

    Raises:
        ValueError: if the arguments contradict each other or are out of range.
    """

    config_name = "volume_processor_config.json"

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        num_channels: int = 2,
        channel_names: tuple[str, ...] = ("cell", "nucleus"),
        normalization: str = "percentile",
        percentiles: tuple[float, float] = (0.0, 99.9),
        intensity_range: tuple | None = None,
        voxel_size_um: float | tuple[float, float, float] | None = None,
        oversize: str = "error",
    ):
        if sample_size < 1:
            raise ValueError(f"Expected `sample_size` of at least 1, got {sample_size}. Raise it.")
        if num_channels < 1 or len(channel_names) != num_channels:
            raise ValueError(
                f"Expected {num_channels} names in `channel_names`, got {tuple(channel_names)}. Name every channel."
            )
        if normalization not in ("percentile", "minmax", "fixed"):
            raise ValueError(
                f"Expected `normalization` 'percentile', 'minmax' or 'fixed', got {normalization!r}. Choose one."
            )
        if oversize not in ("error", "rescale", "crop"):
            raise ValueError(f"Expected `oversize` 'error', 'rescale' or 'crop', got {oversize!r}. Choose one.")
        low, high = percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"Expected `percentiles` 0 <= low < high <= 100, got {tuple(percentiles)}. Correct them.")
        if (normalization == "fixed") != (intensity_range is not None):
            raise ValueError(
                f"Expected `intensity_range` with normalization='fixed' and only with it, got {intensity_range} with"
                f" {normalization!r}. Give both or none."
            )
        if intensity_range is not None:
            try:
                self.intensity_ranges = np.broadcast_to(np.asarray(intensity_range, np.float64), (num_channels, 2))
            except ValueError as error:
                raise ValueError(
                    f"Expected `intensity_range` (low, high) or {num_channels} of them, got {intensity_range}. Correct"
                    " it."
                ) from error
            spans = np.diff(self.intensity_ranges)
            if not (np.isfinite(spans) & (spans > 0)).all():
                raise ValueError(f"Expected `intensity_range` with low < high, got {intensity_range}. Correct it.")
        self.voxel_size_um = None if voxel_size_um is None else voxel_size_triple(voxel_size_um)

    def preprocess(
        self, volume: np.ndarray | Tensor, voxel_size_um: float | tuple[float, float, float] | None = None
    ) -> Tensor:
        """One raw crop as network input.

        Args:
            volume: (M, d, h, w) finite intensities of any size and any real number type.
            voxel_size_um: edge of the crop's voxels in µm, one number or three (z, y, x); None if unknown, which only
                a processor without `voxel_size_um` of its own accepts.

        Returns:
            (M, S, S, S) float32 on the CPU, in [-1, 1], background -1.

        Raises:
            ValueError: if the crop is not a volume of M channels and finite real numbers, if a channel holds nothing
                but background, if the crop's voxel size is needed and unknown or not cubic and to be taken as it is,
                or if the cell is larger than the cube and `oversize` is "error".
            ImportError: if the crop must be resampled and scipy is not installed.
        """
        return self.preprocess_with_record(volume, voxel_size_um)[0]

    def preprocess_with_record(
        self, volume: np.ndarray | Tensor, voxel_size_um: float | tuple[float, float, float] | None = None
    ) -> tuple[Tensor, PreprocessingRecord]:
        """`preprocess`, and what it did; arguments and errors are the same."""
        size = self.config.sample_size
        volume = volume if isinstance(volume, Tensor) else np.asarray(volume)
        dtype = str(volume.dtype).removeprefix("torch.") if isinstance(volume, Tensor) else volume.dtype.name
        intensities = self._intensities(volume)
        step = self._step(voxel_size_um)

        # 1. normalise                                                                          # (M, d, h, w), [0, 1]
        ranges = tuple(self._intensity_range(channel, index) for index, channel in enumerate(intensities))
        channels = zip(intensities, ranges, strict=True)
        intensities = np.stack(
            [self._normalize(channel, *pair, index) for index, (channel, pair) in enumerate(channels)]
        )

        # 2. find the cell
        is_cell = intensities.any(axis=0)
        box = []
        for other_axes in ((1, 2), (0, 2), (0, 1)):
            occupied = np.flatnonzero(is_cell.any(axis=other_axes))
            box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
        lengths = [(side.stop - side.start) / stride for side, stride in zip(box, step, strict=True)]
        longest, shrinking = max(lengths), 1.0
        if round(longest) > size and self.config.oversize == "error":
            raise ValueError(
                f"Expected a cell of at most {size}³ voxels, got {tuple(round(length) for length in lengths)} (z, y,"
                " x). Choose oversize='rescale' to shrink it, oversize='crop' to cut it, or sample_size >="
                f" {round(longest)}."
            )
        if longest < 1:
            raise ValueError(
                f"Expected a cell of at least one voxel of {self.voxel_size_um} µm, got {is_cell.shape} voxels of"
                f" {voxel_size_um} µm. Check the units of both."
            )
        if round(longest) > size and self.config.oversize == "rescale":
            shrinking = longest / size
            step = tuple(stride * shrinking for stride in step)

        # 3. lay the cube on its middle                                                         # (M, S, S, S), [-1, 1]
        start = tuple(
            # where voxels are copied, the middle is a whole number of voxels
            float(side.start - (size - (side.stop - side.start)) // 2)
            if step == (1.0, 1.0, 1.0)
            else (side.start + side.stop - 1) / 2 - stride * (size - 1) / 2
            for side, stride in zip(box, step, strict=True)
        )
        cell = intensities[(slice(None), *box)]
        offset = [first - side.start for first, side in zip(start, box, strict=True)]
        cube = torch.from_numpy(_sample_on_background(cell, offset, step, (size,) * 3)) * 2 - 1
        cube_um = self.voxel_size_um
        if cube_um is None and voxel_size_um is not None:
            cube_um = voxel_size_triple(voxel_size_um)
        cube_um = cube_um and tuple(edge * shrinking for edge in cube_um)
        return cube, PreprocessingRecord(is_cell.shape, dtype, ranges, start, step, cube_um)

    def postprocess(self, volumes: Tensor, output_type: str = "np") -> np.ndarray | Tensor:
        """Network output as intensities for viewing and measuring.

        Args:
            volumes: (B, M, D, H, W), nominally in [-1, 1]; what lies outside is clipped.
            output_type: "np" for a NumPy array, "pt" for a tensor on the device of `volumes`.

        Returns:
            (B, M, D, H, W) float32 in [0, 1].

        Raises:
            ValueError: if the shape or the output type is wrong, or the volumes hold NaN or infinity.
        """
        if output_type not in ("np", "pt"):
            raise ValueError(f"Expected `output_type` 'np' or 'pt', got {output_type!r}. Choose one.")
        if volumes.ndim != 5 or volumes.shape[1] != self.config.num_channels:
            raise ValueError(
                f"Expected volumes (B, {self.config.num_channels}, D, H, W), got {tuple(volumes.shape)}. Give a batch"
                " of these."
            )
        volumes = volumes.detach().float()
        if not volumes.isfinite().all():
            raise ValueError("Expected finite volumes, got NaN or infinity. A network in fp16 may need bf16 or fp32.")
        volumes = (volumes / 2 + 0.5).clamp(0, 1)
        return volumes.cpu().numpy() if output_type == "np" else volumes

    def _intensities(self, volume: np.ndarray | Tensor) -> np.ndarray:
        """(M, d, h, w) float32, or float64 where float32 would lose digits, after all checks of shape and type."""
        if isinstance(volume, Tensor):
            volume = volume.detach().cpu()
            volume = volume.float() if volume.dtype == torch.bfloat16 else volume  # NumPy has no bfloat16
        volume = np.asarray(volume)
        num_channels, names = self.config.num_channels, ", ".join(self.config.channel_names)
        if volume.ndim != 4 or 0 in volume.shape:
            raise ValueError(
                f"Expected a volume of {num_channels} channels, z, y, x, got shape {volume.shape}. Give one cell with"
                " its channels on the first axis."
            )
        if len(volume) != num_channels:
            raise ValueError(
                f"Expected {num_channels} channels ({names}) on the first axis, got shape {volume.shape}. Keep these"
                " channels only, in this order, or set `num_channels`."
            )
        if volume.dtype.kind not in "buif":
            raise ValueError(f"Expected integers or real floats, got dtype {volume.dtype}. Convert the volume first.")
        intensities = volume.astype(np.result_type(volume.dtype, np.float32))
        if not np.isfinite(intensities).all():
            raise ValueError("Expected finite intensities, got NaN or infinity. Replace them (by 0) first.")
        return intensities

    def _step(self, voxel_size_um) -> tuple[float, float, float]:
        """Voxels of a crop of this voxel size from one voxel of the cube to the next."""
        if voxel_size_um is None:
            if self.voxel_size_um is None:
                return (1.0, 1.0, 1.0)
            raise ValueError(
                f"Expected a crop of known voxel size, to bring it to {self.voxel_size_um} µm, got None. Give"
                " `voxel_size_um`, save the file with its voxel size (diffusers_byoc.data.write_volume), or set the"
                " processor's `voxel_size_um` to None to take all crops as they are."
            )
        source = voxel_size_triple(voxel_size_um)
        if self.voxel_size_um is None:
            if max(source) / min(source) - 1 > SAME_SIZE:
                raise ValueError(
                    f"Expected cubic voxels, got {source} µm (z, y, x). Set the processor's `voxel_size_um` to the"
                    f" size that all crops shall be resampled to, for example {max(source)}."
                )
            return (1.0, 1.0, 1.0)
        steps = [target / size for target, size in zip(self.voxel_size_um, source, strict=True)]
        # all or none: voxels are copied along every axis, or interpolated
        return (1.0, 1.0, 1.0) if all(abs(step - 1) <= SAME_SIZE for step in steps) else tuple(steps)

    def _intensity_range(self, channel: np.ndarray, index: int) -> tuple[float, float]:
        """The (low, high) of one channel (d, h, w) that go to -1 and 1."""
        name = self.config.channel_names[index]
        background = channel.min()
        if background == channel.max():
            raise ValueError(
                f"Expected contrast in channel {index} ({name}), got all background (every voxel is {background:g})."
                " Leave the cell out, or export it again."
            )
        if self.config.normalization == "minmax":
            low, high = background, channel.max()
        elif self.config.normalization == "percentile":
            low_percentile, high_percentile = self.config.percentiles
            low = np.percentile(channel, low_percentile) if low_percentile > 0 else background
            high = np.percentile(channel[channel > background], high_percentile)
        else:
            low, high = self.intensity_ranges[index]
        with np.errstate(over="ignore"):
            if not 0 < np.subtract(high, low, dtype=np.float64) < np.finfo(channel.dtype).max:
                raise ValueError(
                    f"Expected contrast in channel {index} ({name}), got low {low:g}, high {high:g}. Widen"
                    " `percentiles`."
                )
        return float(low), float(high)

    def _normalize(self, channel: np.ndarray, low: float, high: float, index: int) -> np.ndarray:
        """(d, h, w) intensities of one channel -> float32 in [0, 1]."""
        with np.errstate(over="ignore"):
            normalized = np.clip((channel - low) / (high - low), 0, 1).astype(np.float32)
        if not normalized.any():
            raise ValueError(
                f"Expected contrast in channel {index} ({self.config.channel_names[index]}), got all background:"
                f" nothing is above {low:g} (it reaches {channel.max():g}). Lower `intensity_range`, or leave the cell"
                " out."
            )
        return normalized


def _sample_on_background(volume: np.ndarray, start, step, shape) -> np.ndarray:
    """`sample_grid` of a volume (M, d, h, w) that lies in an endless background of 0."""
    margin = [math.ceil(stride) + 1 for stride in step]  # as far as a smoothed edge reaches
    padded = np.pad(volume, [(0, 0), *((length, length) for length in margin)])
    return sample_grid(padded, [first + length for first, length in zip(start, margin, strict=True)], step, shape)
