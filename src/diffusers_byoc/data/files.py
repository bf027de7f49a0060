"""Single-cell volumes from and to files: OME-TIFF, TIFF, ``.npy``, ``.npz``; to OME-Zarr."""

import io
import logging
import lzma
import math
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from ..optional import optional
from ..volumes import voxel_size_triple
from ..whole_files import whole_or_absent


MAX_VOLUME_BYTES = 2**30  # one cell of two channels at uint16 is then at most 645 voxels wide
VOLUME_SUFFIXES = (".tif", ".tiff", ".npy", ".npz")

_MAX_HEADER_BYTES = 2**16
_MAX_PLANES = 2**20
_CHANNEL_COLORS = ("00FFFF", "FF00FF", "FFFF00", "FFFFFF")  # cell cyan, nucleus magenta
_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3}
_TIFF_REMEDY = "save it as OME-TIFF with axes CZYX (diffusers_byoc.data.write_ome_tiff)"


class VolumeFileError(ValueError):
    """A file is not a readable (C, Z, Y, X) volume; the message names the file, what was wrong, and the remedy."""


@dataclass
class Volume:
    """What a volume file holds.

    Args:
        data: (C, Z, Y, X) intensities in the file's own number type.
        voxel_size_um: edge lengths (z, y, x) of a voxel in µm; None where the file does not say.
        channel_names: C names; None where the file does not say.
    """

    data: np.ndarray
    voxel_size_um: tuple[float, float, float] | None = None
    channel_names: tuple[str, ...] | None = None


