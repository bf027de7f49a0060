"""TIFF, OME-TIFF and the hyperstacks of ImageJ, read and written by tifffile."""

import functools
import hashlib
import lzma
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5
from xml.etree import ElementTree

import numpy as np

from ...optional import optional
from .units import NOT_STATED, Step, VoxelSize, voxel_size_of
from .volume import DAMAGE_REMEDY, MAX_IMAGE_BYTES, MAX_VOLUME_BYTES, OpenImage, Volume, VolumeFileError


MAX_PLANES = 2**20  # a file that claims more would take minutes and gigabytes before a look at its data

# only these unpack without limit, and deflate not to more than 1032 times its length
_UNPACKERS = {8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor}
_DEFLATE_LIMIT = 1032

WRITES = (".tif", ".tiff")


def open_images(path: Path) -> list[OpenImage]:
    """The images of a file. Of an OME-TIFF that describes those of other files too, the ones that are its own.

    Raises:
        ValueError: if the file is damaged, or its metadata do not describe what it holds.
        ImportError: if tifffile is not installed.
    """
    tiff = _open(path)
    try:
        elements = []
        if tiff.is_ome:
            xml, elements = _own_images(path, _ome_of(path, tiff.ome_metadata))
            if not all(_describes_its_first_plane(element, tiff) for element in elements):
                raise _other_planes(path)
            if xml is not None:
                tiff.close()
                tiff = _open(path, xml)
        elif path.name.lower().endswith((".ome.tif", ".ome.tiff")) and not (tiff.is_imagej or tiff.is_shaped):
            raise VolumeFileError(
                f"Expected OME metadata in {path}, got none that can be read. It may be truncated or damaged: export"
                " it again, or call it .tif if it has none."
            )
        series = _series_of(tiff)
        if not series:
            raise VolumeFileError(f"Expected an image in {path}, got none. {DAMAGE_REMEDY}")
        if elements and (len(series) != len(elements) or any(one.kind != "ome" for one, _, _ in series)):
            # tifffile leaves out images of which it finds nothing, and guesses where the metadata do not fit
            raise _other_planes(path)
        num_planes = _num_planes(series[0][0])
        if tiff.is_imagej and not elements and len(tiff.pages) not in (1, num_planes):
            raise VolumeFileError(
                f"Expected {num_planes} planes in {path}, as ImageJ says, got {len(tiff.pages)}. {DAMAGE_REMEDY}"
            )
        images = []
        for index, (one, axes, shape) in enumerate(series):
            pages = _pages_of(path, one)
            name, other_names, channel_names = one.name, (), None
            if elements:
                element = elements[index]
                size, channel_names = _ome_pixels(element.find("{*}Pixels"))
                name = element.get("Name") or element.get("ID") or ""
                other_names = tuple(filter(None, [element.get("ID")]))
            else:
                size = _imagej_voxel_size(tiff) if tiff.is_imagej else NOT_STATED
            images.append(
                OpenImage(
                    path=path,
                    axes=axes,
                    shape=shape,
                    dtype=one.dtype,
                    read=functools.partial(_read, path, one, pages, shape),
                    lazy=functools.partial(_lazy, path, one, pages, shape),
                    name=name,
                    other_names=other_names,
                    voxel_size=size,
                    channel_names=channel_names,
                    close=tiff.close,
                )
            )
        return images
    except BaseException:
        tiff.close()
        raise


def write(path: Path, volume: Volume) -> None:
    """OME-TIFF, zlib-compressed, with the voxel size in the TIFF tags too, for viewers that know no OME.

    The same volume gives the same bytes: the UUID, by default of the time and the machine, is that of the voxels.
    """
    name = hashlib.sha256(np.ascontiguousarray(volume.data)).hexdigest()
    metadata, resolution = {"axes": "CZYX", "Channel": {"Name": list(volume.channel_names)}}, {}
    metadata["UUID"] = f"urn:uuid:{uuid5(NAMESPACE_OID, name)}"
    if volume.voxel_size_um is not None:
        for axis, size_um in zip("ZYX", volume.voxel_size_um, strict=True):
            metadata |= {f"PhysicalSize{axis}": size_um, f"PhysicalSize{axis}Unit": "µm"}
        _, y_um, x_um = volume.voxel_size_um
        resolution = {"resolution": (1e4 / x_um, 1e4 / y_um), "resolutionunit": "CENTIMETER"}
    optional("tifffile", "data").imwrite(
        path,
        volume.data,
        ome=True,
        photometric="minisblack",  # otherwise three or four slices are taken for colours
        compression="zlib",
        metadata=metadata,
        **resolution,
    )


