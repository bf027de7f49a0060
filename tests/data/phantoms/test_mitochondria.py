import numpy as np
import pytest
from scipy import ndimage

from diffusers_byoc.data import PhantomCells, VolumeProcessor, make_phantom


def test_the_other_channels_are_those_of_the_same_cell():
    two, three = (make_phantom("blebbistatin", 3, max_size=32, voxel_size_um=2.0, num_channels=n) for n in (2, 3))
    assert three.volume.shape == three.masks.shape == (3, *two.volume.shape[1:])
    np.testing.assert_array_equal(three.volume[:2], two.volume)
    np.testing.assert_array_equal(three.masks[:2], two.masks)
    assert two.truth.mitochondria_volume_um3 is None


def test_mitochondria_are_in_the_cytoplasm_as_often_as_the_law_says():
    """Of the voxels at some distance from the nucleus, over several cells."""
    distances, is_mitochondria, brightness = [], [], []
    for seed in range(4):
        phantom = make_phantom("nocodazole", seed, num_channels=3)
        cell, nucleus, mitochondria = phantom.masks
        assert not (mitochondria & nucleus).any() and not (mitochondria & ~cell).any()
        assert phantom.truth.mitochondria_volume_um3 == mitochondria.sum()
        cytoplasm = cell & ~nucleus
        distances.append(ndimage.distance_transform_edt(~nucleus)[cytoplasm] - 0.5)
        is_mitochondria.append(mitochondria[cytoplasm])
        brightness.append([phantom.volume[2][mask].mean() for mask in (mitochondria, cytoplasm & ~mitochondria)])
    distances, is_mitochondria = np.concatenate(distances), np.concatenate(is_mitochondria)
    for low, high in ((0, 2), (2, 4), (4, 8)):
        band = (distances >= low) & (distances < high)
        expected = 0.3 * np.exp(-distances[band] / 5).mean()
        assert is_mitochondria[band].mean() == pytest.approx(expected, rel=0.25)
    inside, outside = np.transpose(brightness)
    assert (inside > 2 * outside).all()


def test_three_channels_are_asked_for_by_the_processor():
    names = ("cell", "nucleus", "mitochondria")
    cells = PhantomCells(2, VolumeProcessor(32, 3, names, voxel_size_um=2.0), ["nocodazole"])
    assert cells[0]["volumes"].shape == (3, 32, 32, 32)
    assert cells.truths[0].mitochondria_volume_um3 > 0
    with pytest.raises(ValueError, match="`num_channels` 2 or 3, as phantoms have, got 4"):
        make_phantom("nocodazole", 0, num_channels=4)
