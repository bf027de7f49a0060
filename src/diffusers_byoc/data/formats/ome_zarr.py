"""OME-Zarr (NGFF 0.1 to 0.5): images, label images within them, and the plates of high-content screens."""

import itertools
import math
from pathlib import Path
from xml.etree import ElementTree

from ...optional import optional
from .units import Step, voxel_size_of
from .volume import DAMAGE_REMEDY, OpenImage, Volume, VolumeFileError


MAX_CHUNKS = 2**20  # an image in more pieces than that takes hours to list

_CHANNEL_COLORS = ("00FFFF", "FF00FF", "FFFF00", "FFFFFF")  # cell cyan, nucleus magenta
_AXES_BEFORE_0_3 = ("t", "c", "z", "y", "x")

WRITES = (".zarr",)


def open_images(path: Path) -> list[OpenImage]:
    """The images of a group, at their full resolution: its own, or those of Bio-Formats' layout 0, 1, 2, ...

    Raises:
        ValueError: if it is no OME-Zarr image, or a plate, or in too many chunks.
        ImportError: if zarr is not installed.
    """
    group, attributes = _open_group(path)
    if "plate" in attributes or "well" in attributes:
        example = next(iter(inner_images(path)), path / "A" / "1" / "0")
        raise VolumeFileError(f"Expected one image, got {path}, a plate of several. Give one field, as {example}.")
    if "multiscales" in attributes:
        return [_image(path, group, image, attributes, image.get("name") or "") for image in attributes["multiscales"]]
    if "bioformats2raw.layout" in attributes:
        names = _bioformats_names(path)
        images = []
        for number, key in enumerate(names or sorted((key for key in group.group_keys() if key.isdecimal()), key=int)):
            inner = path / str(number) if names else path / key
            _, of_image = _open_group(inner)
            for image in of_image.get("multiscales", [])[:1]:
                name = (names[number] if names else "") or image.get("name") or ""
                images.append(_image(path, group[inner.name], image, of_image, name))
        if images:
            return images
    raise VolumeFileError(
        f"Expected an OME-Zarr image in {path}, got a Zarr group with {', '.join(sorted(attributes)) or 'nothing'} in"
        " its attributes. Give the group that holds `multiscales`."
    )


def inner_images(path: Path) -> list[Path]:
    """The fields of a plate or a well, as its metadata list them, whether they are there or not; [] for an image."""
    _, attributes = _open_group(path)
    if "plate" in attributes:
        wells = [path / well["path"] for well in attributes["plate"].get("wells", [])]
        # a well that is not there, or does not say, stands for its fields
        return [field for well in wells for field in ((_is_group(well) and inner_images(well)) or [well])]
    if "well" in attributes:
        return [path / image["path"] for image in attributes["well"].get("images", [])]
    return []


def is_image(path: Path) -> bool:
    """Whether a path leads to an OME-Zarr image."""
    return _is_group(path) and bool({"multiscales", "bioformats2raw.layout"} & set(_open_group(path)[1]))


def inner_labels(path: Path) -> list[Path]:
    """The label images within an image."""
    if not _is_group(path / "labels"):
        return []
    group, attributes = _open_group(path / "labels")
    return [path / "labels" / name for name in attributes.get("labels") or sorted(group.group_keys())]


def write(path: Path, volume: Volume) -> None:
    """OME-Zarr 0.4, the version that most viewers read."""
    zarr = optional("zarr", "zarr")
    zarr_format = {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) >= 3 else {}  # zarr 2 knows no other
    group = zarr.open_group(str(path), mode="w", **zarr_format)
    unit = {} if volume.voxel_size_um is None else {"unit": "micrometer"}
    scale = [1.0, *(volume.voxel_size_um or (1.0, 1.0, 1.0))]
    # not by write_multiscale of ome_zarr, which in 0.21 leaves out the units that axes state
    chunks = (1, *volume.data.shape[1:])
    zarr.array(volume.data, store=group.store, path="0", chunks=chunks, dimension_separator="/", **zarr_format)
    optional("ome_zarr.writer", "zarr").write_multiscales_metadata(
        group,
        [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}],
        fmt=optional("ome_zarr.format", "zarr").FormatV04(),
        axes=[{"name": "c", "type": "channel"}, *({"name": axis, "type": "space", **unit} for axis in "zyx")],
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