def read_volume(path: str | os.PathLike) -> Volume:
    """Read one volume.

    Axes of a TIFF are taken from its metadata and put into the order CZYX; T and S axes are accepted at length 1
    only. A TIFF that does not name its axes is read like a NumPy file: four axes are (C, Z, Y, X), three axes are
    (Z, Y, X) of one channel. A ``.npz`` holds one array, or the volume under the key "volume". Voxel sizes are read
    from OME and ImageJ metadata and from the key "voxel_size_um" of a ``.npz``, channel names from OME metadata and
    the key "channel_names".

    Args:
        path: a ``.tif``, ``.tiff``, ``.npy`` or ``.npz`` file of at most `MAX_VOLUME_BYTES` once unpacked.

    Returns:
        The volume; integers, booleans or finite floats, at least two voxels long in z, y and x.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, unreadable, truncated, too large, or not a (C, Z, Y, X) volume of finite
            real numbers.
        ImportError: if a TIFF is read without tifffile.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if path.stat().st_size == 0:
        raise VolumeFileError(f"{path}: expected a volume, got an empty file (0 bytes); export or copy it again")
    readers = {".tif": _read_tiff, ".tiff": _read_tiff, ".npy": _read_npy, ".npz": _read_npz}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise VolumeFileError(f"{path}: expected one of {', '.join(VOLUME_SUFFIXES)}, got '{path.suffix}'; convert it")
    try:
        volume = reader(path)
    except (VolumeFileError, ImportError):
        raise
    except Exception as err:  # whatever a damaged file provokes in tifffile, zipfile or numpy
        raise VolumeFileError(
            f"{path}: not a readable {path.suffix.lower()} file ({type(err).__name__}: {err}); it may be truncated or"
            " damaged: export or copy it again"
        ) from err
    if volume.data.dtype.kind == "f" and not np.isfinite(volume.data).all():
        raise VolumeFileError(f"{path}: expected finite intensities, got NaN or infinity; replace them (by 0) first")
    return volume


def write_volume(
    path: str | os.PathLike,
    volume: np.ndarray | torch.Tensor,
    voxel_size_um: float | tuple[float, float, float] | None,
    channel_names: tuple[str, ...] = ("cell", "nucleus"),
) -> None:
    """Write one volume, axes CZYX, with voxel size and channel names; the suffix says how.

    ``.ome.tif``, ``.tif`` and ``.tiff``: OME-TIFF, zlib-compressed. ``.zarr``, best ``.ome.zarr``: a folder in
    OME-Zarr 0.4, the version that most viewers read. ``.npz``: NumPy, keys "volume", "voxel_size_um" and
    "channel_names".

    Intensities are stored as uint16, [0, 1] scaled to [0, 65535], which every viewer shows without further settings.
    The file (or folder) appears whole or not at all, and replaces an older one.

    Args:
        path: where to; folders are made as needed.
        volume: (M, D, H, W) in [0, 1].
        voxel_size_um: one edge length in µm, or three (z, y, x); None if unknown, which the file then says.
        channel_names: M names.

    Raises:
        ValueError: if the suffix, the shape, the range or the number of names is wrong.
        ImportError: if tifffile or ome-zarr is needed and not installed.
    """
    path = Path(path)
    writers = {".tif": _write_ome_tiff, ".tiff": _write_ome_tiff, ".zarr": _write_ome_zarr, ".npz": _write_npz}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"`path` must end in one of {', '.join(writers)}, got {path}")
    values = volume.detach().cpu().float().numpy() if isinstance(volume, torch.Tensor) else np.asarray(volume)
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"`volume` must have shape (M, D, H, W), got {values.shape}; write a batch cell by cell")
    if len(channel_names) != len(values):
        raise ValueError(f"`channel_names` must name {len(values)} channels, got {channel_names}")
    if values.dtype.kind not in "buif" or not (values.min() >= 0 and values.max() <= 1):  # `not` catches NaN
        raise ValueError("`volume` must lie in [0, 1]; use `VolumeProcessor.postprocess` on the output of a network")
    values = np.rint(values.astype(np.float64) * 65535).astype(np.uint16)
    voxel_size_um = None if voxel_size_um is None else voxel_size_triple(voxel_size_um)

    with whole_or_absent(path) as temporary:
        writer(temporary, Volume(values, voxel_size_um, tuple(channel_names)))


def write_ome_tiff(
    path: str | os.PathLike,
    volume: np.ndarray | torch.Tensor,
    voxel_size_um: float | tuple[float, float, float] | None = 1.0,
    channel_names: tuple[str, ...] = ("cell", "nucleus"),
) -> None:
    """`write_volume` for a path that must end in ``.tif`` or ``.tiff``."""
    if Path(path).suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"`path` must end in .tif or .tiff, got {path}")
    write_volume(path, volume, voxel_size_um, channel_names)


def _write_ome_tiff(path: Path, volume: Volume) -> None:
    metadata = {"axes": "CZYX", "Channel": {"Name": list(volume.channel_names)}}
    for axis, size_um in zip("ZYX", volume.voxel_size_um or (), strict=False):
        metadata |= {f"PhysicalSize{axis}": size_um, f"PhysicalSize{axis}Unit": "µm"}
    _tifffile().imwrite(
        path,
        volume.data,
        ome=True,
        photometric="minisblack",  # otherwise three or four slices are taken for colours
        compression="zlib",
        metadata=metadata,
    )


def _write_ome_zarr(path: Path, volume: Volume) -> None:
    zarr = optional("zarr", "zarr")
    zarr_format = {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) >= 3 else {}  # zarr 2 knows no other
    group = zarr.open_group(str(path), mode="w", **zarr_format)
    unit = {} if volume.voxel_size_um is None else {"unit": "micrometer"}
    scale = [1.0, *(volume.voxel_size_um or (1.0, 1.0, 1.0))]
    optional("ome_zarr.writer", "zarr").write_multiscale(
        [volume.data],
        group,
        fmt=optional("ome_zarr.format", "zarr").FormatV04(),
        axes=[{"name": "c", "type": "channel"}, *({"name": axis, "type": "space", **unit} for axis in "zyx")],
        coordinate_transformations=[[{"type": "scale", "scale": scale}]],
        storage_options={"chunks": (1, *volume.data.shape[1:])},
        name=path.name.split(".")[0],
    )
    window = {"start": 0, "end": 65535, "min": 0, "max": 65535}
    group.attrs["omero"] = {
        "channels": [
            {"label": name, "color": _CHANNEL_COLORS[index % len(_CHANNEL_COLORS)], "active": True, "window": window}
            for index, name in enumerate(volume.channel_names)
        ],
        "rdefs": {"model": "color"},
    }


def _write_npz(path: Path, volume: Volume) -> None:
    known = {} if volume.voxel_size_um is None else {"voxel_size_um": np.array(volume.voxel_size_um)}
    np.savez_compressed(path, volume=volume.data, channel_names=np.array(volume.channel_names, "U"), **known)


# TIFF


def _tifffile():
    return optional("tifffile", "data")


class _ErrorRecords(logging.Handler):
    """Collects what tifffile only logs: a truncated page chain is to it a shorter stack, to us a damaged file."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def _read_tiff(path: Path) -> Volume:
    tifffile = _tifffile()
    records = _ErrorRecords()
    logger = logging.getLogger("tifffile")
    logger.addHandler(records)
    try:
        with tifffile.TiffFile(path) as tiff:
            if tiff.is_ome:
                _check_ome_claims(path, tiff.ome_metadata)
            if len(tiff.series) != 1:
                raise VolumeFileError(
                    f"{path}: expected one image, got {len(tiff.series)}; save each cell in a file of its own"
                )
            series = tiff.series[0]
            if tiff.is_ome and series.kind != "ome":  # tifffile then guesses
                raise VolumeFileError(
                    f"{path}: the OME metadata do not describe the planes in the file; export the cell again, into one"
                    " file"
                )
            axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
            keep, order = _czyx(path, axes, shape)
            czyx_shape = [shape[keep[axis]] if axis >= 0 else 1 for axis in order]
            _check_header(path, czyx_shape, series.dtype, _TIFF_REMEDY)
            if any(page is None for page in series.pages):
                raise VolumeFileError(f"{path}: planes are missing; it may be truncated: export or copy it again")
            _check_segments(path, tiff, series)
            data = series.asarray().reshape([shape[axis] for axis in keep])
            voxel_size_um, channel_names = None, None
            if tiff.is_ome:
                voxel_size_um, channel_names = _ome_metadata(tiff.ome_metadata)
            elif tiff.is_imagej:
                voxel_size_um = _imagej_voxel_size(tiff)
    finally:
        logger.removeHandler(records)
    if records.messages:
        raise VolumeFileError(f"{path}: damaged TIFF ({records.messages[0]}); export or copy it again")

    if order[0] < 0:
        data, order = data[np.newaxis], [0, *(axis + 1 for axis in order[1:])]
    data = np.ascontiguousarray(data.transpose(order))
    if channel_names is not None and len(channel_names) != len(data):
        channel_names = None
    return Volume(data.astype(data.dtype.newbyteorder("="), copy=False), voxel_size_um, channel_names)


