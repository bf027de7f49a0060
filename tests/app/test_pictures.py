import numpy as np
import pytest

from diffusers_byoc.app.pictures import cell_center, projection_pictures, slice_pictures


def point(position=(2, 5, 9), shape=(12, 12, 12)):
    volume = np.zeros((2, *shape), np.float32)
    volume[0][position] = 1
    return volume


@pytest.mark.parametrize("voxel_size_um", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_a_voxel_is_where_its_axes_say(voxel_size_um):
    pictures = projection_pictures(point(), voxel_size_um)
    long = 384 if voxel_size_um[0] == 1 else 192
    assert [picture.shape for picture in pictures] == [(long, long, 3), (384, long, 3), (384, long, 3)]
    for picture, (row, column) in zip(pictures, [(5, 9), (2, 9), (2, 5)], strict=True):
        brightest = np.unravel_index(picture[..., 1].argmax(), picture.shape[:2])
        expected = [(index + 0.5) / 12 * length for index, length in zip((row, column), picture.shape, strict=False)]
        np.testing.assert_allclose(brightest, expected, atol=2)
        color = picture[brightest]
        np.testing.assert_allclose(color, np.array([0.0, 0.85, 0.6]) * 255, atol=20)  # the cell's green


def test_slices_go_through_the_voxel_and_show_one_another_s_place():
    (xy, xz, yz) = slice_pictures(point(), (2, 5, 9), (1, 1, 1))
    for picture, (row, column) in ((xy, (5, 9)), (xz, (2, 9)), (yz, (2, 5))):
        assert picture[row * 32 + 12, column * 32 + 12, 1] > 100
        assert picture.any(axis=2).all(axis=1).sum() == 1 and picture.any(axis=2).all(axis=0).sum() == 1  # the lines
    (elsewhere, _, _) = slice_pictures(point(), (3, 0, 0), (1, 1, 1))
    assert elsewhere[5 * 32 + 12, 9 * 32 + 12].max() == 0
    slice_pictures(point(), (99, -1, 5), (1, 1, 1))  # sliders of another volume


def test_the_center_is_that_of_the_first_channel():
    assert cell_center(point()) == (2, 5, 9)
    volume = point()
    volume[0, 4, 5, 9] = 1
    volume[1] = 1
    assert cell_center(volume) == (3, 5, 9)
    assert cell_center(np.zeros((1, 4, 6, 8), np.float32)) == (2, 3, 4)
