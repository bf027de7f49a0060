import io
import json
import lzma
import sys
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_byoc.data import read_volume, write_ome_tiff, write_volume
from diffusers_byoc.data.formats import reading
from diffusers_byoc.data.formats import tiff as tiff_format


SHAPE = (2, 5, 6, 7)


@pytest.fixture
def volume():
    return np.random.default_rng(0).integers(0, 2**16, SHAPE).astype(np.uint16)


# what can be read


@pytest.mark.parametrize("shape", [SHAPE, (1, 5, 6, 7), (3, 3, 4, 4), (2, 4, 5, 3), (4, 2, 2, 2)])
def test_ome_tiff_round_trip(tmp_path, shape):
    written = np.random.default_rng(1).random(shape)
    names = tuple("abcd"[: shape[0]])
    path = tmp_path / "new folder" / "Zelle ä ß 細胞.ome.tif"
    write_ome_tiff(path, torch.from_numpy(written), (0.5, 0.65, 0.1), names)
    read = read_volume(path)
    assert read.data.dtype == np.uint16
    np.testing.assert_allclose(read.data / 65535, written, atol=0.5001 / 65535)
    assert read.voxel_size_um == (0.5, 0.65, 0.1)
    assert read.channel_names == names
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_ome_tiff_is_what_other_readers_expect(tmp_path):
    write_ome_tiff(tmp_path / "a.ome.tif", np.full(SHAPE, 1.0))
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        assert tiff.series[0].axes == "CZYX"
        assert tiff.series[0].asarray().max() == 65535
        assert 'PhysicalSizeXUnit="µm"' in tiff.ome_metadata and 'Name="nucleus"' in tiff.ome_metadata
        assert tiff.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE


@pytest.mark.parametrize("voxel_size_um", [(0.5, 0.65, 0.1), None])
def test_npz_round_trip(tmp_path, voxel_size_um):
    written = np.random.default_rng(1).random(SHAPE)
    write_volume(tmp_path / "a.npz", written, voxel_size_um, ("Zelle ä", "核"))
    read = read_volume(tmp_path / "a.npz")
    np.testing.assert_allclose(read.data / 65535, written, atol=0.5001 / 65535)
    assert read.voxel_size_um == voxel_size_um and read.channel_names == ("Zelle ä", "核")
    assert np.load(tmp_path / "a.npz").keys() >= {"volume", "channel_names"}  # without pickles


def test_a_tiff_of_unknown_voxel_size_says_none(tmp_path):
    write_volume(tmp_path / "a.ome.tif", np.zeros(SHAPE), None)
    assert read_volume(tmp_path / "a.ome.tif").voxel_size_um is None


@pytest.mark.parametrize("name", ["a.ome.tif", "a.tiff", "a.ome.zarr", "a.zarr"])
@pytest.mark.parametrize("num_channels", [1, 2, 5])
def test_bioio_reads_what_was_written(tmp_path, name, num_channels):
    bioio = pytest.importorskip("bioio")
    pytest.importorskip("bioio_ome_zarr" if "zarr" in name else "bioio_ome_tiff")
    volume = np.random.default_rng(0).random((num_channels, 5, 6, 7))
    names = ("Zelle ä", "nucleus", "actin", "tubulin", "DNA")[:num_channels]
    for _ in range(2):  # the second replaces the first
        write_volume(tmp_path / name, volume, (1.5, 0.5, 0.4), names)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    image = bioio.BioImage(tmp_path / name)
    assert image.dims.order == "TCZYX" and image.dims.T == 1
    np.testing.assert_array_equal(image.get_image_data("CZYX"), np.rint(volume * 65535).astype(np.uint16))
    assert tuple(image.physical_pixel_sizes) == (1.5, 0.5, 0.4)
    assert list(image.channel_names) == list(names)


def test_bioio_reads_the_planes_of_a_plain_tiff_reader(tmp_path, volume):
    bioio, plain = pytest.importorskip("bioio"), pytest.importorskip("bioio_tifffile")
    write_volume(tmp_path / "a.ome.tif", volume / 65535, 1.0)
    image = bioio.BioImage(tmp_path / "a.ome.tif", reader=plain.Reader)
    np.testing.assert_array_equal(image.get_image_data("CZYX"), volume)


