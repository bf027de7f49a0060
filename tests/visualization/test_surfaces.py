import sys

import numpy as np
import pytest
import torch

from diffusers_byoc.visualization import CHANNEL_COLORS, render_surfaces, surface_library, surface_views


def distances_from(center_um, shape=(24, 24, 24), voxel_size_um=(1.0, 1.0, 1.0)) -> np.ndarray:
    grid = np.meshgrid(*[np.arange(n) * step for n, step in zip(shape, voxel_size_um, strict=True)], indexing="ij")
    return np.sqrt(sum((axis - c) ** 2 for axis, c in zip(grid, center_um, strict=True)))


def ball(center_um, radius_um, **grid) -> np.ndarray:
    """A ball whose edge is one µm wide; its surface at 0.5 has the radius."""
    return np.clip(radius_um - distances_from(center_um, **grid) + 0.5, 0, 1).astype(np.float32)


def hue(pixel) -> int:
    """The channel whose colour a pixel has."""
    colors = np.array(CHANNEL_COLORS[:2])
    return int(np.argmax(colors @ pixel / np.linalg.norm(colors, axis=1)))


@pytest.mark.parametrize("view", [(0, 90), (30, 50), (200, -20)])
@pytest.mark.parametrize("voxel_size_um", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.75)])
def test_a_ball_is_a_disc_of_its_radius_from_everywhere(view, voxel_size_um):
    shape = tuple(round(24 / step) for step in voxel_size_um)
    volume = ball((11, 12, 11.5), 7.0, shape=shape, voxel_size_um=voxel_size_um)[None]
    image = render_surfaces(volume, voxel_size_um, [0.5], None, *view, field_um=20.0, size_pixels=100)
    area_um2 = (image.max(axis=-1) > 0.05).sum() * 0.2**2
    assert area_um2 == pytest.approx(np.pi * 7.0**2, rel=0.05)


@pytest.mark.parametrize(("elevation", "axis"), [(90, 0), (0, 1)])
def test_views_from_above_and_from_the_side_lie_as_the_slices_do(elevation, axis):
    volume = np.zeros((1, 20, 20, 20), np.float32)
    volume[0, 3:7, 3:7, 3:17] = 1  # three rods of different lengths that meet in a corner
    volume[0, 3:7, 3:12, 3:7] = 1
    volume[0, 3:15, 3:7, 3:7] = 1
    image = render_surfaces(volume, 1, [0.5], None, 0, elevation, field_um=20.0, size_pixels=20)
    drawn = image.max(axis=-1) > 0.05
    expected = volume[0].max(axis=axis) > 0.5
    # the picture's middle is that of the surfaces; move the projection's there
    rows, columns = (np.flatnonzero(expected.any(axis=a)) for a in (1, 0))
    shift = [round(9.5 - (span[0] + span[-1]) / 2) for span in (rows, columns)]
    expected = np.roll(expected, shift, axis=(0, 1))
    assert (drawn & expected).sum() / (drawn | expected).sum() > 0.8
    for wrong in (expected[::-1], expected[:, ::-1]):
        assert (drawn & wrong).sum() / (drawn | wrong).sum() < 0.6


def test_the_nucleus_shows_through_the_cell_and_not_through_an_opaque_one():
    volume = np.stack([ball((12, 12, 12), 9), ball((12, 12, 12), 4)])
    glass = render_surfaces(volume, field_um=20.0, size_pixels=40)
    assert hue(glass[20, 20]) == 1 and hue(glass[20, 8]) == 0
    solid = render_surfaces(volume, opacities=(1, 1), field_um=20.0, size_pixels=40)
    assert hue(solid[20, 20]) == 0
    assert (glass[0, 0] == 0).all()


@pytest.mark.parametrize(("azimuth", "front"), [(0, 1), (180, 0)])
def test_the_nearer_of_two_surfaces_hides_the_other(azimuth, front):
    volume = np.stack([ball((12, 7, 12), 4), ball((12, 17, 12), 4)])
    image = render_surfaces(volume, 1, None, (1, 1), azimuth, 0, size_pixels=40)
    assert hue(image[20, 20]) == front


def test_a_cell_cut_by_the_edge_is_closed():
    volume = np.ones((1, 12, 12, 12), np.float32)
    image = render_surfaces(volume, 1, [0.5], None, 0, 90, field_um=24.0, size_pixels=48)
    assert (image.max(axis=-1) > 0.05).sum() * 0.25 == pytest.approx(144, rel=0.25)


@pytest.mark.parametrize("volume", [np.zeros((2, 8, 8, 8)), 0.02 * np.random.default_rng(0).random((2, 8, 8, 8))])
def test_an_empty_volume_has_no_surface(volume):
    assert (render_surfaces(volume, size_pixels=16) == 0).all()


def test_bright_background_is_not_taken_for_the_cell():
    volume = 0.4 + 0.5 * ball((12, 12, 12), 5)[None]
    image = render_surfaces(volume, 1, None, None, 0, 90, field_um=24.0, size_pixels=48)
    assert (image.max(axis=-1) > 0.05).sum() * 0.25 == pytest.approx(np.pi * 25, rel=0.25)


def test_a_figure_has_a_picture_for_each_cell_and_view():
    cells = np.stack([np.stack([ball((12, 12, 12), 8), ball((12, 12, 12), r)]) for r in (3, 5)])
    library = surface_library(torch.from_numpy(cells), titles=["a", "b"])
    images = library.axes[0].get_images()
    assert len(images) == 2
    magenta = [(np.asarray(image.get_array()) @ [1, -1, 0] > 0.1).sum() for image in images]
    assert magenta[0] < magenta[1]
    views = surface_views({"x": cells[0]}, views_deg=[(0, 90), (90, 0)])
    assert len(views.axes[0].get_images()) == 2


def test_cells_of_a_figure_share_one_scale():
    cells = np.stack([ball((12, 12, 12), radius)[None] for radius in (4, 8)])
    small, large = (np.asarray(image.get_array()) for image in surface_library(cells, ("cell",)).axes[0].get_images())
    areas = [(image.max(axis=-1) > 0.05).sum() for image in (small, large)]
    assert areas[1] / areas[0] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresholds": [0.5]}, "2 thresholds, one or None a channel"),
        ({"thresholds": [0.5, 1.5]}, "between 0 and 1"),
        ({"opacities": [1.0]}, "2 opacities, one a channel"),
        ({"opacities": [0.0, 1.0]}, r"\(0, 1\]"),
        ({"titles": ["a", "b"]}, "Expected 1 titles.*got 2"),
        ({"num_columns": 0}, "num_columns"),
        ({"voxel_size_um": -1}, "voxel_size_um"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        surface_library(np.zeros((1, 2, 4, 4, 4)), **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: surface_library({"a": np.zeros((1, 2, 4, 4, 4))}, titles=["a"]), "headings"),
        (lambda: surface_views(np.zeros((1, 2, 4, 4, 4)), views_deg=[30, 60]), "pairs"),
        (lambda: render_surfaces(np.zeros((1, 2, 4, 4, 4))), "one cell at a time"),
        (lambda: render_surfaces(np.zeros((2, 4, 4, 4)), size_pixels=0), "size_pixels"),
        (lambda: render_surfaces(np.zeros((2, 4, 4, 4)), field_um=0.0), "field_um"),
    ],
)
def test_other_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.filters", None)
    with pytest.raises(ImportError, match=r"diffusers_byoc\[viz\]"):
        render_surfaces(np.zeros((2, 4, 4, 4)))
