"""Stacks of many cells and their label images, as microscopes and segmentation write them.

A stack may be larger than memory: it is opened without being read, and each cell reads its own box of it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..formats.reading import open_images
from ..formats.units import NOT_STATED
from ..formats.volume import (
    DAMAGE_REMEDY,
    MAX_IMAGE_BYTES,
    OpenImage,
    VolumeFileError,
    check_numbers,
    czyx,
    damage_as_error,
)


@dataclass
class Stack:
    """A stack of many cells.

    Args:
        path: where it comes from.
        data: (C, Z, Y, X) intensities or labels; a NumPy array, or a dask array of which nothing is read yet.
        voxel_size_um: edge lengths (z, y, x) of a voxel in µm; None where the file does not say.
        channel_names: C names.
        stated_size: what the file says of the size of its voxels, in words.
    """

    path: Path
    data: "np.ndarray | dask.array.Array"  # noqa: F821 (dask is optional)
    voxel_size_um: tuple[float, float, float] | None
    channel_names: tuple[str, ...]
    stated_size: str = NOT_STATED.stated


def open_stack(
    path: str | os.PathLike, scene: str | None = None, max_gb: float = 4.0, time: int | None = None
) -> Stack:
    """Open a stack of any format of `formats.reading.FORMATS`.

    The voxel size is converted to µm from the unit that the file states for each axis; a size without a unit (a plain
    TIFF, an OME-Zarr axis that names none) counts as not known.

    Args:
        path: the file, or the folder of an OME-Zarr.
        scene: name or number of the image, for a file of several; its voxel size and channels are its own.
        max_gb: memory in 10⁹ bytes. A stack that is larger is left on disk and read box by box.
        time: number of the time point, for a series.

    Returns:
        The stack; Z, Y and X are at least two voxels long.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no readable stack of Z, Y, X and at most one more axis, C.
        ImportError: if what reads this format is not installed.
    """
    path = Path(path)
    images = open_images(path)
    with damage_as_error(path):
        image = choose_image(path, images, scene)
        check_numbers(path, image.dtype)
        shape, arrange = czyx(image, time)
        if image.num_bytes > MAX_IMAGE_BYTES:
            raise VolumeFileError(
                f"Expected at most {MAX_IMAGE_BYTES / 1e9:.0f} GB in {path}, got a header of"
                f" {image.num_bytes / 1e9:.0f} GB. {DAMAGE_REMEDY}"
            )
        data = arrange(image.lazy())
        largest_chunk = math.prod(data.chunksize) * data.dtype.itemsize
        if data.nbytes > max_gb * 1e9 and largest_chunk > max_gb * 1e9:
            raise VolumeFileError(
                f"Expected pieces of at most {max_gb:g} GB in {path}, got {data.nbytes / 1e9:.1f} GB in pieces of"
                f" {largest_chunk / 1e9:.1f} GB. Allow more memory, or save it as OME-Zarr in smaller chunks."
            )
        names = image.channel_names or ()
        if len(names) != shape[0]:
            names = tuple(f"Channel:0:{index}" for index in range(shape[0]))
        return Stack(path, data, image.voxel_size.um, names, image.voxel_size.stated)


def num_times_of(path: str | os.PathLike, scene: str | None = None) -> int:
    """How many time points an image has; 1 where it is no series. Raises what `open_stack` raises."""
    path = Path(path)
    image = choose_image(path, open_images(path), scene)
    return image.shape[image.axes.index("T")] if "T" in image.axes else 1


def choose_image(path: Path, images: Sequence[OpenImage], scene: str | None) -> OpenImage:
    """The image of a file, or the one of this name or number.

    Raises:
        ValueError: if there are several and none is chosen, or none or several of this name; those there are listed.
    """
    listed = ", ".join(f"{index} ({image.name})" for index, image in enumerate(images[:20]))
    if scene is None:
        if len(images) == 1:
            return images[0]
        raise VolumeFileError(
            f"Expected one image in {path}, got {len(images)}: {listed}. Choose one by its number or its name"
            " (--scene), or save each in a file of its own."
        )
    for found in (
        [image for image in images if image.name == scene],
        [images[int(scene)]] if scene.isdecimal() and int(scene) < len(images) else [],
        [image for image in images if scene in image.other_names],
        [image for image in images if image.name.lower() == scene.lower()],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise VolumeFileError(
        f"Expected one image called {scene!r} in {path}, got {len(found)} of its images: {listed}. Choose one by its"
        " number."
    )


def read_channels(stack: Stack, channels: Sequence[int] | None = None, max_gb: float = 4.0) -> Stack:
    """Some channels of a stack, or all, in memory if they fit.

    Raises:
        ValueError: if the file is damaged.
    """
    channels = range(len(stack.data)) if channels is None else channels
    data = stack.data[list(channels)]
    names = tuple(stack.channel_names[channel] for channel in channels)
    if data.nbytes <= max_gb * 1e9:
        with damage_as_error(stack.path):
            data = load(data)
    return replace(stack, data=data, channel_names=names)


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
                f"Expected one channel {wanted!r} for {name} in {stack.path}, got {'several' if found else 'none'}: it"
                f" has {known}. Choose one of these by its number."
            )
        indices.append(found[0])
    return indices


def load(array) -> np.ndarray:
    """A dask array's numbers; a NumPy array is returned as it is."""
    # in this thread, because several processes share the machine already
    return array.compute(scheduler="synchronous") if hasattr(array, "compute") else array