def test_ome_zarr_says_what_the_specification_asks(tmp_path):
    pytest.importorskip("ome_zarr")
    write_volume(tmp_path / "cell 1.ome.zarr", np.zeros(SHAPE), (1.5, 0.5, 0.4))
    attributes = json.loads((tmp_path / "cell 1.ome.zarr" / ".zattrs").read_text())
    (multiscale,) = attributes["multiscales"]
    assert multiscale["version"] == "0.4" and multiscale["name"] == "cell 1"
    assert [axis["name"] for axis in multiscale["axes"]] == list("czyx")
    assert [axis.get("unit") for axis in multiscale["axes"]] == [None] + ["micrometer"] * 3
    (transformation,) = multiscale["datasets"][0]["coordinateTransformations"]
    assert transformation == {"type": "scale", "scale": [1.0, 1.5, 0.5, 0.4]}
    assert [channel["label"] for channel in attributes["omero"]["channels"]] == ["cell", "nucleus"]


@pytest.mark.parametrize("name", ["a.ome.zarr", "a.npz"])
def test_failed_write_leaves_the_old_one(tmp_path, name, monkeypatch):
    pytest.importorskip("ome_zarr")
    write_volume(tmp_path / name, np.full(SHAPE, 0.5), 1.0)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    monkeypatch.setattr("ome_zarr.writer.write_multiscales_metadata", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_volume(tmp_path / name, np.full(SHAPE, 0.1), 1.0)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ome.tif"
    write_ome_tiff(path, np.full(SHAPE, 0.5))
    before = path.read_bytes()

    def disk_full(file, *args, **kwargs):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_ome_tiff(path, np.full(SHAPE, 0.1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("order", ["CZYX", "ZCYX", "XYZC", "TCZYX", "CZYXS"])
def test_named_axes_are_put_in_order(tmp_path, volume, order):
    array = volume.transpose(["CZYX".index(axis) for axis in order if axis in "CZYX"])
    array = array[tuple(np.newaxis if axis in "TS" else slice(None) for axis in order)]
    tifffile.imwrite(tmp_path / "a.tif", array, metadata={"axes": order}, photometric="minisblack")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif").data, volume)


def test_imagej_hyperstack(tmp_path, volume):
    metadata = {"axes": "ZCYX", "spacing": 2.0, "unit": "um"}
    tifffile.imwrite(
        tmp_path / "a.tif", volume.swapaxes(0, 1), imagej=True, metadata=metadata, resolution=(1 / 0.25, 1 / 0.5)
    )
    read = read_volume(tmp_path / "a.tif")
    np.testing.assert_array_equal(read.data, volume)
    assert read.voxel_size_um == pytest.approx((2.0, 0.5, 0.25))


def test_imagej_pixels_without_a_length_are_refused_by_their_name(tmp_path, volume):
    metadata = {"axes": "ZCYX", "spacing": 2.0, "unit": "pixel"}
    tifffile.imwrite(tmp_path / "a.tif", volume.swapaxes(0, 1), imagej=True, metadata=metadata, resolution=(1, 1))
    assert_refused(tmp_path / "a.tif", "z: 2 pixel, .*'pixel' is no unit of length")


@pytest.mark.parametrize(("unit", "expected"), [("nm", 0.25), ("mm", 250000.0), ("µm", 250.0)])
def test_ome_units(tmp_path, volume, unit, expected):
    metadata = {"axes": "CZYX"}
    for axis in "XYZ":
        metadata |= {f"PhysicalSize{axis}": 250.0, f"PhysicalSize{axis}Unit": unit}
    tifffile.imwrite(tmp_path / "a.ome.tif", volume, ome=True, metadata=metadata, photometric="minisblack")
    assert read_volume(tmp_path / "a.ome.tif").voxel_size_um == pytest.approx((expected,) * 3)


def test_unnamed_tiff_axes_are_read_like_numpy(tmp_path, volume):
    tifffile.imwrite(tmp_path / "four.tif", volume, photometric="minisblack")
    tifffile.imwrite(tmp_path / "three.TIFF", volume[0], photometric="minisblack")
    tifffile.imwrite(tmp_path / "pages.tif", volume[0], photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(read_volume(tmp_path / "four.tif").data, volume)
    np.testing.assert_array_equal(read_volume(tmp_path / "three.TIFF").data, volume[:1])
    np.testing.assert_array_equal(read_volume(tmp_path / "pages.tif").data, volume[:1])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", ">u2", "<i4", "float16", ">f4", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_files(tmp_path, volume, dtype, order):
    array = np.asarray((volume % 200).astype(dtype), order=order)
    np.save(tmp_path / "a b.npy", array)
    np.savez(tmp_path / "one.npz", anything=array)
    np.savez_compressed(tmp_path / "two.npz", volume=array, mask=array > 0)
    for name in ("a b.npy", "one.npz", "two.npz"):
        read = read_volume(str(tmp_path / name))
        np.testing.assert_array_equal(read.data, array)
        assert read.data.dtype == np.dtype(dtype).newbyteorder("=")
        assert read.data.flags.writeable and torch.from_numpy(read.data).shape == SHAPE
        assert read.voxel_size_um is None and read.channel_names is None


# what is refused


def assert_refused(path, match, error=ValueError):
    """The message names the file, and says what the parameter `match` expects."""
    with pytest.raises(error, match=match) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)


def test_missing_and_unknown_files(tmp_path):
    assert_refused(tmp_path / "none.tif", "does not exist", FileNotFoundError)
    (tmp_path / "folder.npy").mkdir()
    assert_refused(tmp_path / "folder.npy", "a folder")
    (tmp_path / "a.png").write_bytes(b"x")
    assert_refused(tmp_path / "a.png", r"Expected one of \.tif.*ending in '\.png'")


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".npy", ".npz", ".nii", ".nii.gz", ".ims"])
def test_empty_and_random_bytes(tmp_path, suffix):
    path = tmp_path / f"ä b{suffix}"
    path.write_bytes(b"")
    assert_refused(path, "empty file")
    rng = np.random.default_rng(0)
    signatures = {".npy": b"\x93NUMPY\x01\x00", ".npz": b"PK\x03\x04"}
    for prefix in (b"", signatures.get(suffix, b"II*\x00\x08\x00\x00\x00")):
        for _ in range(5):
            path.write_bytes(prefix + rng.bytes(500))
            assert_refused(path, "which is not|damaged|Expected")


@pytest.mark.parametrize("kind", ["ome", "shaped", "pages", "npy", "npz"])
def test_truncated_files(tmp_path, volume, kind):
    whole = tmp_path / {"npy": "w.npy", "npz": "w.npz"}.get(kind, "w.tif")
    if kind == "ome":
        write_ome_tiff(whole, volume / 65535)
    elif kind in ("shaped", "pages"):
        tifffile.imwrite(whole, volume, photometric="minisblack", **({"metadata": None} if kind == "pages" else {}))
    else:
        {"npy": np.save, "npz": np.savez_compressed}[kind](whole, volume)
    expected, data = read_volume(whole).data, whole.read_bytes()
    truncated = whole.with_name("t" + whole.suffix)
    num_refused, lengths = 0, range(1, len(data), max(1, len(data) // 50))
    for length in lengths:
        truncated.write_bytes(data[:length])
        try:
            read = read_volume(truncated).data
        except ValueError as err:
            assert str(truncated) in str(err)
            num_refused += 1
        else:  # the tail of a TIFF may be page headers that only repeat the first
            np.testing.assert_array_equal(read, expected)
    assert num_refused > 0.3 * len(lengths) if kind == "shaped" else num_refused >= len(lengths) - 1


@pytest.mark.parametrize(
    ("shape", "axes", "match"),
    [
        ((6, 7), "YX", "2D image"),
        ((2, 6, 7), "CYX", "2D image"),
        ((2, 1, 6, 7), "CZYX", "at least 2 voxels.*not 3D"),
        ((3, 5, 6, 7), "TZYX", "time series.*T=3"),
        ((3, 2, 5, 6, 7), "TCZYX", "time series"),
        ((5, 6, 7, 3), "ZYXS", "S=3"),
        ((3, 2, 5, 6, 7), None, "Q=3, Q=2"),
        ((1, 2, 5, 6, 7), None, "Q=1, Q=2"),
    ],
)
def test_other_axes_of_a_tiff(tmp_path, shape, axes, match):
    photometric = "rgb" if axes and "S" in axes else "minisblack"
    tifffile.imwrite(
        tmp_path / "a.tif", np.ones(shape, np.uint8), photometric=photometric, metadata={"axes": axes} if axes else {}
    )
    assert_refused(tmp_path / "a.tif", match)


def test_tiff_of_several_images(tmp_path, volume):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(volume)
        writer.write(volume[:, :4], photometric="minisblack")
    assert_refused(tmp_path / "a.tif", "Expected one image in .*, got 2")


def test_ome_tiff_with_missing_planes(tmp_path, volume):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, volume[:, :3], ome=True, metadata={"axes": "CZYX"}, photometric="minisblack")
    data = path.read_bytes()
    assert data.count(b'SizeZ="3"') == 1
    path.write_bytes(data.replace(b'SizeZ="3"', b'SizeZ="4"'))
    assert_refused(path, "Expected 20 planes|got fewer|OME metadata describe")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, bad):
    array = np.zeros(SHAPE, np.float32)
    array[1, 2, 3, 4] = bad
    np.save(tmp_path / "a.npy", array)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    assert_refused(tmp_path / "a.npy", "finite")
    assert_refused(tmp_path / "a.tif", "finite")


@pytest.mark.parametrize("shape", [(), (6,), (6, 7), (1, 2, 5, 6, 7), (2, 1, 6, 7), (2, 0, 6, 7), (0, 5, 6, 7)])
def test_numpy_arrays_that_are_not_3d(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.ones(shape))
    assert_refused(tmp_path / "a.npy", "not 3D|4 axes")


def test_complex_and_text(tmp_path):
    for dtype in ("complex64", "S4", "datetime64[s]", [("a", "u1")]):
        np.save(tmp_path / "a.npy", np.zeros(SHAPE, dtype))
        assert_refused(tmp_path / "a.npy", "integers or real floats")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(SHAPE, np.complex64), photometric="minisblack")
    assert_refused(tmp_path / "a.tif", "integers or real floats")


