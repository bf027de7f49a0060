"""From raw crops of single cells to the network's input, and back."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from .files import voxel_size_triple


class VolumeProcessor(ConfigMixin):
    r"""Raw crops of any size and dtype ↔ (M, S, S, S) in [-1, 1].

    The same object serves training, sampling and evaluation, and is saved beside the pipeline:
    ``processor.save_config(folder)``, ``VolumeProcessor.from_config(VolumeProcessor.load_config(folder))``.

    A crop goes through four steps:

    1. Intensities, channel by channel: the range [low, high] goes to [-1, 1], values outside it are clipped.
       A channel's background is its lowest value (0 in masked crops) and goes to -1 exactly.
    2. The bounding box of all that is above background in any channel, which is the cell, is cut out: an empty margin
       neither moves the cell nor makes it too large.
    3. A cell larger than the cube is refused, shrunk or cut, as `oversize` says.
    4. The box is put into the middle of the cube and padded with background (-1).

    Args:
        sample_size: edge S of the cube in voxels.
        num_channels: number M of biological channels.
        channel_names: M names, in the order of the channels.
        normalization: where [low, high] comes from, per channel. "percentile": `percentiles`; "minmax": lowest and
            highest value; "fixed": `intensity_range`, which keeps brightness comparable between cells.
        percentiles: (low, high) in [0, 100] for "percentile". Low is taken over the whole channel, high over the
            voxels above background, so that the amount of background around a cell does not change its brightness.
        intensity_range: for "fixed", one (low, high) for all channels or M of them, in the units of the files.
        voxel_size_um: edge of a voxel in µm, one number or three (z, y, x). Recorded, for pictures and export; crops
            are not resampled to it.
        oversize: what happens to a cell larger than the cube. "error": it is refused; "rescale": it is shrunk by the
            same factor in z, y and x until it fits (its voxels are then larger than `voxel_size_um`); "crop": the
            middle is kept.

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
        voxel_size_um: float | tuple[float, float, float] = 1.0,
        oversize: str = "error",
    ):
        if sample_size < 1:
            raise ValueError(f"`sample_size` must be positive, got {sample_size}")
        if num_channels < 1 or len(channel_names) != num_channels:
            raise ValueError(
                f"`channel_names` must name every channel: expected {num_channels} names, got {tuple(channel_names)}"
            )
        if normalization not in ("percentile", "minmax", "fixed"):
            raise ValueError(f"`normalization` must be 'percentile', 'minmax' or 'fixed', got {normalization!r}")
        if oversize not in ("error", "rescale", "crop"):
            raise ValueError(f"`oversize` must be 'error', 'rescale' or 'crop', got {oversize!r}")
        low, high = percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"`percentiles` must satisfy 0 <= low < high <= 100, got {tuple(percentiles)}")
        if (normalization == "fixed") != (intensity_range is not None):
            raise ValueError(
                f"`intensity_range` goes with normalization='fixed' and only with it, got {intensity_range} with"
                f" {normalization!r}"
            )
        if intensity_range is not None:
            try:
                self.intensity_ranges = np.broadcast_to(np.asarray(intensity_range, np.float64), (num_channels, 2))
            except ValueError as err:
                raise ValueError(
                    f"`intensity_range` must be (low, high) or {num_channels} of them, got {intensity_range}"
                ) from err
            spans = np.diff(self.intensity_ranges)
            if not (np.isfinite(spans) & (spans > 0)).all():
                raise ValueError(f"`intensity_range` must satisfy low < high, got {intensity_range}")
        self.voxel_size_um = voxel_size_triple(voxel_size_um)

    def preprocess(self, volume: np.ndarray | Tensor) -> Tensor:
        """One raw crop as network input.

        Args:
            volume: (M, d, h, w) finite intensities of any size and any real number type.

        Returns:
            (M, S, S, S) float32 on the CPU, in [-1, 1], background -1.

        Raises:
            ValueError: if the crop is not a volume of M channels and finite real numbers, if a channel holds nothing
                but background, or if the cell is larger than the cube and `oversize` is "error".
        """
        size = self.config.sample_size
        intensities = self._intensities(volume)

        # 1. normalise                                                                          # (M, d, h, w), [0, 1]
        intensities = np.stack([self._normalize(channel, index) for index, channel in enumerate(intensities)])

        # 2. cut out the cell
        is_cell = intensities.any(axis=0)
        box = []
        for other_axes in ((1, 2), (0, 2), (0, 1)):
            occupied = np.flatnonzero(is_cell.any(axis=other_axes))
            box.append(slice(occupied[0], occupied[-1] + 1))
        cell = torch.from_numpy(intensities[(slice(None), *box)])

        # 3. make it fit
        largest = max(cell.shape[1:])
        if largest > size and self.config.oversize == "error":
            raise ValueError(
                f"a cell of {tuple(cell.shape[1:])} voxels (z, y, x) is larger than the cube of {size}³; choose"
                f" oversize='rescale' to shrink it, oversize='crop' to cut it, or sample_size >= {largest}"
            )
        if largest > size and self.config.oversize == "rescale":
            shrunk = [max(1, round(length * size / largest)) for length in cell.shape[1:]]
            cell = F.interpolate(cell.unsqueeze(0), shrunk, mode="area").squeeze(0)
        for axis in (1, 2, 3):
            kept = min(cell.shape[axis], size)
            cell = cell.narrow(axis, (cell.shape[axis] - kept) // 2, kept)

        # 4. centre and pad                                                                     # (M, S, S, S), [-1, 1]
        cube = torch.full((len(cell), size, size, size), -1.0)
        center = [slice((size - length) // 2, (size - length) // 2 + length) for length in cell.shape[1:]]
        cube[(slice(None), *center)] = cell * 2 - 1
        return cube

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
            raise ValueError(f"`output_type` must be 'np' or 'pt', got {output_type!r}")
        if volumes.ndim != 5 or volumes.shape[1] != self.config.num_channels:
            raise ValueError(
                f"`volumes` must have shape (B, {self.config.num_channels}, D, H, W), got {tuple(volumes.shape)}"
            )
        volumes = volumes.detach().float()
        if not volumes.isfinite().all():
            raise ValueError("`volumes` must be finite, got NaN or infinity; a network in fp16 may need bf16 or fp32")
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
                f"not 3D: expected ({num_channels} channels, z, y, x), got shape {volume.shape}; give one cell with"
                " its channels on the first axis"
            )
        if len(volume) != num_channels:
            raise ValueError(
                f"wrong number of channels: expected {num_channels} ({names}) on the first axis, got shape"
                f" {volume.shape}; keep these channels only, in this order, or set `num_channels`"
            )
        if volume.dtype.kind not in "buif":
            raise ValueError(f"expected integers or real floats, got dtype {volume.dtype}; convert the volume first")
        intensities = volume.astype(np.result_type(volume.dtype, np.float32))
        if not np.isfinite(intensities).all():
            raise ValueError("expected finite intensities, got NaN or infinity; replace them (by 0) first")
        return intensities

    def _normalize(self, channel: np.ndarray, index: int) -> np.ndarray:
        """(d, h, w) intensities of one channel -> float32 in [0, 1]."""
        name = self.config.channel_names[index]
        background = channel.min()
        if background == channel.max():
            raise ValueError(
                f"channel {index} ({name}) is all background (every voxel is {background:g}); leave the cell out, or"
                " export it again"
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
            span = np.subtract(high, low, dtype=np.float64)
            if not 0 < span < np.finfo(channel.dtype).max:
                raise ValueError(
                    f"channel {index} ({name}) has no contrast: low {low:g}, high {high:g}; widen `percentiles`"
                )
            normalized = np.clip((channel - low) / span, 0, 1).astype(np.float32)
        if not normalized.any():
            raise ValueError(
                f"channel {index} ({name}) is all background: nothing is above {low:g} (it reaches {channel.max():g});"
                " lower `intensity_range`, or leave the cell out"
            )
        return normalized
