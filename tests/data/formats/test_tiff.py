"""TIFFs as microscopes, ImageJ and converters write them; every one is read as a cell and as a stack, with one"
" answer."""

import re
import struct
import uuid

import numpy as np
import pytest
import tifffile

from diffusers_byoc.data import read_volume, write_volume
from diffusers_byoc.data.microscope.stacks import open_stack, read_channels


SHAPE = (2, 5, 24, 26)


def voxels(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 2**16, shape).astype(np.uint16)


@pytest.fixture(scope="module")
def data():
    return voxels(0)


def read_both(path, data, voxel_size_um, channel_names=None, scene=None):
    """A cell and a stack are the same file: the same voxels, size and names."""
    stack = open_stack(path, scene)
    np.testing.assert_array_equal(read_channels(stack).data, data)
    np.testing.assert_array_equal(np.asarray(stack.data[:, 1:4, 3:9, 20:]), data[:, 1:4, 3:9, 20:])
    assert stack.voxel_size_um == (voxel_size_um and pytest.approx(voxel_size_um))
    if channel_names:
        assert stack.channel_names == channel_names
    if scene is None:
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.data, data)
        assert volume.voxel_size_um == (voxel_size_um and pytest.approx(voxel_size_um))
        assert volume.channel_names == channel_names


def refuse_both(path, match, error=ValueError):
    for read in (read_volume, lambda path: read_channels(open_stack(path))):
        with pytest.raises(error, match=match) as caught:
            read(path)
        assert path.name in str(caught.value)
        message = str(caught.value)
        assert "\n" not in message and message.startswith("Expected") and message.endswith(".")


# ImageJ


def write_imagej(path, data, resolution=(2.0, 4.0), **metadata):
    """As Fiji lays it out: z, c, y, x; pixels per unit in the TIFF's own tags."""
    array = data.transpose(1, 0, 2, 3).copy()
    tifffile.imwrite(path, array, imagej=True, resolution=resolution, metadata={"axes": "ZCYX", **metadata})
    return path


@pytest.mark.parametrize(
    ("metadata", "voxel_size_um"),
    [
        ({"unit": "micron", "spacing": 1.5}, (1.5, 0.25, 0.5)),
        ({"unit": "micron"}, (1.0, 0.25, 0.5)),  # a step of exactly 1 is left out
        ({"unit": "nm"}, (1e-3, 2.5e-4, 5e-4)),
        ({"unit": "micron", "zunit": "nm", "spacing": 1500.0}, (1.5, 0.25, 0.5)),
        ({"unit": "micron", "yunit": "nm", "spacing": 1.5}, (1.5, 2.5e-4, 0.5)),
        ({"unit": "inch", "spacing": 0.001}, (25.4, 6350.0, 12700.0)),
        ({"unit": r"\u00B5m", "spacing": 1.5}, (1.5, 0.25, 0.5)),
        ({"unit": "cm", "zunit": "micron", "spacing": 1.5}, (1.5, 2500.0, 5000.0)),
        ({"spacing": 1.5}, None),
        ({}, None),
    ],
)
def test_imagej_measures_each_axis_in_its_own_unit(tmp_path, data, metadata, voxel_size_um):
    read_both(write_imagej(tmp_path / "a.tif", data, **metadata), data, voxel_size_um)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"unit": "micron", "zunit": "pixel", "spacing": 7.0}, "z: 7 pixel, .*'pixel' is no unit of length"),
        ({"unit": "parsnip", "spacing": 1.5}, "'parsnip' is no unit"),
        ({"unit": "micron", "spacing": -1.5}, "z: -1.5 micron"),
        ({"unit": "micron", "spacing": 0.0}, "z: 0 micron"),
    ],
)
def test_imagej_of_a_unit_or_step_that_can_be_none(tmp_path, data, metadata, match):
    path = write_imagej(tmp_path / "a.tif", data, **metadata)
    with pytest.raises(ValueError, match=match):
        read_volume(path)
    stack = open_stack(path)  # the size can be given by hand
    assert stack.voxel_size_um is None and stack.stated_size in str(pytest.raises(ValueError, read_volume, path).value)


def test_imagej_beyond_4_gb_has_one_header_for_all_planes(tmp_path, data):
    path = tmp_path / "a.tif"
    array = data.transpose(1, 0, 2, 3).astype(">u2")
    description = (
        f"ImageJ=1.54f\nimages={array[:, :, 0, 0].size}\nchannels=2\nslices=5\nhyperstack=true\nunit=um\nspacing=1.5\n"
    )
    with tifffile.TiffWriter(path, byteorder=">") as writer:
        writer.write(array[0, 0], description=description, metadata=None, resolution=(2, 4))
    with open(path, "ab") as file:
        with tifffile.TiffFile(path) as tiff:
            assert tiff.pages[0].dataoffsets[0] + array[0, 0].nbytes == path.stat().st_size
        file.write(array.tobytes()[array[0, 0].nbytes :])
    read_both(path, data, (1.5, 0.25, 0.5))
    path.write_bytes(path.read_bytes()[:-100])
    refuse_both(path, "planes|damaged")


