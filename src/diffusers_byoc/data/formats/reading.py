"""Which file is read and written by which module, and how one file becomes one volume.

To add a file format: a module with `open_images(path) -> list[OpenImage]`, and `WRITES` and `write(path, volume)` if
it can, and a row for each of its endings in `FORMATS`.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...volumes import voxel_size_triple
from ...whole_files import whole_or_absent
from . import imaris, microscopes, nifti, numpy_files, ome_zarr, tiff
from .volume import (
    DAMAGE_REMEDY,
    MAX_VOLUME_BYTES,
    OpenImage,
    Volume,
    VolumeFileError,
    check_numbers,
    czyx,
    damage_as_error,
)


if TYPE_CHECKING:
    import torch


FORMATS = {
    ".tif": tiff,
    ".tiff": tiff,
    ".npy": numpy_files,
    ".npz": numpy_files,
    ".zarr": ome_zarr,
    ".nii": nifti,
    ".nii.gz": nifti,
    ".ims": imaris,
    ".czi": microscopes,
    ".nd2": microscopes,
    ".lif": microscopes,
}


def ending_of(path: str | os.PathLike) -> str:
    """The ending of a path that says its format, in lower case; "" if there is none of `FORMATS`.

    A folder within an OME-Zarr (a field of a plate, a label image) has that of the whole.
    """
    path = Path(path)
    name = path.name.lower()
    found = max((ending for ending in FORMATS if name.endswith(ending)), key=len, default="")
    if not found and any(parent.suffix.lower() == ".zarr" for parent in path.parents):
        return ".zarr"
    return found


def open_images(path: str | os.PathLike) -> list[OpenImage]:
    """The images of a file of any format, of which nothing but the description is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, damaged, or of no format that is known.
        ImportError: if what reads this format is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Expected a file, got {path}, which does not exist. Check the path.")
    if path.is_file() and path.stat().st_size == 0:
        raise VolumeFileError(f"Expected an image, got {path}, an empty file (0 bytes). Export or copy it again.")
    ending = ending_of(path)
    if not ending or path.is_dir() != (ending == ".zarr"):
        kind = "a folder" if path.is_dir() else f"a file ending in {path.suffix!r}"
        raise VolumeFileError(f"Expected one of {', '.join(FORMATS)}, got {path}, {kind}. Convert it.")
    with damage_as_error(path):
        return FORMATS[ending].open_images(path)


def read_volume(path: str | os.PathLike) -> Volume:
    """Read one volume.

    Axes are taken from the file's metadata and put into the order CZYX; T and S axes are accepted at length 1 only. A
    file that does not name its axes is read so: four axes are (C, Z, Y, X), three axes are (Z, Y, X) of one channel.
    A ``.npz`` holds one array, or the volume under the key "volume". Voxel sizes are read from the metadata of OME,
    ImageJ, OME-Zarr, NIfTI, Imaris and the microscopes, each axis in its own unit, and from the key "voxel_size_um" of
    a ``.npz``; channel names where a format has them, and from the key "channel_names".

    Args:
        path: a file (or the folder of an OME-Zarr) of one of `FORMATS`, at most `MAX_VOLUME_BYTES` once unpacked.

    Returns:
        The volume; integers, booleans or finite floats, at least two voxels long in z, y and x.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, unreadable, truncated, too large, says a voxel size that can be none, or is
            not a (C, Z, Y, X) volume of finite real numbers.
        ImportError: if what reads this format, or its codec, is not installed.
    """
    path = Path(path)
    images = open_images(path)
    try:
        with damage_as_error(path):
            if len(images) != 1:
                names = ", ".join(image.name for image in images[:8])
                raise VolumeFileError(
                    f"Expected one image in {path}, got {len(images)} ({names}). Save each cell in a file of its own."
                )
            (image,) = images
            check_numbers(path, image.dtype)
            shape, arrange = czyx(image)
            if image.num_bytes > MAX_VOLUME_BYTES:
                raise VolumeFileError(
                    f"Expected one cell of at most {MAX_VOLUME_BYTES} bytes in {path}, got shape {shape} of"
                    f" {image.dtype}. Cut the single cells out of the stack first (byoc-prepare)."
                )
            if image.voxel_size.is_wrong:
                raise VolumeFileError(
                    f"Expected a voxel size in {path}, got {image.voxel_size.stated}. Correct it, or save the file"
                    " without one."
                )
            data = np.ascontiguousarray(arrange(image.read()))
            if data.shape != shape:
                raise VolumeFileError(f"Expected shape {shape} in {path}, got {data.shape}. {DAMAGE_REMEDY}")
            data = data.astype(data.dtype.newbyteorder("="), copy=False)
            if data.dtype.kind == "f" and not np.isfinite(data).all():
                raise VolumeFileError(
                    f"Expected finite intensities in {path}, got NaN or infinity. Replace them (by 0) first."
                )
            names = image.channel_names
            return Volume(data, image.voxel_size.um, names if names and len(names) == len(data) else None)
    finally:
        for image in images:
            image.close()


