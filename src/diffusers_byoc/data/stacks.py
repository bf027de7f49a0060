"""From a microscope's stack and its label image to crops of single cells.

A stack may be larger than memory: it is opened without being read, and each cell reads its own box of it.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..optional import optional
from ..volumes import voxel_size_triple
from .files import (
    Volume,
    VolumeFileError,
    _ErrorRecords,
    _imagej_voxel_size,
    _known,
    _ome_metadata,
    _tifffile,
)
from .resampling import resample_volume


MAX_STACK_BYTES = 2**42  # 4 TB; a header that says more is damaged
MAX_CHUNKS = 2**20  # a stack in more pieces than that takes hours to list
MASK_OUT = ("background", "neighbours", "none")

_NGFF_MICROMETRES = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "angstrom": 1e-4, "picometer": 1e-6}
_MAX_LABEL = 2**63 - 1  # what a column of a table holds
_MAX_DENSE_LABEL = 2**20  # `scipy.ndimage.find_objects` makes a list of as many entries as the highest label


@dataclass
class Stack:
    """A stack of many cells.

    Args:
        path: where it comes from.
        data: (C, Z, Y, X) intensities or labels; a NumPy array, or a dask array of which nothing is read yet.
        voxel_size_um: edge lengths (z, y, x) of a voxel in µm; None where the file does not say.
        channel_names: C names.
    """

    path: Path
    data: "np.ndarray | dask.array.Array"  # noqa: F821 (dask is optional)
    voxel_size_um: tuple[float, float, float] | None
    channel_names: tuple[str, ...]


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


def open_stack(path: str | os.PathLike, scene: str | None = None, max_gb: float = 4.0) -> Stack:
    """Open a stack through bioio: OME-TIFF, TIFF, OME-Zarr, CZI, ND2, LIF.

    The voxel size is converted to µm from the unit that the file states; a size without a unit (a plain TIFF, an
    ImageJ file in pixels, an OME-Zarr axis that names none) counts as not known.

    Args:
        path: the file, or the folder of an OME-Zarr.
        scene: name or number of the image, for a file of several.
        max_gb: memory in 10⁹ bytes. A stack that is larger is left on disk and read box by box.

    Returns:
        The stack; Z, Y and X are at least two voxels long.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no readable stack of Z, Y, X and at most one more axis, C.
        ImportError: if bioio is not installed, or no reader for this format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise VolumeFileError(f"{path}: expected a stack, got an empty file (0 bytes); export or copy it again")
    BioImage = optional("bioio", "data,bioio").BioImage
    UnsupportedFileFormatError = optional("bioio_base.exceptions", "data,bioio").UnsupportedFileFormatError

    with _damage_as_error(path):
        is_tiff, is_zarr = path.suffix.lower() in (".tif", ".tiff"), path.is_dir()
        options, voxel_size_um = {}, None
        if is_tiff:
            voxel_size_um, num_bytes = _inspect_tiff(path)
            if num_bytes > max_gb * 1e9:
                options["chunk_dims"] = ["Y", "X"]  # whole channels otherwise, read again for each cell
        elif is_zarr:
            _inspect_zarr(path)
        try:
            image = BioImage(path, **options)
        except UnsupportedFileFormatError as err:
            raise VolumeFileError(
                f"{path}: no installed reader of bioio opens it; it is damaged (export or copy it again), or it is"
                ' no OME-TIFF, TIFF, OME-Zarr, CZI, ND2 or LIF, or pip install "diffusers_byoc[bioio]" is due'
            ) from err
        if scene is not None:
            image.set_scene(int(scene) if scene.isdigit() and scene not in image.scenes else scene)
        elif len(image.scenes) > 1:
            raise VolumeFileError(
                f"{path}: expected one image, got {len(image.scenes)} scenes ({', '.join(image.scenes[:8])}); choose"
                " one by name or number, or save each in a file of its own"
            )
        if path.suffix.lower() == ".lif":
            _inspect_lif(path, image.current_scene_index)
        sizes = dict(image.dims.items())
        others = {axis: length for axis, length in sizes.items() if axis not in "CZYX" and length > 1}
        if others or min(sizes.get(axis, 1) for axis in "ZYX") < 2:
            problem = "a time series" if "T" in others else "something else" if others else "a 2D image"
            raise VolumeFileError(
                f"{path}: expected a stack with axes C, Z, Y, X, got {problem}"
                f" ({', '.join(f'{axis}={length}' for axis, length in sizes.items())}); save one 3D stack a file"
            )
        data = image.get_image_dask_data("CZYX")
        if data.dtype.kind not in "buif":
            raise VolumeFileError(f"{path}: expected integers or real floats, got dtype {data.dtype}; convert it")
        if data.nbytes > MAX_STACK_BYTES:
            raise VolumeFileError(f"{path}: its header says {data.nbytes / 1e9:.0f} GB; it may be damaged")
        largest_chunk = math.prod(data.chunksize) * data.dtype.itemsize
        if data.nbytes > max_gb * 1e9 and largest_chunk > max_gb * 1e9:
            raise VolumeFileError(
                f"{path}: {data.nbytes / 1e9:.1f} GB in pieces of {largest_chunk / 1e9:.1f} GB, more than the"
                f" {max_gb:g} GB allowed; allow more memory, or save it as OME-Zarr in smaller chunks"
            )
        if not is_tiff:
            voxel_size_um = _voxel_size(image, path)
        names = tuple(str(name) for name in image.channel_names or [])
        if len(names) != len(data):
            names = tuple(f"Channel:0:{index}" for index in range(len(data)))
        return Stack(path, data, voxel_size_um, names)


