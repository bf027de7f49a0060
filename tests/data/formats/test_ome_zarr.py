"""OME-Zarr as its writers make it: images, labels within them, plates, several images in Bio-Formats' layout."""

import json

import numpy as np
import pytest

from diffusers_byoc.data import read_volume, write_volume
from diffusers_byoc.data.formats.ome_zarr import inner_images, inner_labels
from diffusers_byoc.data.microscope.stacks import open_stack, read_channels


zarr = pytest.importorskip("zarr")
IS_ZARR_3 = int(zarr.__version__.split(".")[0]) >= 3
OLD = {"zarr_format": 2} if IS_ZARR_3 else {}  # zarr 2 knows no other
SHAPE = (2, 5, 24, 26)


def create_array(group, name, data, chunks):
    create = group.create_array if IS_ZARR_3 else group.create_dataset
    create(name, data=np.ascontiguousarray(data), chunks=chunks)


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 2**16, SHAPE).astype(np.uint16)


def write_image(
    path, data, axes="czyx", scale=(1.0, 1.5, 0.5, 0.25), units="micrometer", name="", version="0.4", **more
):
    """By hand, so that every detail is as it stands here."""
    units = dict(zip("zyx", [units] * 3 if isinstance(units, str) or units is None else units, strict=True))
    is_new = version == "0.5"
    group = zarr.open_group(str(path), mode="w", **({"zarr_format": 3} if is_new else OLD))
    for level, array in enumerate((data, data[..., ::2, ::2])):  # full resolution first
        create_array(group, str(level), array, (1,) * (data.ndim - 2) + (16, 16))
    described = [
        {"name": axis, "type": "channel" if axis == "c" else "time" if axis == "t" else "space"}
        | ({"unit": units[axis]} if units.get(axis) else {})
        for axis in axes
    ]
    if version in ("0.1", "0.2", "0.3"):
        described = list(axes)
    multiscale = {"version": version, "name": name, "datasets": [{"path": "0"}, {"path": "1"}]}
    if version not in ("0.1", "0.2"):
        multiscale["axes"] = described
    if scale is not None:
        for level, dataset in enumerate(multiscale["datasets"]):
            factors = [s * (2**level if axis in "yx" else 1) for s, axis in zip(scale, axes, strict=True)]
            dataset["coordinateTransformations"] = [{"type": "scale", "scale": factors}]
    attributes = {"multiscales": [multiscale | more]}
    attributes["omero"] = {"channels": [{"label": f"channel {index}"} for index in range(2)]}
    group.attrs.update({"ome": attributes | {"version": "0.5"}} if is_new else attributes)
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    ("units", "voxel_size_um"),
    [
        ("micrometer", (1.5, 0.5, 0.25)),
        ("nanometer", (1.5e-3, 5e-4, 2.5e-4)),
        ("µm", (1.5, 0.5, 0.25)),
        (("nanometer", "micrometer", "millimeter"), (1.5e-3, 0.5, 250.0)),
        (None, None),
        ((None, "micrometer", "micrometer"), None),
    ],
)
def test_each_axis_in_its_own_unit(tmp_path, data, units, voxel_size_um, version):
    if version == "0.5" and not IS_ZARR_3:
        pytest.skip("zarr 2 writes none")
    path = write_image(tmp_path / "a.ome.zarr", data, units=units, version=version)
    stack = open_stack(path)
    np.testing.assert_array_equal(read_channels(stack).data, data)
    assert stack.voxel_size_um == (voxel_size_um and pytest.approx(voxel_size_um))
    assert stack.channel_names == ("channel 0", "channel 1")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.voxel_size_um == stack.voxel_size_um and volume.channel_names == stack.channel_names


@pytest.mark.parametrize("version", ["0.1", "0.3"])
def test_older_versions_have_no_sizes(tmp_path, data, version):
    path = write_image(tmp_path / "a.zarr", data[None], "tczyx", None, version=version)
    np.testing.assert_array_equal(read_volume(path).data, data)
    assert read_volume(path).voxel_size_um is None


def test_a_scale_for_all_levels_multiplies_that_of_one(tmp_path, data):
    common = [{"type": "scale", "scale": [1.0, 2.0, 2.0, 2.0]}]
    path = write_image(tmp_path / "a.ome.zarr", data, coordinateTransformations=common)
    assert open_stack(path).voxel_size_um == pytest.approx((3.0, 1.0, 0.5))


@pytest.mark.parametrize("scale", [(1.0, -1.5, 0.5, 0.25), (1.0, 0.0, 0.5, 0.25)])
def test_steps_that_can_be_none_are_refused(tmp_path, data, scale):
    path = write_image(tmp_path / "a.ome.zarr", data, scale=scale)
    with pytest.raises(ValueError, match=f"z: {scale[1]:g} micrometer"):
        read_volume(path)
    assert open_stack(path).voxel_size_um is None


def test_what_is_written_is_read(tmp_path, data):
    pytest.importorskip("ome_zarr")
    write_volume(tmp_path / "a.ome.zarr", data / 65535, (1.5, 0.5, 0.25))
    read = read_volume(tmp_path / "a.ome.zarr")
    np.testing.assert_array_equal(read.data, data)
    assert (read.voxel_size_um, read.channel_names) == ((1.5, 0.5, 0.25), ("cell", "nucleus"))


