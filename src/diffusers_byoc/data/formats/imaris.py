"""Imaris ``.ims``, which is HDF5, through h5py: full resolution, all channels, all time points."""

from pathlib import Path

import numpy as np

from ...optional import optional
from .units import Step, voxel_size_of
from .volume import DAMAGE_REMEDY, OpenImage, VolumeFileError


def open_images(path: Path) -> list[OpenImage]:
    """The image of a file.

    Raises:
        ValueError: if it is no file of Imaris.
        ImportError: if h5py is not installed.
    """
    file = optional("h5py", "imaris").File(path, "r")
    try:
        times = [file[f"DataSet/ResolutionLevel 0/TimePoint {time}"] for time in range(_count(file, "TimePoint "))]
        channels = [[time[f"Channel {index}/Data"] for index in range(len(times[0]))] for time in times]
        info = file["DataSetInfo/Image"].attrs
        lengths = {axis: int(_text(info[axis])) for axis in "ZYX"}
    except (KeyError, IndexError) as error:
        file.close()
        raise VolumeFileError(f"Expected what Imaris writes in {path}, got none of it. {DAMAGE_REMEDY}") from error
    shape = (len(channels), len(channels[0]), *lengths.values())
    box = tuple(slice(length) for length in lengths.values())  # files are padded to whole chunks
    steps = {}
    for number, axis in enumerate("XYZ"):
        if f"ExtMin{number}" in info and f"ExtMax{number}" in info:
            low, high = (float(_text(info[f"{end}{number}"])) for end in ("ExtMin", "ExtMax"))
            steps[axis] = Step((high - low) / lengths[axis], _text(info.get("Unit", "")))
    descriptions = [file["DataSetInfo"].get(f"Channel {index}") for index in range(shape[1])]
    names = tuple("" if group is None else _text(group.attrs.get("Name", "")) for group in descriptions)

    def lazy():
        dask_array = optional("dask.array", "data")
        return dask_array.stack(
            [dask_array.stack([dask_array.from_array(data)[box] for data in time]) for time in channels]
        )

    return [
        OpenImage(
            path=path,
            axes="TCZYX",
            shape=shape,
            dtype=channels[0][0].dtype,
            read=lambda: np.stack([np.stack([data[box] for data in time]) for time in channels]),
            lazy=lazy,
            voxel_size=voxel_size_of(steps),
            channel_names=names if all(names) else None,
            close=file.close,
        )
    ]


def _count(file, prefix: str) -> int:
    return sum(name.startswith(prefix) for name in file["DataSet/ResolutionLevel 0"])


def _text(attribute) -> str:
    """Imaris writes texts as arrays of single characters."""
    if isinstance(attribute, str):
        return attribute
    if isinstance(attribute, bytes):
        return attribute.decode("latin-1").strip("\0 ")
    return b"".join(np.asarray(attribute).ravel().tolist()).decode("latin-1").strip("\0 ")