def read_channels(stack: Stack, channels: Sequence[int] | None = None, max_gb: float = 4.0) -> Stack:
    """Some channels of a stack, or all, in memory if they fit.

    Raises:
        ValueError: if the file is damaged.
    """
    channels = range(len(stack.data)) if channels is None else channels
    data = stack.data[list(channels)]
    names = tuple(stack.channel_names[channel] for channel in channels)
    if data.nbytes <= max_gb * 1e9:
        with _damage_as_error(stack.path):
            data = _load(data)
    return Stack(stack.path, data, stack.voxel_size_um, names)


def channel_indices(stack: Stack, channels: Mapping[str, str]) -> list[int]:
    """Where the channels of a data set are in a stack.

    Args:
        stack: the stack.
        channels: for each name in the data set, the number (from 0) or the name of the stack's channel; of a text
            that could be both, the number counts.

    Returns:
        A number for each of `channels`.

    Raises:
        ValueError: if the stack has no such channel, or several of that name.
    """
    indices = []
    for name, wanted in channels.items():
        if wanted.isdecimal() and int(wanted) < len(stack.channel_names):
            indices.append(int(wanted))
            continue
        found = [index for index, known in enumerate(stack.channel_names) if known.lower() == wanted.lower()]
        if len(found) != 1:
            known = ", ".join(f"{index} ({known})" for index, known in enumerate(stack.channel_names))
            raise ValueError(
                f"{stack.path}: {'more than one' if found else 'no'} channel {wanted!r} for {name}; it has {known}"
            )
        indices.append(found[0])
    return indices