def write_volume(
    path: str | os.PathLike,
    volume: "np.ndarray | torch.Tensor",
    voxel_size_um: float | tuple[float, float, float] | None,
    channel_names: tuple[str, ...] = ("cell", "nucleus"),
) -> None:
    """Write one volume, axes CZYX, with voxel size and channel names; the ending says how.

    ``.ome.tif``, ``.tif`` and ``.tiff``: OME-TIFF, zlib-compressed. ``.zarr``, best ``.ome.zarr``: a folder in
    OME-Zarr 0.4, the version that most viewers read. ``.npz``: NumPy, keys "volume", "voxel_size_um" and
    "channel_names". ``.nii`` and ``.nii.gz``: NIfTI-1, without channel names.

    Intensities are stored as uint16, [0, 1] scaled to [0, 65535], which every viewer shows without further settings.
    The file (or folder) appears whole or not at all, and replaces an older one.

    Args:
        path: where to; folders are made as needed.
        volume: (M, D, H, W) in [0, 1].
        voxel_size_um: one edge length in µm, or three (z, y, x); None if unknown, which the file then says.
        channel_names: M names.

    Raises:
        ValueError: if the ending, the shape, the range or the number of names is wrong.
        ImportError: if what writes this format is not installed.
    """
    path, ending = Path(path), ending_of(path)
    writers = {name: module.write for name, module in FORMATS.items() if name in getattr(module, "WRITES", ())}
    if ending not in writers:
        raise ValueError(f"Expected a path that ends in one of {', '.join(writers)}, got {path}. Choose one of these.")
    stored = stored_volume(volume, voxel_size_um, channel_names)
    with whole_or_absent(path) as temporary:
        writers[ending](temporary, stored)


def stored_volume(
    volume: "np.ndarray | torch.Tensor",
    voxel_size_um: float | tuple[float, float, float] | None,
    channel_names: tuple[str, ...],
) -> Volume:
    """A volume in [0, 1] as files hold it: uint16, [0, 1] scaled to [0, 65535]; arguments as in `write_volume`.

    Raises:
        ValueError: if the shape, the range or the number of names is wrong.
    """
    values = volume.detach().cpu().float().numpy() if hasattr(volume, "detach") else np.asarray(volume)
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"Expected a volume of shape (M, D, H, W), got {values.shape}. Write a batch cell by cell.")
    if len(channel_names) != len(values):
        raise ValueError(f"Expected {len(values)} names in `channel_names`, got {channel_names}. Name every channel.")
    if values.dtype.kind not in "buif" or not (values.min() >= 0 and values.max() <= 1):  # `not` catches NaN
        raise ValueError(
            f"Expected a volume in [0, 1], got {values.dtype} of [{values.min()}, {values.max()}]. Use"
            " `VolumeProcessor.postprocess` on the output of a network."
        )
    values = np.rint(values.astype(np.float64) * 65535).astype(np.uint16)
    voxel_size_um = None if voxel_size_um is None else voxel_size_triple(voxel_size_um)
    return Volume(values, voxel_size_um, tuple(channel_names))


def write_ome_tiff(
    path: str | os.PathLike,
    volume: "np.ndarray | torch.Tensor",
    voxel_size_um: float | tuple[float, float, float] | None = 1.0,
    channel_names: tuple[str, ...] = ("cell", "nucleus"),
) -> None:
    """`write_volume` for a path that must end in ``.tif`` or ``.tiff``."""
    if ending_of(path) not in (".tif", ".tiff"):
        raise ValueError(f"Expected a path that ends in .tif or .tiff, got {path}. Choose one, or call write_volume.")
    write_volume(path, volume, voxel_size_um, channel_names)