def _check_ome_claims(path: Path, xml: str) -> None:
    """Refuse sizes that tifffile would take minutes and gigabytes over before it looks at the data."""
    for pixels in ElementTree.fromstring(xml).iterfind(".//{*}Pixels"):
        num_voxels, num_planes = (
            math.prod(int(pixels.get(f"Size{axis}", "1")) for axis in axes) for axes in ("XYZCT", "ZCT")
        )
        claims = [
            int(data.get(name, "0"))
            for data in pixels.iterfind("{*}TiffData")
            for name in ("IFD", "PlaneCount", "FirstZ", "FirstC", "FirstT")
        ]
        if num_voxels > MAX_VOLUME_BYTES or max(num_planes, *claims, 0) > _MAX_PLANES:
            raise VolumeFileError(
                f"{path}: expected one cell of at most {MAX_VOLUME_BYTES} bytes, got OME metadata of {num_voxels}"
                f" voxels and {max(num_planes, *claims, 0)} planes; cut the single cells out of the stack first"
            )


def _check_segments(path: Path, tiff, series) -> None:
    """Refuse strips and tiles that lie outside the file, or unpack to more than they should hold."""
    file_size, largest = path.stat().st_size, math.prod(series.keyframe.chunks) * series.dtype.itemsize
    if largest > MAX_VOLUME_BYTES:
        raise VolumeFileError(f"{path}: expected strips or tiles of at most {MAX_VOLUME_BYTES} bytes, got {largest}")
    # only these unpack without limit, and deflate not to more than 1032 times its length
    unpackers = {8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor}
    unpacker = unpackers.get(int(series.keyframe.compression))
    if unpacker is zlib.decompressobj and file_size * 1032 <= MAX_VOLUME_BYTES:
        unpacker = None
    for page in series.pages:
        segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        if any(offset + count > file_size for offset, count in segments):
            raise VolumeFileError(f"{path}: data lie beyond the end; it may be truncated: export or copy it again")
        for offset, count in segments if unpacker else ():
            tiff.filehandle.seek(offset)
            if len(unpacker().decompress(tiff.filehandle.read(count), largest + 1)) > largest:
                raise VolumeFileError(f"{path}: a strip unpacks to more than {largest} bytes; export it again")


