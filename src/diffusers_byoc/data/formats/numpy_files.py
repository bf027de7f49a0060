"""NumPy's files: ``.npy``, ``.npz``, and of Cellpose's ``_seg.npy`` the label image. None is ever run."""

import io
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np

from ...optional import optional
from ...volumes import voxel_size_triple
from .units import VoxelSize
from .volume import DAMAGE_REMEDY, MAX_VOLUME_BYTES, OpenImage, Volume, VolumeFileError


MAX_ARRAY_BYTES = 2**34  # an array in an archive, or in a pickle, is read whole
MAX_HEADER_BYTES = 2**16

_REMEDY = "Save numbers in the order (C, Z, Y, X), one cell a file; one channel is volume[np.newaxis]."
_SEG_REMEDY = (
    "Save the labels as TIFF: in Cellpose by save_tif or --save_tif, or"
    ' tifffile.imwrite("masks.tif", np.load(FILE, allow_pickle=True).item()["masks"]), which runs what the file holds.'
)

WRITES = (".npz",)


def open_images(path: Path) -> list[OpenImage]:
    """The one array of a file; four axes are (C, Z, Y, X), three are (Z, Y, X).

    Raises:
        ValueError: if the file is damaged, or no array of numbers.
    """
    if path.suffix.lower() == ".npz":
        return _open_npz(path)
    with open(path, "rb") as file:
        shape, _, dtype, start = _read_header(path, file.read(MAX_HEADER_BYTES))
    if dtype.hasobject:
        return [_of_array(path, _read_seg_masks(path, start))]
    _check_size(path, shape, dtype, path.stat().st_size - start)

    def read():
        with open(path, "rb") as file:
            return _read_array(path, file, path.stat().st_size)

    def lazy():
        array = np.lib.format.open_memmap(path, mode="r")
        chunks = (*(1,) * (array.ndim - 2), *array.shape[-2:])
        return optional("dask.array", "data").from_array(array, chunks).astype(dtype.newbyteorder("="))

    return [_image(path, shape, dtype, read, lazy)]


def write(path: Path, volume: Volume) -> None:
    """Keys "volume", "voxel_size_um" and "channel_names"."""
    known = {} if volume.voxel_size_um is None else {"voxel_size_um": np.array(volume.voxel_size_um)}
    np.savez_compressed(path, volume=volume.data, channel_names=np.array(volume.channel_names, "U"), **known)


def _image(path: Path, shape, dtype: np.dtype, read, lazy=None, **known) -> OpenImage:
    axes = {2: "YX", 3: "ZYX", 4: "CZYX"}.get(len(shape))
    if axes is None:
        raise VolumeFileError(f"Expected 4 axes (C, Z, Y, X) in {path}, got shape {tuple(shape)}. {_REMEDY}")
    return OpenImage(
        path=path,
        axes=axes,
        shape=tuple(shape),
        dtype=dtype.newbyteorder("="),
        read=read,
        lazy=lazy or (lambda: optional("dask.array", "data").from_array(read())),
        **known,
    )


def _of_array(path: Path, array: np.ndarray) -> OpenImage:
    return _image(path, array.shape, array.dtype, lambda: array)


def _open_npz(path: Path) -> list[OpenImage]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        name = names[0] if len(names) == 1 else "volume.npy"
        if name not in names:
            raise VolumeFileError(f'Expected one array, or one named "volume", in {path}, got {names[:8]}. Rename it.')
        size, channel_names = VoxelSize(None, "nothing"), None
        if "voxel_size_um.npy" in names:
            numbers = _read_member(path, archive, "voxel_size_um.npy", _check_sizes).astype(float).tolist()
            try:
                size = VoxelSize(voxel_size_triple(numbers), f"{numbers} µm")
            except ValueError:
                size = VoxelSize(None, f"{numbers} µm", is_wrong=True)
        if "channel_names.npy" in names:
            channel_names = tuple(_read_member(path, archive, "channel_names.npy", _check_names).tolist()) or None
        with _member(path, archive, name) as file:
            shape, _, dtype, start = _read_header(path, file.read(MAX_HEADER_BYTES))
        _check_size(path, shape, dtype, archive.getinfo(name).file_size - start)

    def read():
        with zipfile.ZipFile(path) as archive:
            return _read_member(path, archive, name)

    return [_image(path, shape, dtype, read, voxel_size=size, channel_names=channel_names)]


def _member(path: Path, archive: zipfile.ZipFile, name: str):
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others can claim gigabytes to unpack
        raise VolumeFileError(f"Expected NumPy's own compression in {path}, got another. Save it by numpy.savez.")
    return archive.open(info)


def _read_member(path: Path, archive: zipfile.ZipFile, name: str, check=None) -> np.ndarray:
    with _member(path, archive, name) as file:
        return _read_array(path, file, archive.getinfo(name).file_size, check)