class Trap:
    def __reduce__(self):
        return (exec, ("import sys; sys._byoc_trap = True",))


def test_pickles_are_not_run(tmp_path):
    array = np.array([Trap()] * 16, dtype=object).reshape(2, 2, 2, 2)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", volume=array)
    assert_refused(tmp_path / "a.npy", "exec, which cannot be read without running code")
    assert_refused(tmp_path / "a.npz", "dtype object")
    assert not hasattr(sys, "_byoc_trap")


def npy_header(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(2, 10**6, 10**6, 10**6), (2, 10**30, 5, 5), (2, -5, -6, 7)])
def test_absurd_shapes_in_a_header(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(npy_header(shape) + bytes(1000))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("volume.npy", npy_header(shape) + bytes(1000))
    for name in ("a.npy", "a.npz"):
        assert_refused(tmp_path / name, "at most|not 3D|bytes in|is not")


def test_absurd_shape_in_a_tiff(tmp_path, volume):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, volume, photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page in tiff.pages:
            for tag in ("ImageWidth", "ImageLength"):
                page.tags[tag].overwrite(2**31 - 1, dtype="I")
    assert_refused(path, "at most|damaged")


OME = (
    '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0"'
    ' DimensionOrder="XYZCT" Type="uint16" SizeX="7" SizeY="6" SizeZ="5" SizeC="2" SizeT="1">'
    '<TiffData IFD="0" PlaneCount="10"/></Pixels></Image></OME>'
)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('SizeZ="5"', f'SizeZ="{10**8}"', "planes"),
        ('SizeT="1"', f'SizeT="{10**8}"', "planes"),
        ('SizeX="7"', f'SizeX="{10**9}"', "OME metadata describe"),
        ('PlaneCount="10"', f'PlaneCount="{10**9}"', "planes"),
        ('IFD="0"', f'IFD="{4 * 10**9}"', "planes"),
        ('SizeZ="5"', 'SizeZ="-5"', "OME metadata describe"),
        ('SizeZ="5"', 'SizeZ="five"', "which is not"),
    ],
)
def test_absurd_ome_metadata(tmp_path, volume, old, new, match):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, volume, photometric="minisblack", metadata=None, description=OME)
    np.testing.assert_array_equal(read_volume(path).data, volume)
    tifffile.imwrite(path, volume, photometric="minisblack", metadata=None, description=OME.replace(old, new))
    assert_refused(path, match)