def test_what_imagej_saved_under_an_old_name(tmp_path, data):
    read_both(write_imagej(tmp_path / "a.ome.tif", data, unit="micron"), data, (1.0, 0.25, 0.5))


def test_an_ome_tiff_whose_metadata_cannot_be_read_is_no_plain_one(tmp_path, data):
    tifffile.imwrite(tmp_path / "a.ome.tif", data, ome=True, metadata={"axes": "CZYX"}, photometric="minisblack")
    content = (tmp_path / "a.ome.tif").read_bytes()
    (tmp_path / "a.ome.tif").write_bytes(content.replace(b"</OME>", b"</\xff\xfeE>"))
    refuse_both(tmp_path / "a.ome.tif", "OME metadata in .*, got none that can be read")


# several images in one file


def ome_metadata(name, size_um, **more):
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", size_um, strict=True)}
    return {"axes": "CZYX", "Name": name, **sizes, **{f"PhysicalSize{axis}Unit": "µm" for axis in "ZYX"}, **more}


IMAGES = {  # name -> shape, voxel size, channels
    "overview 10x": ((2, 4, 30, 31), (2.0, 2.0, 2.0), ("red", "green")),
    "stack 63x": (SHAPE, (1.5, 0.5, 0.25), ("DNA", "membrane")),
    "2": ((1, 6, 40, 41), (3.0, 1.0, 1.0), ("bright",)),
}


@pytest.fixture
def three_images(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for seed, (name, (shape, size_um, channels)) in enumerate(IMAGES.items()):
            metadata = ome_metadata(name, size_um, Channel={"Name": list(channels)})
            writer.write(voxels(seed, shape), photometric="minisblack", metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("scene", "index"),
    [("0", 0), ("1", 1), ("stack 63x", 1), ("STACK 63X", 1), ("Image:1", 1), ("Image:0", 0), ("2", 2)],
)
def test_the_metadata_are_those_of_the_chosen_image(three_images, scene, index):
    shape, size_um, channels = list(IMAGES.values())[index]
    read_both(three_images, voxels(index, shape), size_um, channels, scene)


def test_a_name_beats_a_number(tmp_path, data):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for name, step in (("1", 0), ("0", 1)):
            writer.write(data + step, photometric="minisblack", metadata=ome_metadata(name, (1.0, 1.0, 1.0)))
    read_both(path, data, (1.0,) * 3, scene="1")
    read_both(path, data + 1, (1.0,) * 3, scene="0")


@pytest.mark.parametrize("scene", ["3", "63x", "stack", "-1"])
def test_a_name_that_is_not_there_lists_those_that_are(three_images, scene):
    with pytest.raises(ValueError, match=r"0 \(overview 10x\), 1 \(stack 63x\), 2 \(2\)"):
        open_stack(three_images, scene)
    with pytest.raises(ValueError, match="got 3: 0 .overview"):
        open_stack(three_images)
    with pytest.raises(ValueError, match="one image .*, got 3 .overview"):
        read_volume(three_images)


# one file a position


def urn(name):
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_DNS, name)}"


def ome_of_positions(own, names, has_uuids=True, order=None, shape=SHAPE, binary=None):
    """The XML that each of several files carries: an Image of each position, whose planes are in the file of its"
    " name."""
    images = ""
    c, z, y, x = shape
    for index in order or range(len(names)):
        planes = "".join(
            f'<TiffData FirstC="{channel}" FirstZ="{plane}" FirstT="0" IFD="{channel * z + plane}" PlaneCount="1">'
            f'<UUID FileName="{names[index]}">{urn(names[index]) if has_uuids else ""}</UUID></TiffData>'
            for channel in range(c)
            for plane in range(z)
        )
        images += (
            f'<Image ID="Image:{index}" Name="Pos{index}"><Pixels ID="Pixels:{index}" DimensionOrder="XYZCT"'
            f' Type="uint16" SizeX="{x}" SizeY="{y}" SizeZ="{z}" SizeC="{c}" SizeT="1" PhysicalSizeX="0.25"'
            f' PhysicalSizeY="0.5" PhysicalSizeZ="{index + 1}.5"><Channel ID="Channel:{index}:0" Name="a{index}"/>'
            f'<Channel ID="Channel:{index}:1" Name="b{index}"/>{planes}</Pixels></Image>'
        )
    root = f' UUID="{urn(own)}"' if has_uuids and own else ""
    namespace = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    content = images if binary is None else f'<BinaryOnly MetadataFile="{binary}" UUID="{urn(own)}"/>'
    return f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{namespace}"{root}>{content}</OME>'