def _open_group(path: Path):
    """A group and its attributes, those of OME-Zarr 0.5 without their own level."""
    if not _is_group(path):
        raise VolumeFileError(f"Expected a Zarr group in {path}, got none. Copy or export it again.")
    zarr = optional("zarr", "zarr")
    # a chunk of that codec is a program that zarr 2 would run
    optional("numcodecs.registry", "zarr").codec_registry.pop("pickle", None)
    group = zarr.open_group(str(path), mode="r")
    attributes = dict(group.attrs)
    return group, attributes.get("ome", attributes)


def _is_group(path: Path) -> bool:
    return any((path / name).is_file() for name in (".zgroup", "zarr.json", ".zmetadata"))


def _bioformats_names(path: Path) -> list[str]:
    """Names of the images in Bio-Formats' layout, in their order; [] where it does not say."""
    xml = path / "OME" / "METADATA.ome.xml"
    if not xml.is_file():
        return []
    return [image.get("Name") or "" for image in ElementTree.parse(xml).getroot().iterfind("{*}Image")]


class _Chunked:
    """A Zarr array that does not take the half of a chunk for the whole, as Blosc does without a word."""

    def __init__(self, path: Path, array):
        self._path, self._array = path, array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        compressors = array.compressors if hasattr(array, "compressors") else [array.compressor]  # zarr 3 and 2
        is_sharded = getattr(array, "shards", None) is not None  # a shard has checksums
        self._is_blosc = bool(compressors) and "Blosc" in type(compressors[-1]).__name__ and not is_sharded

    def __getitem__(self, index: tuple[int | slice, ...]):
        if self._is_blosc:
            ranges = []
            for axis, length, chunk in zip(index, self.shape, self._array.chunks, strict=True):
                start, stop = axis.indices(length)[:2] if isinstance(axis, slice) else (axis, axis + 1)
                ranges.append(range(start // chunk, -(-stop // chunk)))
            for place in itertools.product(*ranges):
                self._check(place)
        return self._array[index]

    def _check(self, place: tuple[int, ...]) -> None:
        """Compare the length of a chunk's file with what its header says; a chunk that is not there is background."""
        if hasattr(self._array, "metadata"):  # zarr 3
            key = f"{self._array.path}/{self._array.metadata.encode_chunk_key(place)}"
        else:
            key = self._array._chunk_key(place)
        file = self._path / key
        if not file.is_file():
            return
        with open(file, "rb") as stream:
            header = stream.read(16)
        if len(header) < 16 or int.from_bytes(header[12:], "little") != file.stat().st_size:
            raise VolumeFileError(f"Expected whole chunks in {self._path}, got a part of {key}. {DAMAGE_REMEDY}")


def _image(path: Path, group, multiscale: dict, attributes: dict, name: str) -> OpenImage:
    array = group[multiscale["datasets"][0]["path"]]
    num_chunks = math.prod(math.ceil(length / chunk) for length, chunk in zip(array.shape, array.chunks, strict=True))
    if num_chunks > MAX_CHUNKS:
        raise VolumeFileError(f"Expected at most {MAX_CHUNKS} chunks in {path}, got {num_chunks}. Save larger ones.")
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in multiscale.get("axes", _AXES_BEFORE_0_3)]
    letters = "".join(axis["name"].upper() for axis in axes)
    if len(letters) != len(axes) or len(axes) != array.ndim:
        raise VolumeFileError(
            f"Expected {array.ndim} axes named t, c, z, y, x in {path}, got {[axis['name'] for axis in axes]}. Correct"
            " its metadata."
        )
    scale = [1.0] * len(axes)
    is_stated = False
    for level in (multiscale["datasets"][0], multiscale):
        for transformation in level.get("coordinateTransformations", []):
            if transformation["type"] == "scale":
                is_stated = True
                scale = [one * float(other) for one, other in zip(scale, transformation["scale"], strict=True)]
    steps = {
        letter: Step(length, axis.get("unit"))
        for letter, length, axis in zip(letters, scale, axes, strict=True)
        if is_stated
    }
    channels = [channel.get("label") for channel in attributes.get("omero", {}).get("channels", [])]
    chunked = _Chunked(path, array)

    def lazy():
        return optional("dask.array", "zarr").from_array(chunked, chunks=array.chunks, asarray=True)

    return OpenImage(
        path=path,
        axes=letters,
        shape=tuple(array.shape),
        dtype=array.dtype,
        read=lambda: chunked[(slice(None),) * array.ndim],
        lazy=lazy,
        name=name,
        voxel_size=voxel_size_of(steps),
        channel_names=tuple(map(str, channels)) if channels and all(channels) else None,
    )