@pytest.mark.parametrize(("tag", "value"), [("TileWidth", 2**17), ("TileByteCounts", 2**35)])
def test_absurd_tiles(tmp_path, volume, tag, value):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, volume, photometric="minisblack", tile=(16, 16), metadata=None, bigtiff=True)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page in tiff.pages:
            page.tags[tag].overwrite(value, dtype="Q")
            if tag == "TileWidth":
                page.tags["TileLength"].overwrite(value, dtype="Q")
    assert_refused(path, "strips or tiles of at most|beyond its end|got fewer")


@pytest.mark.parametrize(("compression", "compress"), [(8, zlib.compress), (34925, lzma.compress)])
def test_a_strip_that_unpacks_to_too_much(tmp_path, monkeypatch, compression, compress):
    monkeypatch.setattr(tiff_format, "MAX_VOLUME_BYTES", 10**6)
    path, bomb = tmp_path / "a.tif", compress(bytes(2 * 10**7))
    tifffile.imwrite(path, np.zeros((2, 2, 300, 300), np.uint8), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        offset = tiff.pages[0].dataoffsets[0]
        for page in tiff.pages:
            for tag, value in (("Compression", compression), ("StripByteCounts", len(bomb)), ("StripOffsets", offset)):
                page.tags[tag].overwrite(value)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bomb)
    tracemalloc.start()
    assert_refused(path, "at most 90000 bytes .* unpacks to more")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_refused_or_harmless(tmp_path, volume, data):
    name = data.draw(st.sampled_from(["a.ome.tif", "a.npz", "a.npy", "tiled.tif"]))
    whole, path = tmp_path / f"whole {name}", tmp_path / name
    if not whole.exists():
        if name == "tiled.tif":
            tifffile.imwrite(
                whole, volume, photometric="minisblack", tile=(16, 16), compression="zlib", predictor=True
            )
        elif name == "a.npy":
            np.save(whole, volume)
        else:
            write_volume(whole, volume / 65535, 0.5)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        damage = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 4), st.just(bytes(4))))
        content[at : at + len(damage)] = damage
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    try:
        read = read_volume(path)
    except ValueError as err:
        assert str(path) in str(err)
    else:
        assert read.data.ndim == 4 and read.data.dtype.kind in "buif" and np.isfinite(read.data).all()