def _open(path: Path, ome_xml: str | None = None):
    # files of Micro-Manager are OME-TIFFs, whose own index tifffile would prefer: of all positions, in one image
    return optional("tifffile", "data").TiffFile(path, omexml=ome_xml, is_mmstack=False)


def _series_of(tiff) -> list[tuple]:
    """Series, axes and shape of each image, with the axes of length 1, which tifffile leaves out unless asked."""
    if callable(tiff.series):  # since tifffile 2026.5.2
        return [(one, one.axes, one.shape) for one in tiff.series(squeeze=False)]
    return [(one, one.get_axes(squeeze=False), tuple(one.get_shape(squeeze=False))) for one in tiff.series]


# which images an OME-TIFF holds


def _ome_of(path: Path, xml: str) -> ElementTree.Element:
    """The OME metadata of a file, which may lie in a companion beside it."""
    ome = ElementTree.fromstring(xml)
    reference = ome.find("{*}BinaryOnly")
    if reference is None:
        return ome
    companion = path.with_name(Path(reference.get("MetadataFile", "").replace("\\", "/")).name)
    if not companion.is_file() or companion == path:
        raise VolumeFileError(
            f"Expected the file {companion.name} with the OME metadata of {path} beside it, got none. Copy it there."
        )
    if companion.suffix.lower() in (".tif", ".tiff"):
        with _open(companion) as tiff:
            xml = tiff.ome_metadata or ""
    else:
        xml = companion.read_text(encoding="utf-8")
    ome = ElementTree.fromstring(xml)
    ome.set("UUID", reference.get("UUID", ""))  # who asks is this file, not the companion
    return ome


def _own_images(path: Path, ome: ElementTree.Element) -> tuple[str | None, list[ElementTree.Element]]:
    """The Image elements whose planes a file holds, and metadata of these alone; None if that is all there is.

    A plane belongs to the file whose UUID it names, and without one to the file whose name it gives.
    """
    images = [image for image in ome.iterfind("{*}Image") if image.find("{*}Pixels") is not None]
    places = {id(image): _places_of(image) for image in images}
    every = set().union(*places.values()) if places else set()
    own_uuid, own_name = ome.get("UUID"), path.name.lower()
    here = {None} | {place for place in every if place and own_uuid and place[0] == own_uuid}
    by_name = {place for place in every if place and place[1].lower() == own_name}
    if len(here) == 1 or (len({place[1] for place in here if place}) > 1 and here & by_name):
        here = {None} | by_name  # no UUID says it, or one that all files share
    own = [image for image in images if places[id(image)] & here or not places[id(image)]]
    if not own and len({place[1] for place in every}) == 1:  # all in one file, which has been renamed
        here, own = every, images
    if not own:
        names = sorted({place[1] for place in every if place})
        raise VolumeFileError(
            f"Expected a file of the name that its OME metadata give ({', '.join(names[:8]) or 'none'}), got {path}."
            " Give it its old name, or export it again."
        )
    for image in own:
        _check_claims(path, image.find("{*}Pixels"))
        others = {place[1] for place in places[id(image)] - here}
        if others and _first_place(image) not in here:
            raise VolumeFileError(
                f"Expected the file with which an image begins, got {path}, which holds a part of the one that begins"
                f" in {_first_place(image)[1]}. Give that one."
            )
        if unsafe := sorted(other for other in others if other != Path(other.replace("\\", "/")).name):
            raise VolumeFileError(f"Expected the parts of {path} beside it, got {unsafe[0]!r}. Export it again.")
        for data in image.iterfind("{*}Pixels/{*}TiffData"):
            for uuid in data.findall("{*}UUID"):
                if _place_of(uuid) in here:  # then tifffile looks into this file, whatever it is called now
                    data.remove(uuid)
    if not every and len(own) == len(list(ome.iterfind("{*}Image"))) and ome.find("{*}BinaryOnly") is None:
        return None, own
    for image in list(ome.iterfind("{*}Image")):
        if not any(image is one for one in own):
            ome.remove(image)
    return ElementTree.tostring(ome, encoding="unicode"), own