def write_positions(folder, names, **options):
    for index, name in enumerate(names):
        xml = ome_of_positions(name, names, **options)
        tifffile.imwrite(
            folder / name, voxels(index), photometric="minisblack", description=xml.encode(), metadata=None
        )


NAMES = [f"run_Pos{index}.ome.tif" for index in range(3)]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("order", [None, (2, 0, 1)])
@pytest.mark.parametrize("has_uuids", [True, False])
def test_each_file_is_its_own_position(tmp_path, has_uuids, order, alone):
    write_positions(tmp_path, NAMES, has_uuids=has_uuids, order=order)
    for index, name in enumerate(NAMES):
        path = tmp_path / name
        if alone:
            (tmp_path / f"alone {index}").mkdir()
            path = path.rename(tmp_path / f"alone {index}" / name)
        read_both(path, voxels(index), (index + 1.5, 0.5, 0.25), (f"a{index}", f"b{index}"))
        read_both(path, voxels(index), (index + 1.5, 0.5, 0.25), (f"a{index}", f"b{index}"), scene="0")
        with pytest.raises(ValueError, match=f"got 0 of its images: 0 .Pos{index}"):
            open_stack(path, f"Pos{(index + 1) % 3}")


def test_renamed_positions_are_known_by_their_uuid(tmp_path):
    write_positions(tmp_path, NAMES)
    for index, name in enumerate(NAMES):  # even by names that others had
        (tmp_path / name).rename(tmp_path / f"new {(index + 1) % 3}.tif")
        (tmp_path / f"new {(index + 1) % 3}.tif").rename(tmp_path / f"{index} renamed.tif")
        read_both(
            tmp_path / f"{index} renamed.tif", voxels(index), (index + 1.5, 0.5, 0.25), (f"a{index}", f"b{index}")
        )


def test_a_renamed_position_without_a_uuid_says_which_names_it_expects(tmp_path):
    write_positions(tmp_path, NAMES, has_uuids=False)
    (tmp_path / NAMES[0]).rename(tmp_path / "renamed.ome.tif")
    refuse_both(tmp_path / "renamed.ome.tif", r"run_Pos0\.ome\.tif, run_Pos1\.ome\.tif.* Give it its old name")


@pytest.mark.parametrize("has_uuids", [True, False])
def test_a_renamed_file_of_one_image_opens(tmp_path, has_uuids):
    write_positions(tmp_path, NAMES[:1], has_uuids=has_uuids)
    (tmp_path / NAMES[0]).rename(tmp_path / "renamed.tif")
    read_both(tmp_path / "renamed.tif", voxels(0), (1.5, 0.5, 0.25), ("a0", "b0"))


def test_positions_that_share_a_uuid_are_known_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "urn", lambda name: "urn:uuid:the-same")
    write_positions(tmp_path, NAMES)
    for index, name in enumerate(NAMES):
        read_both(tmp_path / name, voxels(index), (index + 1.5, 0.5, 0.25), (f"a{index}", f"b{index}"))


@pytest.mark.parametrize("companion", ["run.companion.ome", NAMES[0]])
def test_metadata_in_a_companion(tmp_path, companion):
    """Only one file has the metadata; the others say where."""
    for index, name in enumerate(NAMES):
        binary = None if name == companion else companion
        xml = ome_of_positions(name, NAMES, binary=binary)
        tifffile.imwrite(
            tmp_path / name, voxels(index), photometric="minisblack", description=xml.encode(), metadata=None
        )
    if companion.endswith(".ome"):
        (tmp_path / companion).write_text(ome_of_positions(None, NAMES), encoding="utf-8")
    for index, name in enumerate(NAMES):
        read_both(tmp_path / name, voxels(index), (index + 1.5, 0.5, 0.25), (f"a{index}", f"b{index}"))
    (tmp_path / companion).unlink()
    refuse_both(tmp_path / NAMES[2], f"{companion} with the OME metadata")


def test_an_image_of_several_files_is_read_from_its_first(tmp_path, data):
    names = ["a_C0.ome.tif", "a_C1.ome.tif"]
    planes = "".join(
        f'<TiffData FirstC="{channel}" FirstZ="0" FirstT="0" IFD="0" PlaneCount="5">'
        f'<UUID FileName="{names[channel]}">{urn(names[channel])}</UUID></TiffData>'
        for channel in range(2)
    )
    for channel, name in enumerate(names):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{urn(name)}"><Image ID="Image:0">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="26" SizeY="24" SizeZ="5" SizeC="2"'
            f' SizeT="1">{planes}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / name, data[channel], photometric="minisblack", description=xml, metadata=None)
    read_both(tmp_path / names[0], data, None)
    refuse_both(tmp_path / names[1], r"begins in a_C0\.ome\.tif. Give that one")
    (tmp_path / names[1]).unlink()
    refuse_both(tmp_path / names[0], "planes .*, got")


