"""What every file format has in common: an image that is opened and not yet read, a volume, and what is refused."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .units import NOT_STATED, VoxelSize


MAX_VOLUME_BYTES = 2**30  # one cell of two channels at uint16 is then at most 645 voxels wide
MAX_IMAGE_BYTES = 2**42  # 4 TB; a header that says more is damaged
DAMAGE_REMEDY = "It may be truncated or damaged: export or copy it again."

_PRIVATE_TAGS = 2**15  # from this number on, TIFF tags are whatever a program likes, and say nothing of the pixels


class VolumeFileError(ValueError):
    """A file is not what is needed; the message names the file, what was wrong, and the remedy."""


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


@dataclass
class OpenImage:
    """One image of a file, of which nothing but the description has been read; what a format's `open_images` gives.

    Args:
        path: the file.
        axes: a letter for each axis: T, C, Z, Y, X; Q or I where the file does not name it; any other for what is
            refused if it is longer than 1.
        shape: a length for each axis.
        dtype: number type.
        read: reads all of it, in these axes.
        lazy: the same as a dask array, of which boxes can be read.
        name: what the file calls the image.
        other_names: by which it can be chosen too.
        voxel_size: of this image.
        channel_names: of this image; None where the file does not say.
        close: lets go of the file.
    """

    path: Path
    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    lazy: Callable
    name: str = ""
    other_names: tuple[str, ...] = ()
    voxel_size: VoxelSize = NOT_STATED
    channel_names: tuple[str, ...] | None = None
    close: Callable[[], None] = field(default=lambda: None)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def sizes(self) -> str:
        """Axes and lengths, for messages."""
        return ", ".join(f"{axis}={length}" for axis, length in zip(self.axes, self.shape, strict=True))


def czyx(image: OpenImage, time: int | None = None) -> tuple[tuple[int, int, int, int], Callable]:
    """How an image becomes (C, Z, Y, X).

    Args:
        image: with at most one time point, or any number if one is chosen.
        time: the number of the time point, from 0.

    Returns:
        Its shape then, and the function that makes its array, NumPy's or dask's, so.

    Raises:
        ValueError: if it has other axes, is 2D, or has no such time point.
    """
    index = [slice(None)] * len(image.axes)
    num_times = image.shape[image.axes.index("T")] if "T" in image.axes else 1
    if time is not None:
        if not 0 <= time < num_times:
            raise VolumeFileError(
                f"Expected the time point {time} in {image.path}, got {num_times} of them, from 0 on. Choose another."
            )
        if "T" in image.axes:
            index[image.axes.index("T")] = time
    keep = [axis for axis, letter in enumerate(image.axes) if letter in "CZYXQI" or image.shape[axis] > 1]
    keep = [axis for axis in keep if index[axis] == slice(None)]
    for axis in set(range(len(image.axes))) - set(keep):
        index[axis] = 0 if index[axis] == slice(None) else index[axis]
    letters = [image.axes[axis] for axis in keep]
    # channels come before slices where the file does not name its axes
    unnamed = [position for position, letter in enumerate(letters) if letter in "QI"]
    missing = [letter for letter in "CZ" if letter not in letters]
    if len(unnamed) < len(missing):
        missing = [letter for letter in missing if letter == "Z"]
    if len(unnamed) == len(missing):
        for position, letter in zip(unnamed, missing, strict=True):
            letters[position] = letter
    shape = {letter: image.shape[axis] for letter, axis in zip(letters, keep, strict=True)}
    is_flat = set(letters) <= set("CZYX") and (min(shape.get(axis, 1) for axis in "ZYX") < 2 or 0 in shape.values())
    if sorted(letters) not in (["C", "X", "Y", "Z"], ["X", "Y", "Z"]) or is_flat:
        problem, remedy = "an image of other axes", "save it with the axes CZYX (diffusers_byoc.data.write_volume)"
        if "T" in letters:
            problem, remedy = "a time series", "choose a time point (--time N, or --time all), or save each as a file"
        elif is_flat or "Z" not in letters:
            problem = "a 2D image, which is not 3D"
        raise VolumeFileError(
            f"Expected a volume with axes C, Z, Y, X and at least 2 voxels in z, y and x in {image.path}, got"
            f" {problem} ({image.sizes()}; T time, S colour, Q or I unnamed). {remedy[0].upper()}{remedy[1:]}."
        )
    order = [letters.index(letter) for letter in "CZYX" if letter in letters]

    def arrange(array):
        array = array[tuple(index)].transpose(order)
        return array if len(order) == 4 else array[None]

    return (shape.get("C", 1), *(shape[axis] for axis in "ZYX")), arrange


def check_numbers(path: Path, dtype: np.dtype) -> None:
    """Refuse what holds no real numbers.

    Raises:
        ValueError: naming the file.
    """
    if dtype.kind not in "buif":
        raise VolumeFileError(f"Expected integers or real floats in {path}, got dtype {dtype}. Convert it first.")


class _LoggedErrors(logging.Handler):
    """Collects what tifffile only logs: a truncated chain of pages is to it a shorter stack, to us a damaged file."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        tag = re.search(r"TiffTag (\d+)", message)
        if tag is None or int(tag[1]) < _PRIVATE_TAGS:
            self.messages.append(message)


@contextmanager
def damage_as_error(path: Path) -> Iterator[None]:
    """Whatever a damaged file provokes in a reader, or what tifffile only logs, becomes an error that names it.

    Raises:
        ValueError: if the file is damaged.
        ImportError: if a codec is not installed, with the package that brings it.
    """
    logged = _LoggedErrors()
    logger = logging.getLogger("tifffile")
    logger.addHandler(logged)
    try:
        yield
    except MemoryError:
        raise
    except ImportError as error:
        if str(error).startswith("Expected"):
            raise
        raise ImportError(f"Expected all that reads {path} to be installed, got: {error}. Install it.") from error
    except VolumeFileError as error:
        if not logged.messages:
            raise
        raise _damaged(path, logged.messages[0]) from error
    except Exception as error:
        check_codec(path, error)
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    finally:
        logger.removeHandler(logged)
    if logged.messages:
        raise _damaged(path, logged.messages[0])


def _damaged(path: Path, reason: str) -> VolumeFileError:
    reason = " ".join(reason.split())[:300].rstrip(".")
    return VolumeFileError(f"Expected a readable file, got {path}, which is not ({reason}). {DAMAGE_REMEDY}")


def check_codec(path: Path, error: Exception) -> None:
    """Tell a codec that is not installed from damage.

    Raises:
        ImportError: with the package that brings it.
    """
    of_zarr = "numcodecs (or what else brings this codec of Zarr)"
    codecs = {
        # tifffile, zarr 2, 3.4 and 3.0, HDF5
        r"<\w+\.(\w+).* requires the 'imagecodecs' package": "imagecodecs",
        r"codec not available: '*([\w.-]+)": of_zarr,
        r"UnknownCodecError: An implementation for codec '([^']+)'": of_zarr,
        r"UnknownCodecError.*?([\w.-]+)'?\)?$": of_zarr,
        r"required filter '([^']+)'|(can't open plugin|can't open directory)": "hdf5plugin",
    }
    for pattern, package in codecs.items():
        if found := re.search(pattern, f"{type(error).__name__}: {error}"):
            codec = next((group for group in found.groups() if group), "one that is not named").strip("<>,:")
            raise ImportError(
                f"Expected an installed codec for {path}, got {codec}, which is not. The file is not damaged: run"
                f" pip install {package}."
            ) from error