def _czyx(path: Path, axes: str, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Which axes of a TIFF series to keep, and which of the kept ones are C, Z, Y, X (-1: no channel axis)."""
    keep = [axis for axis, letter in enumerate(axes) if letter in "CZYXQI" or shape[axis] > 1]
    letters = [axes[axis] for axis in keep]
    # Q and I are tifffile's names for axes that the file leaves unnamed: channels come before slices
    unnamed = [position for position, letter in enumerate(letters) if letter in "QI"]
    missing = [letter for letter in "CZ" if letter not in letters]
    if len(unnamed) < len(missing):
        missing = [letter for letter in missing if letter == "Z"]
    if len(unnamed) == len(missing):
        for position, letter in zip(unnamed, missing, strict=True):
            letters[position] = letter
    if sorted(letters) not in (["C", "X", "Y", "Z"], ["X", "Y", "Z"]):
        sizes = ", ".join(f"{letter}={length}" for letter, length in zip(axes, shape, strict=True))
        problem = "a time series" if "T" in letters else "a 2D image" if "Z" not in letters else "something else"
        raise VolumeFileError(
            f"{path}: expected a volume with axes C, Z, Y, X, got {problem} ({sizes}; T time, S colour, Q or I"
            f" unnamed); {_TIFF_REMEDY}"
        )
    return keep, [letters.index(letter) if letter in letters else -1 for letter in "CZYX"]


def _ome_metadata(xml: str) -> tuple[tuple[float, float, float] | None, tuple[str, ...] | None]:
    pixels = ElementTree.fromstring(xml).find(".//{*}Pixels")
    sizes = []
    for axis in "ZYX":
        size = float(pixels.get(f"PhysicalSize{axis}", "nan"))
        sizes.append(size * _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), math.nan))
    names = tuple(channel.get("Name", "") for channel in pixels.findall("{*}Channel"))
    return _known(sizes), names if names and all(names) else None


def _imagej_voxel_size(tiff) -> tuple[float, float, float] | None:
    metadata, tags = tiff.imagej_metadata, tiff.pages[0].tags
    if "spacing" not in metadata or "XResolution" not in tags or "YResolution" not in tags:
        return None
    unit = re.sub(r"\\u00[bB]5", "µ", str(metadata.get("unit", "")))  # ImageJ writes µ as an escape
    sizes = [float(metadata["spacing"])]
    for name in ("YResolution", "XResolution"):
        pixels, units = tags[name].value
        sizes.append(units / pixels if pixels else math.nan)
    return _known([size * _MICROMETRES.get(unit, math.nan) for size in sizes])


def _known(sizes: list[float]) -> tuple[float, float, float] | None:
    return tuple(sizes) if all(math.isfinite(size) and size > 0 for size in sizes) else None


# NumPy


_NUMPY_REMEDY = "save numbers in the order (C, Z, Y, X), one cell a file; one channel is volume[np.newaxis]"


def _read_npy(path: Path) -> Volume:
    with open(path, "rb") as file:
        return Volume(_read_array(path, file, path.stat().st_size))


def _read_npz(path: Path) -> Volume:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        name = names[0] if len(names) == 1 else "volume.npy"
        if name not in names:
            raise VolumeFileError(f'{path}: expected one array, or one named "volume", got {names[:8]}; rename it')
        data = _read_member(path, archive, name)
        voxel_size_um, channel_names = None, None
        if "voxel_size_um.npy" in names:
            voxel_size_um = voxel_size_triple(
                tuple(np.broadcast_to(_read_member(path, archive, "voxel_size_um.npy", _check_sizes), 3).tolist())
            )
        if "channel_names.npy" in names:
            channel_names = tuple(_read_member(path, archive, "channel_names.npy", _check_names).tolist())
    return Volume(data, voxel_size_um, channel_names if channel_names and len(channel_names) == len(data) else None)


def _read_member(path: Path, archive: zipfile.ZipFile, name: str, check=None) -> np.ndarray:
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others can claim gigabytes to unpack
        raise VolumeFileError(f"{path}: expected NumPy's own compression, got another; save it by numpy.savez")
    with archive.open(info) as file:
        return _read_array(path, file, info.file_size, check)


def _read_array(path: Path, file, num_bytes: int, check=None) -> np.ndarray:
    """Read a .npy stream of `num_bytes`; its header is checked before memory is asked for."""
    start = io.BytesIO(file.read(_MAX_HEADER_BYTES))  # NumPy would read as long a header as the file claims
    version = np.lib.format.read_magic(start)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise VolumeFileError(f"{path}: expected .npy format 1.0 or 2.0, got {version}; {_NUMPY_REMEDY}")
    shape, is_fortran, dtype = read_header(start)
    (check or _check_header)(path, shape, dtype, _NUMPY_REMEDY)
    expected = math.prod(shape) * dtype.itemsize
    if num_bytes - start.tell() != expected:
        raise VolumeFileError(
            f"{path}: shape {shape} of {dtype} needs {expected} bytes, got {num_bytes - start.tell()}; it may be"
            " truncated or damaged: export or copy it again"
        )
    values = np.empty(expected, np.uint8)
    rest = start.read()
    values[: len(rest)] = np.frombuffer(rest, np.uint8)
    filled = len(rest)
    while filled < expected:  # piece by piece: a zip member would be unpacked into a second copy
        count = file.readinto(memoryview(values)[filled : filled + 2**20])
        if not count:
            raise VolumeFileError(
                f"{path}: shape {shape} of {dtype} needs {expected} bytes, got {filled}; copy it again"
            )
        filled += count
    values = values.view(dtype).reshape(shape, order="F" if is_fortran else "C")
    return np.ascontiguousarray(values).astype(dtype.newbyteorder("="), copy=False)


def _check_sizes(path: Path, shape, dtype: np.dtype, remedy: str) -> None:
    if shape not in ((), (1,), (3,)) or dtype.kind not in "uif":
        raise VolumeFileError(f"{path}: expected one or three numbers as voxel_size_um, got shape {shape} of {dtype}")


def _check_names(path: Path, shape, dtype: np.dtype, remedy: str) -> None:
    if len(shape) != 1 or dtype.kind != "U" or shape[0] * dtype.itemsize > _MAX_HEADER_BYTES:
        raise VolumeFileError(f"{path}: expected a list of short texts as channel_names, got shape {shape} of {dtype}")


def _check_header(path: Path, shape, dtype: np.dtype, remedy: str) -> None:
    """Refuse by shape and number type alone, before anything of that size is in memory."""
    if dtype.kind not in "buif":
        raise VolumeFileError(f"{path}: expected integers or real floats, got dtype {dtype}; {remedy}")
    if len(shape) != 4:
        raise VolumeFileError(f"{path}: not 3D: expected 4 axes (C, Z, Y, X), got shape {tuple(shape)}; {remedy}")
    if shape[0] < 1 or min(shape[1:]) < 2:
        raise VolumeFileError(
            f"{path}: not 3D: expected at least 2 voxels in z, y and x, got (C, Z, Y, X) = {tuple(shape)}; {remedy}"
        )
    if math.prod(shape) * dtype.itemsize > MAX_VOLUME_BYTES:
        raise VolumeFileError(
            f"{path}: expected one cell of at most {MAX_VOLUME_BYTES} bytes, got shape {tuple(shape)} of {dtype}; cut"
            " the single cells out of the stack first"
        )