def test_zip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_VOLUME_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "large.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("volume.npy", npy_header((2, 100, 100, 100)) + bytes(2 * 10**6))
    with zipfile.ZipFile(tmp_path / "lying.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("volume.npy", npy_header((2, 10, 10, 10)) + bytes(2 * 10**6))
    assert (tmp_path / "large.npz").stat().st_size < 10**4
    assert_refused(tmp_path / "large.npz", "at most 1000000 bytes")
    assert_refused(tmp_path / "lying.npz", "Expected 2000 bytes .* got 2000000")


def test_a_long_header_is_not_unpacked(tmp_path):
    header = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("volume.npy", "w") as file:
            file.write(header)
            for _ in range(100):
                file.write(b" " * 10**6)
    tracemalloc.start()
    assert_refused(tmp_path / "a.npz", "which is not")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_of_another_compression(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("volume.npy", npy_header((2, 5, 5, 5)) + bytes(250))
    assert_refused(tmp_path / "a.npz", "numpy.savez")


@pytest.mark.parametrize(
    ("size", "names", "match"),
    [
        (np.array([1.0, 2.0]), None, "one or three numbers"),
        (np.array(["1"]), None, "one or three numbers"),
        (np.array([1.0, np.nan, 1.0]), None, "voxel size"),
        (np.array([1.0, -1.0, 1.0]), None, "voxel size"),
        (np.array(1.0), np.array([1, 2]), "list of short texts"),
        (np.array(1.0), np.array([["a", "b"]]), "list of short texts"),
        (np.array(1.0), np.array(["a", "b" * 10**5]), "list of short texts"),
    ],
)
def test_npz_with_wrong_metadata(tmp_path, volume, size, names, match):
    np.savez(
        tmp_path / "a.npz", volume=volume, voxel_size_um=size, **({} if names is None else {"channel_names": names})
    )
    assert_refused(tmp_path / "a.npz", match)


def test_npz_without_a_clear_volume(tmp_path, volume):
    np.savez(tmp_path / "a.npz", raw=volume, mask=volume)
    np.savez(tmp_path / "none.npz")
    assert_refused(tmp_path / "a.npz", "raw.npy.*mask.npy")
    assert_refused(tmp_path / "none.npz", "Expected one array|which is not")


def test_missing_tifffile_names_the_extra(tmp_path, monkeypatch):
    write_ome_tiff(tmp_path / "a.ome.tif", np.zeros(SHAPE))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"pip install .diffusers_byoc\[data\]"):
        read_volume(tmp_path / "a.ome.tif")


@pytest.mark.parametrize(
    ("name", "array", "options", "match"),
    [
        ("a.npy", np.zeros(SHAPE), {}, "ends in .tif"),
        ("a.tif", np.zeros((1, *SHAPE)), {}, "shape"),
        ("a.tif", np.zeros((3, 5, 6, 7)), {}, "Expected 3 names"),
        ("a.tif", np.full(SHAPE, -0.1), {}, r"\[0, 1\]"),
        ("a.tif", np.full(SHAPE, 2, np.uint8), {}, r"\[0, 1\]"),
        ("a.tif", np.full(SHAPE, np.nan), {}, r"\[0, 1\]"),
        ("a.tif", np.zeros(SHAPE), {"voxel_size_um": 0.0}, "voxel_size_um"),
        ("a.tif", np.zeros(SHAPE), {"voxel_size_um": (1.0, 1.0)}, "voxel_size_um"),
    ],
)
def test_write_refuses(tmp_path, name, array, options, match):
    with pytest.raises(ValueError, match=match):
        write_ome_tiff(tmp_path / name, array, **options)
    assert not list(tmp_path.iterdir())
