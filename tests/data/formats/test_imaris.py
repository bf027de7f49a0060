import numpy as np
import pytest

from diffusers_byoc.data import read_volume
from diffusers_byoc.data.microscope.stacks import open_stack, read_channels


SHAPE = (2, 5, 24, 26)


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 2**16, SHAPE).astype(np.uint16)


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