def find_cells(labels) -> dict[int, tuple[slice, slice, slice]]:
    """Bounding box (z, y, x) of every label of a label image, background 0 left out, by ascending label.

    Args:
        labels: (Z, Y, X) whole numbers from 0 on, of any type but bool; a NumPy or a dask array. Of the latter one
            layer of chunks is in memory at a time.

    Raises:
        ValueError: if the labels are not whole numbers from 0 on.
        ImportError: if scipy is not installed.
    """
    ndimage = _ndimage()
    if labels.dtype.kind == "b":
        raise ValueError("expected a label image, a number for each cell, got a binary mask; label it first")
    depths = labels.chunks[0] if hasattr(labels, "chunks") else [len(labels)]
    boxes, start = {}, 0
    for depth in depths:
        slab = _load(labels[start : start + depth])
        if slab.dtype.kind == "f":
            if not (slab == np.floor(slab)).all():  # False for NaN as well
                raise ValueError(
                    "expected a label image of whole numbers, got fractions; this may be a probability map"
                )
            slab = slab.astype(np.int64)
        if slab.dtype.kind == "i" and slab.min() < 0:
            raise ValueError(f"expected labels from 0 on, got {slab.min()}; set what belongs to no cell to 0")
        if slab.max() <= _MAX_DENSE_LABEL:
            ids = range(int(slab.max()) + 1)
            found = ndimage.find_objects(slab.astype(np.int32, copy=False))
        else:
            ids = np.union1d(np.zeros(1, slab.dtype), np.unique(slab))
            if ids[-1] > _MAX_LABEL:
                raise ValueError(f"expected labels of at most {_MAX_LABEL}, got {ids[-1]}; number the cells anew")
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

    Yields:
        `CutCell` of each label, in ascending order.

    Raises:
        ValueError: if the shapes do not agree, the stack has no voxel size, or the labels are none.
        ImportError: if scipy is not installed.
    """
    if mask_out not in MASK_OUT:
        raise ValueError(f"`mask_out` must be one of {', '.join(MASK_OUT)}, got {mask_out!r}")
    if stack.voxel_size_um is None:
        raise ValueError(f"{stack.path}: does not say how large its voxels are in µm; give the source voxel size")
    source, target = stack.voxel_size_um, voxel_size_triple(voxel_size_um)
    for other in (labels, nucleus_labels):
        if other is not None and other.data.shape != (1, *stack.data.shape[1:]):
            raise ValueError(
                f"{other.path}: expected one channel of (z, y, x) = {stack.data.shape[1:]} voxels like {stack.path},"
                f" got (c, z, y, x) = {other.data.shape}; give the label image of this very stack"
            )
    try:
        boxes = find_cells(labels.data[0])
    except ValueError as err:
        raise ValueError(f"{labels.path}: {err}") from err
    nucleus = channel_names.index("nucleus") if "nucleus" in channel_names else None
    margins = [math.ceil(margin_um / size - 1e-9) for size in source]
    ndimage = _ndimage()

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
        label_crop = _load(labels.data[(0, *outer)])
        is_cell = label_crop == label_id
        if is_cell.sum() * math.prod(source) < min_volume_um3:
            yield CutCell(label_id, reason="too small")
            continue
        crop = _load(stack.data[(slice(None), *outer)])  # (M, z, y, x)
        if crop.dtype.kind == "f" and not np.isfinite(crop).all():
            yield CutCell(label_id, reason="not finite")
            continue
        if nucleus_labels is not None:
            has_nucleus = (_load(nucleus_labels.data[(0, *outer)])[is_cell] > 0).any()
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
    smoothed = _ndimage().gaussian_filter(channel.astype(np.float64), 1.0, mode="nearest")
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


# opening


@contextmanager
def _damage_as_error(path: Path) -> Iterator[None]:
    """Whatever a damaged file provokes in a reader, or what tifffile only logs, becomes an error that names it."""
    records = _ErrorRecords()
    logger = logging.getLogger("tifffile")
    logger.addHandler(records)
    try:
        yield
    except (VolumeFileError, ImportError, MemoryError):
        raise
    except Exception as err:
        message = " ".join(f"{type(err).__name__}: {err}".split())[:300]
        raise VolumeFileError(f"{path}: not readable ({message}); it may be damaged: export or copy it again") from err
    finally:
        logger.removeHandler(records)
    if records.messages:
        raise VolumeFileError(f"{path}: damaged TIFF ({records.messages[0][:300]}); export or copy it again")


def _inspect_tiff(path: Path) -> tuple[tuple[float, float, float] | None, int]:
    """Voxel size with its unit, which bioio leaves out, and bytes of a TIFF; refuses one that lacks planes."""
    with _tifffile().TiffFile(path) as tiff:
        if not tiff.series:
            raise VolumeFileError(f"{path}: holds no image; export or copy it again")
        num_pages, num_bytes = sum(len(series.pages) for series in tiff.series), 0
        for series in tiff.series:
            if any(page is None for page in series.pages):
                raise VolumeFileError(f"{path}: planes are missing; it may be truncated: export or copy it again")
            num_bytes += math.prod(series.shape) * series.dtype.itemsize
        if num_bytes > MAX_STACK_BYTES or num_pages > MAX_CHUNKS:
            raise VolumeFileError(f"{path}: its header says {num_bytes / 1e9:.0f} GB; it may be damaged")
        if tiff.is_ome:
            return _ome_metadata(tiff.ome_metadata)[0], num_bytes
        return _imagej_voxel_size(tiff) if tiff.is_imagej else None, num_bytes


def _inspect_zarr(path: Path) -> None:
    """Refuse arrays in absurdly many chunks, before a list of them is made."""
    import zarr
    from numcodecs.registry import codec_registry

    codec_registry.pop("pickle", None)  # a chunk of that codec is a program that zarr 2 would run
    group = zarr.open_group(str(path), mode="r")
    attributes = dict(group.attrs)
    for image in attributes.get("ome", attributes).get("multiscales", []):
        for dataset in image["datasets"]:
            array = group[dataset["path"]]
            num_chunks = math.prod(
                math.ceil(length / chunk) for length, chunk in zip(array.shape, array.chunks, strict=True)
            )
            if num_chunks > MAX_CHUNKS:
                raise VolumeFileError(f"{path}: {num_chunks} chunks; save it in larger ones, at most {MAX_CHUNKS}")


def _inspect_lif(path: Path, scene_index: int) -> None:
    """Refuse scans of other axes, of which bioio says that they have fewer, or are damaged."""
    try:
        import liffile
    except ImportError:  # bioio-lif before 2.0 reads with another package
        return
    with liffile.LifFile(path) as file:
        sizes = file.images[scene_index].sizes  # from the slowest axis to the fastest; none of length 1
    if not set(sizes) <= set("TCZYX") or list(sizes)[-2:] != ["Y", "X"]:
        known = {"λ": "emission wavelength", "Λ": "excitation wavelength", "A": "rotation", "M": "tile", "S": "colour"}
        axes = ", ".join(
            f"{axis}={length}" + (f" ({known[axis]})" if axis in known else "") for axis, length in sizes.items()
        )
        raise VolumeFileError(
            f"{path}: expected planes of Y and X for each Z and channel, got a scan of {axes}; export it from LAS X as"
            " an OME-TIFF with these axes: wavelengths as channels or one of them, tiles merged, an xz scan resliced"
        )


def _voxel_size(image, path: Path) -> tuple[float, float, float] | None:
    """In µm; of the readers that get here, only OME-Zarr's leaves the unit to the file."""
    if path.suffix.lower() == ".nd2" and not _is_calibrated(path):
        return None
    sizes, units = image.physical_pixel_sizes, image.dimension_properties
    if sizes is None:
        return None
    return _known(
        [
            math.nan
            if getattr(sizes, axis) is None
            # the sign says which way the stage went
            else abs(getattr(sizes, axis))
            * (_NGFF_MICROMETRES.get(str(getattr(units, axis).unit), math.nan) if path.is_dir() else 1.0)
            for axis in "ZYX"
        ]
    )


def _is_calibrated(path: Path) -> bool:
    """Whether an ND2 says how large its voxels are; bioio has 1 µm where it does not."""
    import nd2

    with nd2.ND2File(path) as file:
        return all(all(channel.volume.axesCalibrated) for channel in file.metadata.channels or [])


def _load(array) -> np.ndarray:
    """A dask array's numbers; a NumPy array is returned as it is."""
    # in this thread, because several processes share the machine already
    return array.compute(scheduler="synchronous") if hasattr(array, "compute") else array


def _ndimage():
    return optional("scipy.ndimage", "data")
