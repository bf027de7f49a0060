"""From a stack and its label image to crops of single cells."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ...optional import optional
from ...volumes import voxel_size_triple
from ..formats.volume import Volume
from ..resampling import resample_volume
from .stacks import Stack, load


MASK_OUT = ("background", "neighbours", "none")

_MAX_LABEL = 2**63 - 1  # what a column of a table holds
_MAX_DENSE_LABEL = 2**20  # `scipy.ndimage.find_objects` makes a list of as many entries as the highest label


@dataclass
class CutCell:
    """What became of one label of a stack.

    Args:
        label_id: the label.
        volume: the crop; None for a cell that was dropped.
        reason: why it was dropped; empty for one that was not.
        extent: length of the cell itself, without its margin, in voxels of the crop (z, y, x).
        num_parts: how many pieces that do not touch the label consists of; 0 if it was dropped.
    """

    label_id: int
    volume: Volume | None = None
    reason: str = ""
    extent: tuple[int, int, int] = field(default=(0, 0, 0))
    num_parts: int = 0


def find_cells(labels) -> dict[int, tuple[slice, slice, slice]]:
    """Bounding box (z, y, x) of every label of a label image, background 0 left out, by ascending label.

    Args:
        labels: (Z, Y, X) whole numbers from 0 on, of any type but bool; a NumPy or a dask array. Of the latter one
            layer of chunks is in memory at a time.

    Raises:
        ValueError: if the labels are not whole numbers from 0 on.
        ImportError: if scipy is not installed.
    """
    ndimage = optional("scipy.ndimage", "data")
    if labels.dtype.kind == "b":
        raise ValueError(
            "Expected a label image, a number for each cell, got a binary mask. Label it first, or give"
            " --allow_binary_labels if it is one cell."
        )
    depths = labels.chunks[0] if hasattr(labels, "chunks") else [len(labels)]
    boxes, start = {}, 0
    for depth in depths:
        slab = load(labels[start : start + depth])
        if slab.dtype.kind == "f":
            if not (slab == np.floor(slab)).all():  # False for NaN as well
                raise ValueError(
                    "Expected a label image of whole numbers, got fractions, as a probability map has. Give the label"
                    " image."
                )
            slab = slab.astype(np.int64)
        if slab.dtype.kind == "i" and slab.min() < 0:
            raise ValueError(f"Expected labels from 0 on, got {slab.min()}. Set what belongs to no cell to 0.")
        if slab.max() <= _MAX_DENSE_LABEL:
            ids = range(int(slab.max()) + 1)
            found = ndimage.find_objects(slab.astype(np.int32, copy=False))
        else:
            ids = np.union1d(np.zeros(1, slab.dtype), np.unique(slab))
            if ids[-1] > _MAX_LABEL:
                raise ValueError(f"Expected labels of at most {_MAX_LABEL}, got {ids[-1]}. Number the cells anew.")
            compact = np.empty(slab.shape, np.int32)
            for plane, output in zip(slab, compact, strict=True):  # plane by plane, because this makes 64-bit numbers
                output[:] = np.searchsorted(ids, plane)
            found, ids = ndimage.find_objects(compact), ids.tolist()
        for label_id, box in zip(ids[1:], found, strict=False):
            if box is None:
                continue
            box = (slice(box[0].start + start, box[0].stop + start), *box[1:])
            if label_id in boxes:
                box = tuple(
                    slice(min(a.start, b.start), max(a.stop, b.stop))
                    for a, b in zip(boxes[label_id], box, strict=True)
                )
            boxes[label_id] = box
        start += depth
    return dict(sorted(boxes.items()))


def is_mask(labels, boxes: dict[int, tuple[slice, slice, slice]], min_voxels: float) -> bool:
    """Whether a label image is a mask, or a map of two classes, whose numbers stand for many cells each.

    So it is if its only number stands for two or more parts that do not touch and are of cell size, or one of its
    two for three or more. Specks, of less than a tenth of the largest part, count for none.

    Args:
        labels: (Z, Y, X), NumPy's or dask's.
        boxes: of its labels, from `find_cells`.
        min_voxels: a part of less voxels is no cell.
    """
    if not 1 <= len(boxes) <= 2:
        return False
    ndimage = optional("scipy.ndimage", "data")
    for label_id, box in boxes.items():
        part_of = ndimage.label(load(labels[box]) == label_id, np.ones((3, 3, 3)))[0]
        sizes = np.bincount(part_of.ravel())[1:]
        if (sizes >= max(min_voxels, sizes.max() / 10)).sum() > len(boxes):
            return True
    return False


def cut_cells(
    stack: Stack,
    labels: Stack,
    channel_names: tuple[str, ...],
    voxel_size_um: float | tuple[float, float, float],
    margin_um: float = 2.0,
    mask_out: str = "background",
    min_volume_um3: float = 100.0,
    keep_border: bool = False,
    nucleus_labels: Stack | None = None,
    min_nucleus_contrast: float = 0.7,
    allow_binary_labels: bool = False,
) -> Iterator[CutCell]:
    """Cut every cell out of a stack.

    A crop is the bounding box of a label, longer by `margin_um` at each end where the stack reaches that far. It is
    then resampled, and rounded where the stack holds integers; at the stack's own voxel size it is untouched.
    A label of several parts is one cell.

    Args:
        stack: its (M, Z, Y, X) channels, with a voxel size.
        labels: label image of one channel and the same Z, Y, X; 0 is background.
        channel_names: M names; a cell without signal in the one called "nucleus", if any, is dropped.
        voxel_size_um: voxel size of the crops, one number or three (z, y, x).
        margin_um: width of the margin.
        mask_out: what is replaced by background, see `mask_crop`: all but the cell ("background"), other cells
            ("neighbours"), or nothing ("none").
        min_volume_um3: smaller labels are dropped.
        keep_border: keep cells that touch a face of the stack, in z, y or x, and may be cut off there.
        nucleus_labels: label image of the nuclei. A cell is then dropped if none of its voxels is in a nucleus;
            otherwise if its `nucleus_contrast` is less than `min_nucleus_contrast`.
        min_nucleus_contrast: in [0, 1]; 0 drops no cell.
        allow_binary_labels: take a mask of 0 and one other value for one cell, in however many parts. It is refused
            otherwise if `is_mask` holds.

    Yields:
        `CutCell` of each label, in ascending order.

    Raises:
        ValueError: if the shapes do not agree, the stack has no voxel size, or the labels are none.
        ImportError: if scipy is not installed.
    """
    if mask_out not in MASK_OUT:
        raise ValueError(f"Expected one of {', '.join(MASK_OUT)} as `mask_out`, got {mask_out!r}. Choose one.")
    if stack.voxel_size_um is None:
        raise ValueError(
            f"Expected the size of the voxels of {stack.path} in µm, got {stack.stated_size}. Give the stack one."
        )
    source, target = stack.voxel_size_um, voxel_size_triple(voxel_size_um)
    for other in (labels, nucleus_labels):
        if other is not None and other.data.shape != (1, *stack.data.shape[1:]):
            raise ValueError(
                f"Expected one channel of (z, y, x) = {stack.data.shape[1:]} voxels in {other.path}, as {stack.path}"
                f" has, got (c, z, y, x) = {other.data.shape}. Give the label image of this very stack."
            )
    if labels.data.dtype.kind == "b" and allow_binary_labels:
        labels = replace(labels, data=labels.data.astype(np.uint8))
    try:
        boxes = find_cells(labels.data[0])
    except ValueError as error:
        raise ValueError(f"{labels.path}: {error}") from error
    if not allow_binary_labels and is_mask(labels.data[0], boxes, min_volume_um3 / math.prod(source)):
        raise ValueError(
            f"Expected a number for each cell in {labels.path}, got {' and '.join(map(str, boxes))} for many"
            " parts of the size of a cell, as a mask has. Label the parts first (scipy.ndimage.label, or Connected"
            " Components of Fiji), or give --allow_binary_labels if it is one cell."
        )
    nucleus = channel_names.index("nucleus") if "nucleus" in channel_names else None
    margins = [math.ceil(margin_um / size - 1e-9) for size in source]
    ndimage = optional("scipy.ndimage", "data")

    for label_id, box in boxes.items():
        lengths = stack.data.shape[1:]
        if not keep_border and any(
            edge.start == 0 or edge.stop == length for edge, length in zip(box, lengths, strict=True)
        ):
            yield CutCell(label_id, reason="touches the border")
            continue
        outer = tuple(
            slice(max(edge.start - margin, 0), min(edge.stop + margin, length))
            for edge, margin, length in zip(box, margins, lengths, strict=True)
        )
        label_crop = load(labels.data[(0, *outer)])
        is_cell = label_crop == label_id
        if is_cell.sum() * math.prod(source) < min_volume_um3:
            yield CutCell(label_id, reason="too small")
            continue
        crop = load(stack.data[(slice(None), *outer)])  # (M, z, y, x)
        if crop.dtype.kind == "f" and not np.isfinite(crop).all():
            yield CutCell(label_id, reason="not finite")
            continue
        if nucleus_labels is not None:
            has_nucleus = (load(nucleus_labels.data[(0, *outer)])[is_cell] > 0).any()
        elif nucleus is not None:
            has_nucleus = nucleus_contrast(crop[nucleus], is_cell) >= min_nucleus_contrast
        else:
            has_nucleus = True
        if not has_nucleus:
            yield CutCell(label_id, reason="no nucleus")
            continue
        masked, levels = mask_crop(crop, label_crop, label_id, mask_out)
        if source != target:
            masked = _resample(masked, levels, source, target)
        extent = tuple(
            max(1, round((edge.stop - edge.start) * old / new))
            for edge, old, new in zip(box, source, target, strict=True)
        )
        volume = Volume(np.ascontiguousarray(masked), target, tuple(channel_names))
        yield CutCell(label_id, volume, extent=extent, num_parts=ndimage.label(is_cell, np.ones((3, 3, 3)))[1])


def mask_crop(
    crop: np.ndarray, labels: np.ndarray, label_id: int, mask_out: str = "background"
) -> tuple[np.ndarray, np.ndarray]:
    """Replace what does not belong to a cell by background; the cell itself keeps every intensity.

    A channel's background level is the median of the crop's voxels that belong to no cell, or the cell's darkest
    voxel if that is darker: nothing of the cell is darker than what surrounds it, which is what `VolumeProcessor`
    takes for background. Of a camera's offset only the noise is left as an edge, as far as the darkest voxel lies
    below the median.

    Args:
        crop: (M, z, y, x) intensities.
        labels: (z, y, x) labels, 0 for no cell.
        label_id: that of the cell.
        mask_out: "background": everything but the cell is replaced; "neighbours": other cells are; "none": nothing.

    Returns:
        (M, z, y, x) crop and (M,) background levels, both of the type of `crop`.
    """
    is_cell = labels == label_id
    replaced = {"background": ~is_cell, "neighbours": ~is_cell & (labels != 0), "none": np.zeros_like(is_cell)}[
        mask_out
    ]
    outside, levels = crop[:, labels == 0], crop[:, is_cell].min(axis=1)
    if outside.size:
        # "lower", because the mean of two middle ones may be no number of an integer type
        levels = np.minimum(levels, np.quantile(outside, 0.5, axis=1, method="lower"))
    return np.where(replaced, levels[:, None, None, None], crop).astype(crop.dtype, copy=False), levels


def nucleus_contrast(channel: np.ndarray, is_cell: np.ndarray) -> float:
    """How clearly a cell's voxels fall into bright ones and dark ones.

    Otsu's measure of separability, the greatest share of the variance that two classes of voxels can explain, after
    smoothing by a Gaussian of one voxel: 1 for two intensities, 0.75 for all intensities equally often, 0.64 for
    noise, and 0 for one intensity.

    Args:
        channel: (z, y, x) intensities.
        is_cell: (z, y, x) the cell's voxels.

    Returns:
        A number in [0, 1].

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    smoothed = optional("scipy.ndimage", "data").gaussian_filter(channel.astype(np.float64), 1.0, mode="nearest")
    values = np.sort(smoothed[is_cell])
    values = values - values.mean()
    variance = (values**2).mean()
    num_dark = np.arange(1, len(values))
    if len(values) < 2 or variance <= (1e-9 * max(1.0, np.abs(channel).max())) ** 2:
        return 0.0
    sums = np.cumsum(values)[:-1]  # of the dark ones; that of the bright ones is the same, negative
    between = sums**2 * (1 / num_dark + 1 / (len(values) - num_dark)) / len(values)
    return float(between.max() / variance)


def _resample(crop: np.ndarray, levels: np.ndarray, source, target) -> np.ndarray:
    """`resample_volume`, in the type of `crop`."""
    # around 0, which interpolation keeps exactly, so that masked background stays one number
    floats = np.result_type(crop.dtype, np.float32)
    levels = levels.astype(floats)[:, None, None, None]
    resampled = resample_volume(crop.astype(floats) - levels, source, target) + levels
    if crop.dtype.kind == "f":
        return resampled.astype(np.float32)
    if crop.dtype.kind == "b":
        return resampled >= 0.5
    limits = np.iinfo(crop.dtype)
    return np.rint(resampled).clip(limits.min, limits.max).astype(crop.dtype)