# damage, and what is none


def with_bad_tag(path, code):
    """A tag of a type of number that does not exist."""
    content = bytearray(path.read_bytes())
    at = content.find(struct.pack("<HHI", code, 3, 1))
    assert at > 0
    content[at : at + 4] = struct.pack("<HH", code, 99)
    path.write_bytes(content)


def test_an_invalid_private_tag_harms_nobody(tmp_path, data):
    path = tmp_path / "a.ome.tif"
    metadata = ome_metadata("a", (1.5, 0.5, 0.25))
    tifffile.imwrite(path, data, photometric="minisblack", metadata=metadata, extratags=[(65000, 3, 1, 7, False)])
    with_bad_tag(path, 65000)
    read_both(path, data, (1.5, 0.5, 0.25))
    with_bad_tag(path, 277)  # samples per pixel
    refuse_both(path, "which is not .*damaged")


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("kind", ["ome", "imagej", "plain", "pages"])
def test_a_truncated_file_is_called_damaged_or_is_whole(tmp_path, kind, compression):
    if kind == "imagej" and compression:
        pytest.skip("ImageJ writes none")
    data = voxels(3, (2, 5, 20, 22))
    path = tmp_path / "a.tif"
    if kind == "imagej":
        write_imagej(path, data, unit="um")
    elif kind == "ome":
        metadata = ome_metadata("a", (1.5, 0.5, 0.25))
        tifffile.imwrite(path, data, photometric="minisblack", ome=True, metadata=metadata, compression=compression)
    elif kind == "plain":
        tifffile.imwrite(path, data, photometric="minisblack", compression=compression)
    else:
        with tifffile.TiffWriter(path) as writer:
            for plane in data[0]:
                writer.write(plane, contiguous=False, metadata=None, compression=compression)
        data = data[:1]
    whole = path.read_bytes()
    num_refused, lengths = 0, np.linspace(9, len(whole) - 1, 25).astype(int)
    for length in lengths:
        path.write_bytes(whole[:length])
        answers = []
        for read in (read_volume, lambda path: read_channels(open_stack(path))):
            try:
                np.testing.assert_array_equal(read(path).data, data)
                answers.append("whole")
            except ValueError as error:
                assert "damaged" in str(error) and str(path) in str(error)
                answers.append("damaged")
        assert len(set(answers)) == 1, f"of {length} bytes: {answers}"  # one answer for one file
        num_refused += answers[0] == "damaged"
    # in some layouts the last bytes are headers that only repeat the first
    assert num_refused >= (0.3 if kind in ("imagej", "plain") else 0.9) * len(lengths)


@pytest.mark.parametrize("compression", ["lzw", "zstd"])
def test_what_microscopes_compress_by(tmp_path, data, compression, monkeypatch):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path, data, photometric="minisblack", ome=True, metadata={"axes": "CZYX"}, compression=compression
    )
    read_both(path, data, None)

    def decode(*arguments, **options):
        raise ValueError(f"<COMPRESSION.{compression.upper()}: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(lambda page: decode))
    refuse_both(path, f"codec .*{compression.upper()}.* not damaged: run pip install imagecodecs", ImportError)


def test_what_is_written_shows_its_scale_without_ome(tmp_path, data):
    write_volume(tmp_path / "a.ome.tif", data / 65535, (1.5, 0.5, 0.25))
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        for page in tiff.pages:
            assert page.resolutionunit == tifffile.RESUNIT.CENTIMETER
            assert page.resolution == pytest.approx((1e4 / 0.25, 1e4 / 0.5))
    read_both(tmp_path / "a.ome.tif", data, (1.5, 0.5, 0.25), ("cell", "nucleus"))
    write_volume(tmp_path / "b.ome.tif", data / 65535, None)
    with tifffile.TiffFile(tmp_path / "b.ome.tif") as tiff:
        assert tiff.pages[0].resolution == (1, 1) and tiff.pages[0].resolutionunit == tifffile.RESUNIT.NONE


def test_the_same_volume_is_the_same_file_and_another_one_has_another_uuid(tmp_path, data):
    for name, volume in (("a", data), ("b", data.copy()), ("c", data[::-1])):
        write_volume(tmp_path / f"{name}.ome.tif", volume / 65535, (1.5, 0.5, 0.25))
    a, b, c = ((tmp_path / f"{name}.ome.tif").read_bytes() for name in "abc")
    assert a == b
    uuids = {re.search(rb'UUID="(urn:uuid:[0-9a-f-]{36})"', text)[1] for text in (a, b, c)}
    assert len(uuids) == 2
