import struct
from contextlib import nullcontext
from types import SimpleNamespace

import dask.array
import numpy as np
import pytest
import tifffile

from diffusers_byoc.data.microscope.stacks import channel_indices, open_stack, read_channels


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bioio.*")


def write_tiff(path, data, **options):
    tifffile.imwrite(path, data, photometric="minisblack", **options)
    return path


def ome(unit="µm", sizes=(1.5, 0.5, 0.25), **metadata):
    for axis, size in zip("ZYX", sizes, strict=True):
        metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": unit}
    return {"ome": True, "metadata": {"axes": "CZYX"} | metadata}


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 1000, (2, 5, 24, 26)).astype(np.uint16)


@pytest.mark.parametrize(
    ("name", "options", "voxel_size_um"),
    [
        ("a.ome.tif", ome(), (1.5, 0.5, 0.25)),
        ("a.ome.tif", ome("nm", (1500.0, 500.0, 250.0)), (1.5, 0.5, 0.25)),
        ("a.ome.tif", ome("mm", (1.5e-3, 5e-4, 2.5e-4)), (1.5, 0.5, 0.25)),
        ("a.ome.tif", ome("pixel", (1.0, 1.0, 1.0)), None),
        ("a.ome.tif", {"ome": True, "metadata": {"axes": "CZYX"}}, None),
        ("a.tif", {}, None),
        ("a.tif", {"resolution": (4e4, 2e4), "resolutionunit": "CENTIMETER"}, None),  # says nothing of z
    ],
)
def test_voxel_sizes_of_tiffs(tmp_path, data, name, options, voxel_size_um):
    stack = open_stack(write_tiff(tmp_path / name, data, **options))
    if voxel_size_um is None:
        assert stack.voxel_size_um is None
    else:
        assert stack.voxel_size_um == pytest.approx(voxel_size_um)
    np.testing.assert_array_equal(read_channels(stack).data, data)


@pytest.mark.parametrize(("unit", "size"), [("um", 0.5), ("nm", 0.0005), ("pixel", None)])
def test_voxel_sizes_of_imagej(tmp_path, data, unit, size):
    path = tmp_path / "ä b.tif"
    metadata = {"axes": "ZCYX", "spacing": 0.5, "unit": unit}
    tifffile.imwrite(path, data.transpose(1, 0, 2, 3), imagej=True, resolution=(2, 2), metadata=metadata)
    stack = open_stack(path)
    assert stack.voxel_size_um == (None if size is None else pytest.approx((size,) * 3))
    np.testing.assert_array_equal(read_channels(stack, [1]).data, data[1:])


@pytest.mark.parametrize("max_gb", [4.0, 5e-6])
def test_a_stack_larger_than_memory_is_read_by_boxes(tmp_path, data, max_gb):
    metadata = ome(Channel={"Name": ["DNA", "membrane"]})
    stack = open_stack(write_tiff(tmp_path / "a.ome.tif", data, **metadata), max_gb=max_gb)
    assert channel_indices(stack, {"cell": "Membrane", "nucleus": "0"}) == [1, 0]
    chosen = read_channels(stack, [1, 0], max_gb)
    assert chosen.channel_names == ("membrane", "DNA")
    assert isinstance(chosen.data, np.ndarray) == (max_gb > 1)
    box = chosen.data[:, 1:4, 3:9, 20:]
    np.testing.assert_array_equal(np.asarray(box), data[::-1, 1:4, 3:9, 20:])


def test_a_plane_larger_than_memory_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="Allow more memory"):
        open_stack(write_tiff(tmp_path / "a.tif", data), max_gb=1e-6)


def test_channels_that_are_not_there(tmp_path, data):
    stack = open_stack(write_tiff(tmp_path / "a.ome.tif", data, **ome(Channel={"Name": ["DNA", "DNA"]})))
    for wanted, message in (("2", "'2' for cell in .*, got none: it has 0 .DNA., 1 .DNA."), ("dna", "got several")):
        with pytest.raises(ValueError, match=message):
            channel_indices(stack, {"cell": wanted})


@pytest.mark.parametrize(("unit", "factor"), [("micrometer", 1), ("nanometer", 1e-3), (None, None)])
def test_ome_zarr(tmp_path, data, unit, factor):
    zarr, writer = pytest.importorskip("zarr"), pytest.importorskip("ome_zarr.writer")
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space"} | ({"unit": unit} if unit else {}) for name in "zyx"]
    scale = {"type": "scale", "scale": [1.0, 1.5, 0.5, 0.25]}
    group = zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="w")
    zarr.array(data, store=group.store, path="s0", chunks=(1, 1, *data.shape[2:]))
    writer.write_multiscales_metadata(group, [{"path": "s0", "coordinateTransformations": [scale]}], axes=axes)
    stack = open_stack(tmp_path / "a.ome.zarr")
    expected = None if factor is None else pytest.approx((1.5 * factor, 0.5 * factor, 0.25 * factor))
    assert stack.voxel_size_um == expected
    np.testing.assert_array_equal(read_channels(stack).data, data)


