import numpy as np
import pytest

from diffusers_byoc.data import read_volume, write_volume
from diffusers_byoc.data.microscope.stacks import open_stack, read_channels


SHAPE = (2, 5, 24, 26)


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 2**16, SHAPE).astype(np.uint16)


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