def _place_of(uuid: ElementTree.Element) -> tuple[str, str]:
    return (uuid.text or "").strip(), uuid.get("FileName", "")


def _places_of(image: ElementTree.Element) -> set[tuple[str, str] | None]:
    """(UUID, name) of the files that hold an image's planes; None for the one that the metadata are of."""
    places = set()
    for data in image.iterfind("{*}Pixels/{*}TiffData"):
        uuid = data.find("{*}UUID")
        places.add(None if uuid is None else _place_of(uuid))
    return places


def _first_place(image: ElementTree.Element) -> tuple[str, str] | None:
    data = list(image.iterfind("{*}Pixels/{*}TiffData"))
    first = min(data, key=lambda one: [int(one.get(f"First{axis}", 0)) for axis in "TZC"])
    uuid = first.find("{*}UUID")
    return None if uuid is None else _place_of(uuid)


def _check_claims(path: Path, pixels: ElementTree.Element) -> None:
    """Refuse sizes that tifffile would take minutes and gigabytes over before it looks at the data."""
    num_voxels, num_planes = (
        math.prod(int(pixels.get(f"Size{axis}", "1")) for axis in axes) for axes in ("XYZCT", "ZCT")
    )
    claims = [
        int(data.get(name, "0"))
        for data in pixels.iterfind("{*}TiffData")
        for name in ("IFD", "PlaneCount", "FirstZ", "FirstC", "FirstT")
    ]
    if num_voxels > MAX_IMAGE_BYTES or max(num_planes, *claims, 0) > MAX_PLANES:
        raise VolumeFileError(
            f"Expected OME metadata of at most {MAX_IMAGE_BYTES} voxels and {MAX_PLANES} planes in {path}, got"
            f" {num_voxels} and {max(num_planes, *claims, 0)}. {DAMAGE_REMEDY}"
        )


def _describes_its_first_plane(image: ElementTree.Element, tiff) -> bool:
    """Whether an image has the width and height of its first page; tifffile would look for billions of pages."""
    pixels = image.find("{*}Pixels")
    data = pixels.find("{*}TiffData")
    page = tiff.pages[0 if data is None else int(data.get("IFD", "0"))]
    return (int(pixels.get("SizeX")), int(pixels.get("SizeY"))) == (page.imagewidth, page.imagelength)


def _other_planes(path: Path) -> VolumeFileError:
    return VolumeFileError(
        f"Expected the planes that its OME metadata describe in {path}, got others. It may be truncated or damaged:"
        " export it again, into one file."
    )


# what a file says of its images


def _ome_pixels(pixels: ElementTree.Element) -> tuple[VoxelSize, tuple[str, ...] | None]:
    steps = {}
    for axis in "ZYX":
        length = pixels.get(f"PhysicalSize{axis}")
        if length is not None:
            steps[axis] = Step(float(length), pixels.get(f"PhysicalSize{axis}Unit", "µm"))  # the schema's default
    names = tuple(channel.get("Name", "") for channel in pixels.findall("{*}Channel"))
    return voxel_size_of(steps), names if names and all(names) else None


def _imagej_voxel_size(tiff) -> VoxelSize:
    """ImageJ leaves out a step of exactly 1, and the units of y and z where they are that of x."""
    metadata, tags = tiff.imagej_metadata, tiff.pages[0].tags
    units = {"X": metadata.get("unit")}
    for axis in "YZ":
        units[axis] = metadata.get(f"{axis.lower()}unit", units["X"])
    for axis, unit in units.items():  # ImageJ writes µ as an escape
        units[axis] = unit and re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), str(unit))
    steps = {"Z": Step(float(metadata.get("spacing", 1.0)), units["Z"])} if any(units.values()) else {}
    for axis in "YX":
        if f"{axis}Resolution" in tags:
            pixels, length = tags[f"{axis}Resolution"].value
            steps[axis] = Step(length / pixels if pixels else math.inf, units[axis])
    if not any(units.values()):  # pixels, whatever the tags say
        return VoxelSize(None, voxel_size_of(steps).stated)
    return voxel_size_of(steps)


# voxels


