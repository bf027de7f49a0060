"""NumPy's labels, Cellpose's _seg.npy, NIfTI and Imaris."""

import pickle
import sys

import numpy as np
import pytest

from diffusers_byoc.data import read_volume, write_volume
from diffusers_byoc.data.microscope.stacks import open_stack, read_channels


SHAPE = (2, 5, 24, 26)


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 2**16, SHAPE).astype(np.uint16)


# Cellpose


def save_seg(path, masks, **more):
    """As Cellpose's graphical interface does: a dictionary in an array of one object, pickled."""
    content = {
        "outlines": masks * 0,
        "colors": np.ones((5, 3), np.uint8),
        "masks": masks,
        "filename": "C:/images/A1.tif",
        "flows": [np.zeros((1, 5, 6), np.uint8), np.float32(0.5), [1, 2], None],
        "ismanual": np.zeros(3, bool),
        "manual_changes": [],
        "model_path": 0,
        "diameter": np.nan,
    }
    np.save(path, content | more)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", ">i4", "int64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_labels_of_cellpose(tmp_path, dtype, order):
    masks = np.asarray(np.random.default_rng(0).integers(0, 100, SHAPE[1:]).astype(dtype), order=order)
    save_seg(tmp_path / "A1_seg.npy", masks)
    read = read_channels(open_stack(tmp_path / "A1_seg.npy"))
    np.testing.assert_array_equal(read.data, masks[None])
    assert read.data.dtype == masks.dtype.newbyteorder("=")
    np.save(tmp_path / "A1_masks.npy", masks)
    np.testing.assert_array_equal(read_channels(open_stack(tmp_path / "A1_masks.npy")).data, masks[None])


