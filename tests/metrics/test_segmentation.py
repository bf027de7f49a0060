import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes, distance_transform_edt, gaussian_filter, label

from diffusers_byoc.metrics.segmentation import bounding_box, segment_channel
from diffusers_byoc.metrics.spectrum import _window


def blobs(seed, size=(20, 24, 28)):
    """Many parts, some at the border, and specks."""
    return gaussian_filter(np.random.default_rng(seed).random(size), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_parts_are_those_of_the_whole_volume(seed):
    channel = blobs(seed)
    channel[:, :5] = 0
    channel[6:13, 10:17, 8:15], channel[8:11, 12:15, 10:13] = 1, 0  # a hole
    filled = binary_fill_holes(channel > 0.54)
    components, number = label(filled, np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel())[1:]
    large = [part + 1 for part in range(number) if sizes[part] >= 0.01 * sizes.max()]
    found = segment_channel(channel, 0.54)
    assert 1 < found.num_parts == len(large) < number and filled.sum() > (channel > 0.54).sum()
    for number, part in enumerate(large, 1):
        np.testing.assert_array_equal(found.parts == number, components == part)
    np.testing.assert_array_equal(found.mask, np.isin(components, large))
    assert found.largest_part_share == sizes.max() / sizes.sum()


def test_the_window_measures_depth_from_the_border_of_the_volume_too():
    mask = blobs(0) > 0.5
    mask[:, :6] = False
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
    window = _window(blobs(0)[None], mask)
    np.testing.assert_array_equal(window, np.sin(np.pi / 2 * np.clip(depth / 2, 0, 1)) ** 2)
    assert not _window(blobs(0)[None], mask & False).any()


def test_the_bounding_box_and_its_margin_end_at_the_volume():
    mask = np.zeros((10, 10, 10), bool)
    mask[1:4, 5, 8:] = True
    assert bounding_box(mask) == (slice(1, 4), slice(5, 6), slice(8, 10))
    assert mask[bounding_box(mask, 2)].shape == (6, 5, 4)  # 0 to 5, 3 to 7, 6 to 9
