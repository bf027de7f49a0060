"""NIfTI, ``.nii`` and ``.nii.gz``, through nibabel: the axes x, y, z, time (or channel), channel."""

from pathlib import Path

import numpy as np

from ...optional import optional
from .units import NOT_STATED, Step, voxel_size_of
from .volume import OpenImage, Volume


_MICRON = 3  # of the header's xyzt_units
_TIME_UNITS = 0b111000

WRITES = (".nii", ".nii.gz")


def open_images(path: Path) -> list[OpenImage]:
    """The image of a file. A fourth axis is time if the header gives it a unit of time, otherwise channels.

    Raises:
        ImportError: if nibabel is not installed.
    """
    # nibabel would mend what is wrong in a header, and say so in its log
    with optional("nibabel.imageglobals", "nifti").ErrorLevel(30):
        image = optional("nibabel", "nifti").load(path)
    header = image.header
    has_time = int(header["xyzt_units"]) & _TIME_UNITS
    axes = "XYZ" + {4: "T" if has_time else "C", 5: "TC"}.get(image.ndim, "SSSS"[: image.ndim - 3])
    unit = header.get_xyzt_units()[0]
    lengths = [float(length) for length in header["pixdim"][1:4]]
    steps = {axis: Step(length, unit) for axis, length in zip("XYZ", lengths, strict=True)}
    proxy = image.dataobj
    scaled = proxy.slope != 1 or proxy.inter != 0

    def lazy():
        return optional("dask.array", "data").from_array(proxy, chunks=(*image.shape[:3], *(1,) * (image.ndim - 3)))

    return [
        OpenImage(
            path=path,
            axes=axes[: image.ndim],
            shape=tuple(image.shape),
            dtype=np.dtype("float64") if scaled else image.get_data_dtype().newbyteorder("="),
            read=lambda: np.asanyarray(proxy),
            lazy=lazy,
            voxel_size=NOT_STATED if unit == "unknown" else voxel_size_of(steps),
        )
    ]


def write(path: Path, volume: Volume) -> None:
    """NIfTI-1: channels on the fifth axis, as the standard has it, steps in µm; it has no place for channel names."""
    nibabel = optional("nibabel", "nifti")
    data = volume.data.transpose(3, 2, 1, 0)[:, :, :, None]  # (X, Y, Z, 1, C)
    sizes = (volume.voxel_size_um or (1.0, 1.0, 1.0))[::-1]
    image = nibabel.Nifti1Image(data, np.diag([*sizes, 1.0]))
    image.header.set_intent("vector")
    image.header["xyzt_units"] = 0 if volume.voxel_size_um is None else _MICRON
    nibabel.save(image, path)
