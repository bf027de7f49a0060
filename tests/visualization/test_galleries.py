import numpy as np
import pytest
import torch

from diffusers_byoc.visualization import CHANNEL_COLORS, composite_channels, depth_planes, sample_library


NAMES = ("membrane", "nucleus", "actin", "mitochondria", "endoplasmic reticulum", "tubulin")


def random_cells(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def pictures(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in figure.axes[0].get_images()]


def extents(figure) -> np.ndarray:
    """(left, right, bottom, top) in µm of each picture."""
    return np.array([image.get_extent() for image in figure.axes[0].get_images()])


def assert_nothing_leaves_the_canvas_or_overlaps(figure):
    figure.canvas.draw()
    axes = figure.axes[0]
    for artist in [*axes.texts, *axes.get_images(), *axes.artists]:
        box = artist.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    boxes = extents(figure)
    for index, (left, right, bottom, top) in enumerate(boxes):
        others = np.delete(boxes, index, axis=0)
        apart = (others[:, 0] >= right) | (others[:, 1] <= left) | (others[:, 3] >= bottom) | (others[:, 2] <= top)
        assert apart.all()


def test_library_shows_maximum_projections_in_order():
    volumes = random_cells(3, 2, 4, 5, 6)
    expected = [composite_channels(volume.max(axis=1)) for volume in volumes]
    for given in (volumes, torch.from_numpy(volumes), {"a": volumes[:1], "b": volumes[1:]}):
        np.testing.assert_allclose(pictures(sample_library(given)), expected)


@pytest.mark.parametrize("num_cells", [1, 7, 64])
@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_any_number_of_cells_and_channels_fits(num_cells, num_channels):
    names = NAMES[:num_channels]
    figure = sample_library(
        {"a heading rather longer than one cell": random_cells(num_cells, num_channels, 2, 4, 4)}, names
    )
    assert len(pictures(figure)) == num_cells
    assert_nothing_leaves_the_canvas_or_overlaps(figure)


def test_pictures_have_the_size_of_the_cells_in_micrometres():
    figure = sample_library(
        {"one": random_cells(1, 2, 3, 4, 5), "two": random_cells(2, 2, 3, 8, 5)}, voxel_size_um=(9, 2, 3)
    )
    left, right, bottom, top = extents(figure).T
    np.testing.assert_allclose(right - left, 15)
    np.testing.assert_allclose(bottom - top, [8, 16, 16])
    # pixels are square: a µm is as long down as across
    inverse = figure.axes[0].transData
    origin, across, down = inverse.transform([(0, 0), (10, 0), (0, 10)])
    assert across[0] - origin[0] == pytest.approx(origin[1] - down[1])


def test_columns_are_as_asked():
    left = extents(sample_library(random_cells(10, 2, 2, 4, 4), num_columns=5))[:, 0]
    assert len(set(left)) == 5 and np.allclose(left[:5], left[5:])


def test_every_plane_of_every_channel_is_drawn():
    volume = random_cells(3, 10, 4, 6)
    figure = depth_planes(volume, NAMES[:3])
    images = pictures(figure)
    assert len(images) == 30
    for channel, color in enumerate(CHANNEL_COLORS[:3]):
        for z in range(10):
            np.testing.assert_allclose(
                images[10 * channel + z], volume[channel, z, ..., None] * np.array(color), atol=1e-6
            )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in texts if text in NAMES] == list(NAMES[:3])
    assert [text for text in texts if text.isdigit()] == [str(z) for z in range(10)] * 3
    assert_nothing_leaves_the_canvas_or_overlaps(figure)


def test_merged_planes_hold_all_channels():
    volume = random_cells(2, 5, 4, 6)
    expected = [composite_channels(volume[:, z], (0.2, 0.7)) for z in range(5)]
    figure = depth_planes(volume[None], display_range=(0.2, 0.7), merge_channels=True)
    np.testing.assert_allclose(pictures(figure), expected)


def test_64_planes_are_8_by_8():
    boxes = extents(depth_planes(np.zeros((1, 64, 4, 4)), ("cell",)))
    assert len(set(boxes[:, 0])) == len(set(boxes[:, 3])) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: depth_planes(np.zeros((2, 2, 4, 4, 4))), r"one cell, got 2. Give volumes\[0\]"),
        (lambda: depth_planes(np.zeros((2, 4, 4, 4)), ("a", "a")), "names that differ"),
        (lambda: sample_library({}), "at least one batch"),
        (lambda: sample_library({"x": np.zeros((1, 3, 4, 4, 4))}), r"each of 3 channels of volumes\['x'\]"),
        (lambda: sample_library(np.full((1, 2, 4, 4, 4), 2.0)), r"\[0, 1\]"),
        (lambda: sample_library(np.zeros((1, 2, 4, 4, 4)), num_columns=0), "num_columns"),
        (lambda: sample_library(np.zeros((1, 2, 4, 4, 4)), display_range=(1, 1)), "display_range"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