def _pages_of(path: Path, series) -> list:
    """The pages of an image, once it is clear that none is missing and nobody claims the impossible."""
    num_bytes = math.prod(series.shape) * series.dtype.itemsize
    if num_bytes > MAX_IMAGE_BYTES or len(series.pages) > MAX_PLANES:
        raise VolumeFileError(
            f"Expected at most {MAX_IMAGE_BYTES} bytes and {MAX_PLANES} planes in {path}, got a header of"
            f" {num_bytes} and {len(series.pages)}. {DAMAGE_REMEDY}"
        )
    pages = list(series.pages)
    if any(page is None for page in pages):
        raise VolumeFileError(f"Expected {len(pages)} planes in {path}, got fewer. {DAMAGE_REMEDY}")
    largest = math.prod(series.keyframe.chunks) * series.dtype.itemsize
    if largest > MAX_VOLUME_BYTES:
        raise VolumeFileError(
            f"Expected strips or tiles of at most {MAX_VOLUME_BYTES} bytes in {path}, got {largest}. {DAMAGE_REMEDY}"
        )
    return pages


def _num_planes(series) -> int:
    return math.prod(series.shape) // math.prod(series.keyframe.shape)


def _check_segments(path: Path, series, page) -> None:
    """Refuse strips and tiles that lie outside the file, or unpack to more than they should hold."""
    handle, largest = page.parent.filehandle, math.prod(series.keyframe.chunks) * series.dtype.itemsize
    unpacker = _UNPACKERS.get(int(series.keyframe.compression))
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if offset + count > handle.size:
            raise VolumeFileError(f"Expected data inside {path}, got some that lie beyond its end. {DAMAGE_REMEDY}")
        if unpacker and (unpacker is not zlib.decompressobj or count * _DEFLATE_LIMIT > MAX_VOLUME_BYTES):
            handle.seek(offset)
            if len(unpacker().decompress(handle.read(count), largest + 1)) > largest:
                raise VolumeFileError(
                    f"Expected strips of at most {largest} bytes in {path}, got one that unpacks to more. Export it"
                    " again."
                )


def _with_its_file_open(page, function: Callable):
    """A part of an image that lies in another file, which tifffile closes."""
    handle = page.parent.filehandle
    is_closed = handle.closed
    if is_closed:
        handle.open()
    try:
        return function()
    finally:
        if is_closed:
            handle.close()


def _read(path: Path, series, pages: list, shape: tuple[int, ...]) -> np.ndarray:
    if series.dataoffset is not None:
        return np.array(_mapped(path, series), series.dtype).reshape(shape)
    for page in pages:
        _with_its_file_open(page, functools.partial(_check_segments, path, series, page))
    return series.asarray(maxworkers=1).reshape(shape)


def _lazy(path: Path, series, pages: list, shape: tuple[int, ...]):
    planes = _Planes(path, series, pages) if series.dataoffset is None else _mapped(path, series)
    # several threads would read from one place of one file
    array = optional("dask.array", "data").from_array(planes, (1, *planes.shape[1:]), asarray=True, lock=True)
    return array.astype(series.dtype).reshape(shape)


def _mapped(path: Path, series) -> np.ndarray:
    """The planes of an image that lie one after the other; only the first has a header where ImageJ writes 4 GB."""
    page, handle = series.keyframe, series.keyframe.parent.filehandle
    shape = (_num_planes(series), *page.shape)
    if series.dataoffset + math.prod(shape) * series.dtype.itemsize > handle.size:
        raise VolumeFileError(f"Expected {shape[0]} planes in {path}, got fewer. {DAMAGE_REMEDY}")
    return handle.memmap_array(series.dtype.newbyteorder(page.parent.byteorder), shape, series.dataoffset)


class _Planes:
    """The planes of an image as an array (plane, *shape of a plane), for dask."""

    def __init__(self, path: Path, series, pages: list):
        self._path, self._series, self._pages = path, series, pages
        self.shape, self.dtype = (len(pages), *series.keyframe.shape), series.dtype
        self.ndim = len(self.shape)

    def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
        first, *others = index
        pages = self._pages[first] if isinstance(first, slice) else [self._pages[first]]
        planes = [_with_its_file_open(page, functools.partial(self._read, page)) for page in pages]
        return np.stack(planes)[(slice(None) if isinstance(first, slice) else 0, *others)]

    def _read(self, page) -> np.ndarray:
        _check_segments(self._path, self._series, page)
        return page.asarray(maxworkers=1)