def test_czi(tmp_path, data):
    czi = pytest.importorskip("pylibCZIrw.czi")
    path = tmp_path / "a.czi"
    with czi.create_czi(str(path)) as writer:
        for channel, z in np.ndindex(data.shape[:2]):
            writer.write(data[channel, z], plane={"C": channel, "Z": z, "T": 0})
        names = {0: "membrane", 1: "DNA"}
        writer.write_metadata("a", channel_names=names, scale_x=2.5e-7, scale_y=5e-7, scale_z=1.5e-6)
    stack = open_stack(path)
    assert stack.voxel_size_um == pytest.approx((1.5, 0.5, 0.25))
    assert stack.channel_names == ("membrane", "DNA")
    np.testing.assert_array_equal(read_channels(stack).data, data)


def write_lif(path, data, z_um, dim_ids=(1, 2, 3)):
    """A Leica file of one image: an XML header, then its voxels; `z_um` from the first plane to the last.

    `dim_ids` are what Leica calls the axes x, y and z of `data`: 1 to 3 are these, 5 is the wavelength, 10 the tile.
    """
    channels = "".join(
        f'<ChannelDescription DataType="0" ChannelTag="0" Resolution="16" NameOfMeasuredQuantity="" Unit=""'
        f' Min="0" Max="65535" LUTName="{name}" IsLUTInverted="0" BytesInc="{index * data[0].nbytes}" BitInc="0"/>'
        for index, name in enumerate(("Green", "Red"))
    )
    strides, lengths_um = data.strides[:0:-1], (0.25 * (data.shape[3] - 1), 0.5 * (data.shape[2] - 1), z_um)
    dimensions = "".join(
        f'<DimensionDescription DimID="{dim_ids[axis]}" NumberOfElements="{data.shape[3 - axis]}" Origin="0.0"'
        f' Length="{lengths_um[axis] * 1e-6}" Unit="m" BitInc="0" BytesInc="{strides[axis]}"/>'
        for axis in range(3)
    )
    xml = (
        '<LMSDataContainerHeader Version="2"><Element Name="experiment" Visibility="1" UniqueID="a"><Data/><Children>'
        '<Element Name="Series001" Visibility="1" UniqueID="b"><Data><Image TextDescription=""><ImageDescription>'
        f"<Channels>{channels}</Channels><Dimensions>{dimensions}</Dimensions></ImageDescription></Image></Data>"
        f'<Memory Size="{data.nbytes}" MemoryBlockID="MemBlock_1"/></Element></Children></Element>'
        "</LMSDataContainerHeader>"
    ).encode("utf-16-le")
    block = "MemBlock_1".encode("utf-16-le")
    with open(path, "wb") as file:
        file.write(struct.pack("<iiBi", 0x70, 5 + len(xml), 0x2A, len(xml) // 2) + xml)
        file.write(struct.pack("<iiBqBi", 0x70, 14 + len(block), 0x2A, data.nbytes, 0x2A, len(block) // 2) + block)
        file.write(data.tobytes())


@pytest.mark.parametrize("direction", [1, -1])
def test_lif(tmp_path, data, direction):
    pytest.importorskip("bioio_lif")
    pytest.importorskip("liffile")  # of bioio-lif 2.0
    write_lif(tmp_path / "a.lif", data, direction * 1.5 * (data.shape[1] - 1))
    stack = open_stack(tmp_path / "a.lif")
    assert stack.voxel_size_um == pytest.approx((1.5, 0.5, 0.25))  # whichever way the stage went
    assert stack.channel_names == ("Green", "Red")
    np.testing.assert_array_equal(read_channels(stack).data, data)


@pytest.mark.parametrize(
    ("dim_ids", "axes"),
    [
        ((1, 2, 5), r"C=2, λ=5 \(emission wavelength\), Y=24, X=26"),
        ((1, 2, 10), r"C=2, M=5 \(tile\), Y=24, X=26"),
        ((1, 2, 11), "C=2, L=5, Y=24, X=26"),
        ((1, 3, 2), "C=2, Y=5, Z=24, X=26"),
        ((1, 3, 4), "C=2, T=5, Z=24, X=26"),
    ],
    ids=["spectral", "tiles", "loop", "xzy", "xzt"],
)
def test_other_scans_of_leica_are_named(tmp_path, data, dim_ids, axes):
    pytest.importorskip("bioio_lif")
    pytest.importorskip("liffile")  # of bioio-lif 2.0
    write_lif(tmp_path / "a.lif", data, 6.0, dim_ids)
    with pytest.raises(ValueError, match=rf"Expected planes of Y and X .*a\.lif, got a scan of {axes}. Export it"):
        open_stack(tmp_path / "a.lif")


def test_a_time_series_of_leica(tmp_path, data):
    pytest.importorskip("bioio_lif")
    pytest.importorskip("liffile")  # of bioio-lif 2.0
    write_lif(tmp_path / "a.lif", data, 6.0, (1, 2, 4))
    with pytest.raises(ValueError, match="a time series .*T=5"):
        open_stack(tmp_path / "a.lif")


@pytest.mark.parametrize(
    ("is_calibrated", "voxel_size_um"),
    [((True, True, True), (1.5, 0.5, 0.25)), ((True, True, False), None), ((False, False, False), None)],
)
def test_nd2_says_whether_it_is_calibrated(tmp_path, data, monkeypatch, is_calibrated, voxel_size_um):
    """For an axis that is not, bioio has 1 µm, from nd2. Nothing writes such files: the readers are made up."""
    bioio, nd2 = pytest.importorskip("bioio"), pytest.importorskip("nd2")
    sizes = dict(zip("XYZ", np.where(is_calibrated, (0.25, 0.5, 1.5), 1.0).tolist(), strict=True))
    image = SimpleNamespace(
        scenes=["XYPos:0"],
        set_scene=lambda index: None,
        dtype=data.dtype,
        dims=dict(zip("TCZYX", (1, *data.shape), strict=True)),
        get_image_data=lambda axes: data[None],
        get_image_dask_data=lambda axes: dask.array.from_array(data[None]),
        physical_pixel_sizes=SimpleNamespace(**sizes),
        dimension_properties=SimpleNamespace(**dict.fromkeys("ZYX", SimpleNamespace(unit=None))),
        channel_names=["membrane", "DNA"],
    )
    channel = SimpleNamespace(volume=SimpleNamespace(axesCalibrated=is_calibrated))
    file = SimpleNamespace(metadata=SimpleNamespace(channels=[channel, channel]))
    monkeypatch.setattr(bioio, "BioImage", lambda path: image)
    monkeypatch.setattr(nd2, "ND2File", lambda path: nullcontext(file))
    (tmp_path / "a.nd2").write_bytes(b"not read")
    stack = open_stack(tmp_path / "a.nd2")
    assert stack.voxel_size_um == voxel_size_um and stack.channel_names == ("membrane", "DNA")
    np.testing.assert_array_equal(read_channels(stack).data, data)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((24, 26), {}, "a 2D image"),
        ((3, 24, 26), {"ome": True, "metadata": {"axes": "CYX"}}, "a 2D image"),
        ((3, 5, 24, 26), {"ome": True, "metadata": {"axes": "TZYX"}}, "a time series .*T=3"),
        ((3, 24, 26), {"imagej": True, "metadata": {"axes": "TYX"}}, "a time series"),
        ((5, 24, 26), {"dtype": np.complex64}, "complex64"),
    ],
)
def test_what_is_no_stack_is_refused(tmp_path, shape, options, message):
    path = tmp_path / ("a.ome.tif" if "ome" in options else "a.tif")
    write_tiff(path, np.zeros(shape, options.pop("dtype", np.uint16)), **options)
    with pytest.raises(ValueError, match=message) as caught:
        open_stack(path)
    assert str(path) in str(caught.value)


def test_several_scenes(tmp_path, data):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for scene in (data, data + 1):
            writer.write(scene, photometric="minisblack", metadata={"axes": "CZYX"})
    with pytest.raises(ValueError, match="got 2: 0 .*, 1 "):
        open_stack(path)
    np.testing.assert_array_equal(read_channels(open_stack(path, scene="1")).data, data + 1)
    with pytest.raises(ValueError, match="Expected one image called 'third' .*, got 0 .*: 0 .*, 1 "):
        open_stack(path, scene="third")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_stack(tmp_path / "a.tif")
    (tmp_path / "a.tif").touch()
    with pytest.raises(ValueError, match="0 bytes"):
        open_stack(tmp_path / "a.tif")
    (tmp_path / "a.ome.zarr").mkdir()
    with pytest.raises(ValueError, match="a.ome.zarr"):
        open_stack(tmp_path / "a.ome.zarr")
    (tmp_path / "a.xyz").write_text("no image")
    with pytest.raises(ValueError, match="Expected one of"):
        open_stack(tmp_path / "a.xyz")


@pytest.mark.parametrize("kind", ["ome", "ome compressed", "imagej", "plain", "pages"])
def test_a_truncated_file_is_never_read_as_something_else(tmp_path, data, kind):
    path = tmp_path / ("a.ome.tif" if "ome" in kind else "a.tif")
    if kind == "imagej":
        tifffile.imwrite(path, data.transpose(1, 0, 2, 3), imagej=True, metadata={"axes": "ZCYX"})
    elif kind == "pages":
        with tifffile.TiffWriter(path) as writer:
            for plane in data[0]:
                writer.write(plane, contiguous=False, metadata=None)
    else:
        write_tiff(path, data, **({} if kind == "plain" else ome()), compression="zlib" if "c" in kind[4:] else None)
    whole = path.read_bytes()
    expected = read_channels(open_stack(path)).data
    for length in np.linspace(1, len(whole) - 1, 12).astype(int):
        path.write_bytes(whole[:length])
        try:
            got = read_channels(open_stack(path)).data
        except ValueError as error:
            assert str(path) in str(error)
        else:  # what is missing was no part of the image
            np.testing.assert_array_equal(got, expected)