def _read_header(path: Path, beginning: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, number type, and where the numbers begin."""
    start = io.BytesIO(beginning)  # NumPy would read as long a header as the file claims
    version = np.lib.format.read_magic(start)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise VolumeFileError(f"Expected .npy format 1.0 or 2.0 in {path}, got {version}. {_REMEDY}")
    return *read_header(start), start.tell()


def _read_array(path: Path, file, num_bytes: int, check=None) -> np.ndarray:
    """Read a .npy stream of `num_bytes`; its header is checked before memory is asked for."""
    beginning = file.read(MAX_HEADER_BYTES)
    shape, is_fortran, dtype, start = _read_header(path, beginning)
    (check or _check_size)(path, shape, dtype, num_bytes - start)
    expected = math.prod(shape) * dtype.itemsize
    values = np.empty(expected, np.uint8)
    rest = beginning[start : start + expected]
    values[: len(rest)] = np.frombuffer(rest, np.uint8)
    filled = len(rest)
    while filled < expected:  # piece by piece: a zip member would be unpacked into a second copy
        count = file.readinto(memoryview(values)[filled : filled + 2**20])
        if not count:
            raise _too_short(path, shape, dtype, filled)
        filled += count
    values = values.view(dtype).reshape(shape, order="F" if is_fortran else "C")
    return np.ascontiguousarray(values).astype(dtype.newbyteorder("="), copy=False)


def _too_short(path: Path, shape, dtype: np.dtype, num_bytes: int) -> VolumeFileError:
    expected = math.prod(shape) * dtype.itemsize
    return VolumeFileError(
        f"Expected {expected} bytes in {path} for shape {tuple(shape)} of {dtype}, got {num_bytes}. {DAMAGE_REMEDY}"
    )


def _check_size(path: Path, shape, dtype: np.dtype, num_bytes: int) -> None:
    """Refuse by shape and number type alone, before anything of that size is in memory."""
    if dtype.kind not in "buif":
        raise VolumeFileError(f"Expected integers or real floats in {path}, got dtype {dtype}. {_REMEDY}")
    if math.prod(shape) * dtype.itemsize > MAX_ARRAY_BYTES:
        raise VolumeFileError(
            f"Expected at most {MAX_ARRAY_BYTES} bytes in {path}, got shape {tuple(shape)} of {dtype}. Save it as"
            " OME-TIFF or OME-Zarr, of which parts can be read."
        )
    if num_bytes != math.prod(shape) * dtype.itemsize:
        raise _too_short(path, shape, dtype, num_bytes)


def _check_sizes(path: Path, shape, dtype: np.dtype, num_bytes: int) -> None:
    if shape not in ((), (1,), (3,)) or dtype.kind not in "uif":
        raise VolumeFileError(
            f"Expected one or three numbers as voxel_size_um in {path}, got shape {shape} of {dtype}. Save these."
        )
    if num_bytes != math.prod(shape) * dtype.itemsize:
        raise _too_short(path, shape, dtype, num_bytes)


def _check_names(path: Path, shape, dtype: np.dtype, num_bytes: int) -> None:
    if len(shape) != 1 or dtype.kind != "U" or shape[0] * dtype.itemsize > MAX_HEADER_BYTES:
        raise VolumeFileError(
            f"Expected a list of short texts as channel_names in {path}, got shape {shape} of {dtype}. Save these."
        )
    if num_bytes != math.prod(shape) * dtype.itemsize:
        raise _too_short(path, shape, dtype, num_bytes)


# Cellpose's _seg.npy: a pickled dictionary, of which plain arrays are taken and nothing is run


class _PickledDtype:
    def __init__(self, text: str, *_):
        self.text, self.order = text, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _PickledArray:
    """Stands for an array that a pickle describes: its shape, number type and bytes, checked before it is made."""

    state = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self, path: Path) -> np.ndarray:
        _, shape, dtype, is_fortran, content = self.state
        if not isinstance(dtype, _PickledDtype) or not isinstance(content, bytes):
            raise VolumeFileError(f"Expected plain numbers as masks in {path}, got something else. {_SEG_REMEDY}")
        dtype = np.dtype(dtype.text).newbyteorder({"|": "=", "=": "="}.get(dtype.order, dtype.order))
        _check_size(path, shape, dtype, len(content))
        array = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
        return np.ascontiguousarray(array).astype(dtype.newbyteorder("="))


class _ArraysOnly(pickle.Unpickler):
    """Makes what stands for arrays; whatever else a pickle asks for is refused, so that nothing can be run."""

    def find_class(self, module: str, name: str):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return _PickledArray if name == "ndarray" else _PickledDtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return lambda *_: _PickledArray()
            if name == "scalar":
                return lambda *_: None
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_seg_masks(path: Path, start: int) -> np.ndarray:
    """The label image in the dictionary that Cellpose's graphical interface saves."""
    if path.stat().st_size > MAX_VOLUME_BYTES * 4:
        raise VolumeFileError(f"Expected a _seg.npy of at most 4 GB, got {path}, which is larger. {_SEG_REMEDY}")
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()[start:])).load()
    except pickle.UnpicklingError as error:
        if "truncated" in str(error) or "invalid load key" in str(error):
            raise
        raise VolumeFileError(
            f"Expected arrays of plain numbers in {path}, got {error}, which cannot be read without running code."
            f" {_SEG_REMEDY}"
        ) from error
    if isinstance(content, _PickledArray):  # the array () of one object
        content = content.state[4][0] if isinstance(content.state[4], list) else content
    masks = content.get("masks") if isinstance(content, dict) else None
    if not isinstance(masks, _PickledArray):
        raise VolumeFileError(
            f"Expected numbers, or Cellpose's dictionary with an array of masks, in {path}, got other Python objects."
            f" {_SEG_REMEDY}"
        )
    return masks.array(path)