class Trap:
    def __reduce__(self):
        return (exec, ("import sys; sys._byoc_trap = True",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_file_of_cellpose_is_never_run(tmp_path, protocol):
    path = tmp_path / "A1_seg.npy"
    save_seg(path, np.ones(SHAPE[1:], np.uint16), filename=Trap())
    header = path.read_bytes()[: path.read_bytes().index(b"\n") + 1]
    content = {"masks": np.ones(SHAPE[1:], np.uint16), "x": Trap()}
    array = np.empty((), object)
    array[()] = content
    path.write_bytes(header + pickle.dumps(array, protocol))
    with pytest.raises(ValueError, match="which cannot be read without running code. Save the labels as TIFF"):
        open_stack(path)
    assert not hasattr(sys, "_byoc_trap")


def test_what_is_no_label_image_of_cellpose(tmp_path):
    save_seg(tmp_path / "flat_seg.npy", np.ones((24, 26), np.uint16))
    with pytest.raises(ValueError, match="a 2D image"):
        open_stack(tmp_path / "flat_seg.npy")
    np.save(tmp_path / "b_seg.npy", {"no": "masks"})
    with pytest.raises(ValueError, match="dictionary with an array of masks"):
        open_stack(tmp_path / "b_seg.npy")
    np.save(tmp_path / "c_seg.npy", {"masks": np.array([{}], object)})
    with pytest.raises(ValueError, match="plain numbers as masks"):
        open_stack(tmp_path / "c_seg.npy")
    save_seg(tmp_path / "d_seg.npy", np.ones(SHAPE[1:], np.uint16))
    whole = (tmp_path / "d_seg.npy").read_bytes()
    for length in range(130, len(whole), 500):
        (tmp_path / "d_seg.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="d_seg.npy"):
            open_stack(tmp_path / "d_seg.npy")


# NIfTI


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize("voxel_size_um", [(1.5, 0.5, 0.25), None])
def test_nifti_there_and_back(tmp_path, name, num_channels, voxel_size_um):
    pytest.importorskip("nibabel")
    data = np.random.default_rng(0).integers(0, 2**16, (num_channels, 5, 6, 7)).astype(np.uint16)
    write_volume(tmp_path / name, data / 65535, voxel_size_um, tuple("abc"[:num_channels]))
    for read in (read_volume(tmp_path / name), read_channels(open_stack(tmp_path / name))):
        np.testing.assert_array_equal(read.data, data)
        assert read.data.dtype == np.uint16
        assert read.voxel_size_um == (voxel_size_um and pytest.approx(voxel_size_um))


@pytest.mark.parametrize(
    ("units", "shape", "expected", "voxel_size_um"),
    [
        (("mm", "unknown"), (7, 6, 5), (1, 5, 6, 7), (1500.0, 500.0, 250.0)),
        (("micron", "unknown"), (7, 6, 5, 2), (2, 5, 6, 7), (1.5, 0.5, 0.25)),  # no time: channels
        (("meter", "unknown"), (7, 6, 5, 1, 2), (2, 5, 6, 7), (1.5e6, 5e5, 2.5e5)),
        (("unknown", "unknown"), (7, 6, 5), (1, 5, 6, 7), None),
    ],
)
def test_nifti_of_others(tmp_path, units, shape, expected, voxel_size_um):
    nibabel = pytest.importorskip("nibabel")
    array = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)
    image = nibabel.Nifti1Image(array, np.diag([-0.25, 0.5, 1.5, 1.0]))
    image.header.set_xyzt_units(*units)
    nibabel.save(image, tmp_path / "a.nii.gz")
    read = read_volume(tmp_path / "a.nii.gz")
    assert read.data.shape == expected and read.voxel_size_um == (voxel_size_um and pytest.approx(voxel_size_um))
    for channel in range(expected[0]):
        one = array.reshape(7, 6, 5, -1)[..., channel]
        np.testing.assert_array_equal(read.data[channel], one.transpose(2, 1, 0))


def test_nifti_of_several_times(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    array = np.random.default_rng(0).integers(0, 1000, (7, 6, 5, 3)).astype(np.int16)
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.header.set_xyzt_units("micron", "sec")
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match="a time series .*T=3"):
        read_volume(tmp_path / "a.nii")
    read = read_channels(open_stack(tmp_path / "a.nii", time=2))
    np.testing.assert_array_equal(read.data[0], array[..., 2].transpose(2, 1, 0))


# Imaris


def write_ims(path, data, unit="um", names=("DNA", "membrane")):
    """(T, C, Z, Y, X), as Imaris lays it out: padded to whole chunks, texts as single characters."""
    h5py = pytest.importorskip("h5py")

    def text(value):
        return np.array([character.encode() for character in str(value)], "S1")

    with h5py.File(path, "w") as file:
        info = file.create_group("DataSetInfo/Image").attrs
        for number, (axis, length, step) in enumerate(zip("XYZ", data.shape[:1:-1], (0.25, 0.5, 1.5), strict=True)):
            info[axis] = text(length)
            info[f"ExtMin{number}"], info[f"ExtMax{number}"] = text(10), text(10 + length * step)
        info["Unit"] = text(unit)
        for channel, name in enumerate(names):
            file.create_group(f"DataSetInfo/Channel {channel}").attrs["Name"] = text(name)
        for level in (0, 1):
            for time, channel in np.ndindex(data.shape[:2]):
                array = data[time, channel, :, :: 1 + level, :: 1 + level]
                padded = np.pad(array, [(0, 3)] * 3)
                place = f"DataSet/ResolutionLevel {level}/TimePoint {time}/Channel {channel}/Data"
                file.create_dataset(place, data=padded, chunks=(4, 8, 8), compression="gzip")
    return path


@pytest.mark.parametrize(("unit", "factor"), [("um", 1.0), ("nm", 1e-3), ("mm", 1e3)])
def test_imaris(tmp_path, data, unit, factor):
    path = write_ims(tmp_path / "a.ims", data[None], unit)
    stack = open_stack(path)
    assert stack.channel_names == ("DNA", "membrane")
    assert stack.voxel_size_um == pytest.approx((1.5 * factor, 0.5 * factor, 0.25 * factor))
    np.testing.assert_array_equal(read_channels(stack).data, data)
    np.testing.assert_array_equal(np.asarray(stack.data[:, 1:4, 3:9, 20:]), data[:, 1:4, 3:9, 20:])
    np.testing.assert_array_equal(read_volume(path).data, data)


def test_imaris_of_several_times(tmp_path, data):
    path = write_ims(tmp_path / "a.ims", np.stack([data, data + 1, data + 2]))
    with pytest.raises(ValueError, match="time series .*T=3"):
        open_stack(path)
    np.testing.assert_array_equal(read_channels(open_stack(path, time=1)).data, data + 1)


def test_what_is_no_file_of_imaris(tmp_path, data):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.ims", "w") as file:
        file["x"] = data
    (tmp_path / "b.ims").write_bytes(write_ims(tmp_path / "c.ims", data[None]).read_bytes()[:-5000])
    for name in "ab":
        with pytest.raises(ValueError, match=rf"{name}\.ims.*damaged"):
            read_volume(tmp_path / f"{name}.ims")