def test_labels_within_an_image(tmp_path, data):
    path = write_image(tmp_path / "A1.ome.zarr", data)
    assert inner_labels(path) == []
    labels = zarr.open_group(str(path / "labels"), mode="w", **OLD)
    write_image(path / "labels" / "cells", data[:1] % 7, version="0.4")
    labels.attrs["labels"] = ["cells"]
    assert inner_labels(path) == [path / "labels" / "cells"]
    np.testing.assert_array_equal(read_channels(open_stack(path / "labels" / "cells")).data, data[:1] % 7)
    np.testing.assert_array_equal(read_channels(open_stack(path)).data, data)


def write_plate(path, fields, listed=None):
    """A plate whose wells have fields, {"A/1": [data, ...], ...}; `listed` adds what is not there."""
    plate = zarr.open_group(str(path), mode="w", **OLD)
    every = {well: list(range(len(images))) for well, images in fields.items()} | (listed or {})
    rows, columns = sorted({well[0] for well in every}), sorted({well[2:] for well in every})
    plate.attrs["plate"] = {
        "columns": [{"name": column} for column in columns],
        "rows": [{"name": row} for row in rows],
        "wells": [{"path": well} for well in every],
        "version": "0.4",
    }
    for well, images in fields.items():
        group = zarr.open_group(str(path / well), mode="w", **OLD)
        group.attrs["well"] = {"images": [{"path": str(number)} for number in every[well]], "version": "0.4"}
        for number, image in enumerate(images):
            write_image(path / well / str(number), image)
    return path


def test_a_plate_is_its_fields(tmp_path, data):
    path = write_plate(tmp_path / "p.ome.zarr", {"A/1": [data, data + 1], "B/2": [data + 2]}, {"C/3": [0]})
    expected = [path / "A/1/0", path / "A/1/1", path / "B/2/0", path / "C/3"]
    assert inner_images(path) == expected and inner_images(path / "A/1") == expected[:2]
    assert inner_images(path / "A/1/0") == []
    for step, field in enumerate(expected[:3]):
        np.testing.assert_array_equal(read_volume(field).data, data + step)
    for field in (path, path / "A/1"):
        with pytest.raises(ValueError, match="a plate of several. Give one field, as .*A/1/0"):
            read_volume(field)
    with pytest.raises(FileNotFoundError):
        read_volume(expected[3])


@pytest.mark.parametrize("has_names", [True, False])
def test_several_images_in_the_layout_of_bio_formats(tmp_path, data, has_names):
    path = tmp_path / "a.ome.zarr"
    group = zarr.open_group(str(path), mode="w", **OLD)
    group.attrs["bioformats2raw.layout"] = 3
    for number in range(2):
        write_image(path / str(number), data + number, scale=(1.0, 1.5 + number, 0.5, 0.25))
    if has_names:
        (path / "OME").mkdir()
        images = "".join(
            f'<Image ID="Image:{number}" Name="{name}"/>' for number, name in enumerate(("over", "stack"))
        )
        namespace = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
        (path / "OME" / "METADATA.ome.xml").write_text(f'<OME xmlns="{namespace}">{images}</OME>')
    with pytest.raises(ValueError, match="one image .* got 2: 0 "):
        open_stack(path)
    for scene in ("1", *(["stack"] if has_names else [])):
        stack = open_stack(path, scene)
        np.testing.assert_array_equal(read_channels(stack).data, data + 1)
        assert stack.voxel_size_um == pytest.approx((2.5, 0.5, 0.25))


def test_what_is_no_image(tmp_path):
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w", **OLD).attrs["hello"] = 1
    (tmp_path / "b.zarr").mkdir()
    for name, match in (("a.zarr", "a Zarr group with hello"), ("b.zarr", "Zarr group in .*, got none")):
        with pytest.raises(ValueError, match=match):
            read_volume(tmp_path / name)


def test_a_codec_that_is_not_installed_is_named(tmp_path, data):
    path = write_image(tmp_path / "a.ome.zarr", data)
    text = (path / "0" / ".zarray").read_text()
    changed = json.loads(text) | {"compressor": {"id": "mystery"}}
    (path / "0" / ".zarray").write_text(json.dumps(changed))
    with pytest.raises(ImportError, match="codec .*a.ome.zarr, got mystery, .* not damaged"):
        read_volume(path)


@pytest.mark.parametrize("change", ["truncate", "garbage", "attributes"])
def test_damage_is_named(tmp_path, data, change):
    path = write_image(tmp_path / "a.ome.zarr", data)
    chunk = path / "0" / "1" / "2" / "0" / "0"
    chunk = chunk if chunk.is_file() else path / "0" / "1.2.0.0"
    if change == "attributes":
        (path / ".zattrs").write_text("{")
    else:
        chunk.write_bytes(chunk.read_bytes()[:40] if change == "truncate" else b"x" * 50)
    for read in (read_volume, lambda path: read_channels(open_stack(path))):
        with pytest.raises(ValueError, match="a.ome.zarr, (which is not|got a part of) .*damaged"):
            read(path)
