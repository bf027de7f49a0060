"""One cell as a row of a table: the form in which data sets are written to Parquet and shared on the Hub.

The voxels are the bytes of the C-ordered array, little-endian, compressed by zlib; everything else stands beside them
in columns of its own, so that a table can be filtered without unpacking a volume.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np

from ...volumes import voxel_size_triple
from .volume import MAX_VOLUME_BYTES, Volume, VolumeFileError


def encode_volume(volume: Volume) -> dict:
    """The columns of one volume: `volume` (bytes), `shape`, `dtype`, `voxel_size_um`, `channel_names`.

    Args:
        volume: (C, Z, Y, X) of integers, booleans or floats.
    """
    data = np.ascontiguousarray(volume.data, volume.data.dtype.newbyteorder("<"))
    return {
        "volume": zlib.compress(data.tobytes(), level=1),  # higher levels are slower and hardly smaller
        "shape": list(data.shape),
        "dtype": data.dtype.name,
        "voxel_size_um": None if volume.voxel_size_um is None else list(volume.voxel_size_um),
        "channel_names": None if volume.channel_names is None else list(volume.channel_names),
    }


def decode_volume(row: Mapping, column: str = "volume") -> Volume:
    """The inverse of `encode_volume`.

    Args:
        row: the columns that `encode_volume` makes; others are ignored.
        column: name of the one that holds the bytes.

    Raises:
        ValueError: if a column is missing, or the bytes are damaged or not of the shape and type stated. Never more
            than `MAX_VOLUME_BYTES` are unpacked.
    """
    missing = {column, "shape", "dtype"} - set(row)
    if missing:
        raise VolumeFileError(
            f"Expected the columns {column}, shape and dtype, got none named {sorted(missing)}. Add them."
        )
    shape, dtype = tuple(row["shape"] or ()), _dtype(row["dtype"])
    if len(shape) != 4 or not all(isinstance(length, int) and length > 0 for length in shape):
        raise VolumeFileError(f"Expected shape (C, Z, Y, X), got {shape}. Write the data set again.")
    expected = math.prod(shape) * dtype.itemsize
    if expected > MAX_VOLUME_BYTES:
        raise VolumeFileError(
            f"Expected shape (C, Z, Y, X) of at most {MAX_VOLUME_BYTES} bytes, got {shape}. Leave the cell out."
        )
    if not isinstance(row[column], bytes):
        raise VolumeFileError(
            f"Expected bytes in the column {column}, got {type(row[column]).__name__}. Write the data set again."
        )
    inflate = zlib.decompressobj()
    try:
        unpacked = inflate.decompress(row[column], max_length=expected + 1)  # + 1, so that too much is seen
    except zlib.error as error:
        raise VolumeFileError(f"Expected a volume, got damaged bytes ({error}). Write the data set again.") from error
    if len(unpacked) != expected or not inflate.eof:
        raise VolumeFileError(
            f"Expected {expected} bytes for shape {shape} of {dtype}, got another number. Write the data set again."
        )
    data = np.frombuffer(bytearray(unpacked), dtype).reshape(shape)
    voxel_size_um, channel_names = row.get("voxel_size_um"), row.get("channel_names")
    return Volume(
        data.astype(dtype.newbyteorder("="), copy=False),
        None if voxel_size_um is None else voxel_size_triple(voxel_size_um),
        None if channel_names is None else tuple(channel_names),
    )


def _dtype(name: str) -> np.dtype:
    try:
        dtype = np.dtype(str(name)).newbyteorder("<")  # of None, NumPy would make float64
    except TypeError as error:
        raise VolumeFileError(f"Expected a number type, got dtype {name!r}. Write the data set again.") from error
    if dtype.kind not in "buif":
        raise VolumeFileError(f"Expected integers or real floats, got dtype {name!r}. Convert them.")
    return dtype
