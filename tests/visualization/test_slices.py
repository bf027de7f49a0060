import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from diffusers_byoc.visualization import (
    CHANNEL_COLORS,
    PLANE_COLORS,
    compare_pairs,
    compare_volumes,
    composite_channels,
    orthogonal_slices,
    write_png,
)


def box_cells(num_cells: int = 2, num_channels: int = 2, size: tuple[int, int, int] = (12, 16, 20)) -> np.ndarray:
    """Boxes off the centre: z 2..5, y 8..13, x 10..17, the further channels one voxel smaller on each side."""
    volumes = np.zeros((num_cells, num_channels, *size), np.float32)
    volumes[:, 0, 2:6, 8:14, 10:18] = 1.0
    volumes[:, 1:, 3:5, 9:13, 11:17] = 1.0
    return volumes


def drawn_slices(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in figure.axes[0].get_images()]


def test_composite_adds_the_channel_colours():
    image = np.array([[[1.0, 0.0, 1.0, 0.5]], [[0.0, 1.0, 1.0, 0.0]]])
    colors = composite_channels(image)
    cell, nucleus = (np.asarray(color) for color in CHANNEL_COLORS[:2])
    expected = [[cell, nucleus, np.clip(cell + nucleus, 0, 1), cell / 2]]
    np.testing.assert_allclose(colors, expected, atol=1e-6)


def test_composite_cycles_the_palette_and_stretches_the_range():
    image = np.zeros((len(CHANNEL_COLORS) + 1, 1, 1))
    image[-1] = 0.3
    np.testing.assert_allclose(
        composite_channels(image, (0.2, 0.4))[0, 0], np.asarray(CHANNEL_COLORS[0]) / 2, atol=1e-6
    )


@pytest.mark.parametrize("as_input", [np.asarray, torch.from_numpy, lambda v: torch.from_numpy(v).to(torch.bfloat16)])
def test_slices_cut_the_volume_at_the_intensity_centre(as_input):
    volumes = box_cells()
    volumes[1] = np.roll(volumes[1], (3, -4, -5), axis=(1, 2, 3))
    slices = drawn_slices(orthogonal_slices(as_input(volumes)))
    assert len(slices) == 6
    # centres 3.5, 10.5, 13.5 and, for the second, 6.5, 6.5, 8.5; halves round to even
    for cell, (z, y, x) in enumerate([(4, 10, 14), (6, 6, 8)]):
        xy, xz, yz = slices[3 * cell : 3 * cell + 3]
        np.testing.assert_allclose(xy, composite_channels(volumes[cell, :, z]))
        np.testing.assert_allclose(xz, composite_channels(volumes[cell, :, :, y]))
        np.testing.assert_allclose(yz, composite_channels(volumes[cell, :, :, :, x]))


def test_background_does_not_pull_the_centre():
    volumes = box_cells(1)
    xy = drawn_slices(orthogonal_slices(volumes * 0.5 + 0.3, display_range=(0.3, 0.8)))[0]
    np.testing.assert_allclose(xy, composite_channels(volumes[0, :, 4]), atol=1e-6)


def test_an_empty_cell_is_drawn_black():
    assert all((image == 0).all() for image in drawn_slices(orthogonal_slices(np.zeros((1, 2, 4, 4, 4)))))


def test_mosaics_place_planes_in_micrometres():
    figure = compare_volumes({"real": box_cells(1), "generated": box_cells(2)}, voxel_size_um=(2.0, 0.5, 0.25))
    images = figure.axes[0].get_images()
    assert len(images) == 3 * (1 + 2)
    xy, xz, yz = (image.get_extent() for image in images[:3])
    depth, height, width = 24.0, 8.0, 5.0
    assert (xy[1] - xy[0], xy[2] - xy[3]) == pytest.approx((width, height))
    assert (xz[1] - xz[0], xz[2] - xz[3]) == pytest.approx((width, depth))
    assert (yz[1] - yz[0], yz[2] - yz[3]) == pytest.approx((depth, height))
    assert xz[0] == xy[0] and xz[3] > xy[2] and yz[3] == xy[3] and yz[0] > xy[1]
    # y of the YZ slice runs down beside that of the XY slice, z to the right
    np.testing.assert_allclose(images[2].get_array(), composite_channels(box_cells(1)[0, :, :, :, 14].swapaxes(1, 2)))
    (left, top), (right, bottom) = (
        figure.axes[0].transData.inverted().transform([(0, figure.bbox.y1), (figure.bbox.x1, 0)])
    )
    for image in images:
        x0, x1, y1, y0 = image.get_extent()
        assert left <= x0 < x1 <= right and top <= y0 < y1 <= bottom


@pytest.mark.parametrize(("voxel_size_um", "expected"), [(1.0, "5 µm"), (0.1, "0.5 µm"), (40.0, "200 µm")])
def test_the_scale_bar_is_as_long_as_it_says(voxel_size_um, expected):
    axes = orthogonal_slices(box_cells(1), voxel_size_um=voxel_size_um).axes[0]
    assert expected in [text.get_text() for text in axes.texts]
    bar = axes.lines[-1].get_xdata()
    assert bar[1] - bar[0] == pytest.approx(float(expected.split()[0]))


def test_write_png_makes_folders_and_keeps_the_black_background(tmp_path):
    figure = compare_volumes(
        {"three channels": box_cells(1, num_channels=3)}, channel_names=("cell", "nucleus", "actin")
    )
    path = write_png(figure, tmp_path / "new" / "cells.png")
    pixels = imread(path)
    assert path.exists() and (pixels[0, 0, :3] == 0).all() and pixels[..., :3].max() > 0.8
    with pytest.raises(ValueError, match=r"\.png"):
        write_png(figure, tmp_path / "cells.jpg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"volumes": np.zeros((8, 8, 8))}, r"\(M, D, H, W\), or \(B, M, D, H, W\).*\(8, 8, 8\)"),
        ({"volumes": np.zeros((8, 8, 8, 8))}, "8 channels.*Give 8"),
        ({"volumes": np.zeros((1, 2, 8, 8, 8)), "channel_names": "ab"}, "got the text 'ab'"),
        ({"volumes": np.zeros((0, 2, 8, 8, 8))}, "one cell or more"),
        ({"volumes": np.zeros((1, 3, 8, 8, 8))}, "3 channels.*\\('cell', 'nucleus'\\)"),
        ({"volumes": np.full((1, 2, 8, 8, 8), -1.0)}, r"\[0, 1\], got \[-1, -1\].*\+ 1\) / 2"),
        ({"volumes": np.full((1, 2, 8, 8, 8), np.nan)}, "got .nan"),
        ({"volumes": np.zeros((1, 2, 8, 8, 8)), "titles": ["a", "b"]}, "Expected 1 titles.*got 2"),
        ({"volumes": np.zeros((1, 2, 8, 8, 8)), "titles": "a"}, "Expected 1 titles.*got 'a'"),
        ({"volumes": np.zeros((1, 2, 8, 8, 8)), "voxel_size_um": 0}, "voxel_size_um"),
        ({"volumes": np.zeros((1, 2, 8, 8, 8)), "voxel_size_um": (1, 2)}, "voxel_size_um"),
        ({"volumes": np.zeros((1, 2, 8, 8, 8)), "display_range": (1, 0)}, "low < high"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        orthogonal_slices(**arguments)


@pytest.mark.parametrize("volumes", [{}, np.zeros((1, 2, 8, 8, 8))])
def test_compare_wants_headings(volumes):
    with pytest.raises(ValueError, match="map headings to volumes"):
        compare_volumes(volumes)


def test_a_bad_entry_is_named():
    with pytest.raises(ValueError, match="Expected volumes\\['generated'\\] "):
        compare_volumes({"real": box_cells(), "generated": np.zeros((8, 8, 8))})


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"diffusers_byoc\[viz\]"):
        orthogonal_slices(box_cells())


def test_one_cell_needs_no_batch_axis():
    one, batch = orthogonal_slices(box_cells()[0]), orthogonal_slices(box_cells(1))
    for a, b in zip(drawn_slices(one), drawn_slices(batch), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("voxel_size_um", [1.0, (2.0, 0.5, 0.25)])
def test_lines_show_where_the_planes_meet(voxel_size_um):
    figure = compare_volumes({"real": box_cells(1)}, voxel_size_um=voxel_size_um, show_planes=True)
    axes = figure.axes[0]
    z, y, x = (
        position * step for position, step in zip((4.5, 10.5, 14.5), np.broadcast_to(voxel_size_um, 3), strict=True)
    )
    lines = [line for line in axes.lines if line.get_color() in PLANE_COLORS.values()]
    corners = [(image.get_extent()[0], image.get_extent()[3]) for image in axes.get_images()]  # XY, XZ, YZ
    # (plane that is cut, the plane that cuts it, vertical?, position from the cut plane's corner)
    expected = [(0, "YZ", True, x), (0, "XZ", False, y), (1, "YZ", True, x), (1, "XY", False, z)]
    expected += [(2, "XY", True, z), (2, "XZ", False, y)]
    assert len(lines) == len(expected)
    for line, (cut, plane, vertical, position) in zip(lines, expected, strict=True):
        assert line.get_color() == PLANE_COLORS[plane]
        along = line.get_xdata() if vertical else line.get_ydata()
        assert along[0] == along[1] == pytest.approx(corners[cut][0 if vertical else 1] + position)


def test_pairs_are_cut_where_the_sample_is_and_wrap():
    samples = box_cells(5)
    partners = np.roll(samples, (3, 2, 1), axis=(2, 3, 4))
    figure = compare_pairs(samples, partners, titles=[f"d = {index}" for index in range(5)], num_columns=3)
    images = drawn_slices(figure)
    assert len(images) == 3 * 10
    for start, count in ((0, 3), (18, 2)):
        for cell in range(count):
            upper, lower = images[start + 3 * cell], images[start + 3 * (count + cell)]
            np.testing.assert_allclose(upper, composite_channels(samples[0, :, 4]))
            np.testing.assert_allclose(lower, composite_channels(partners[0, :, 4]))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in texts if text.startswith("d =")] == [f"d = {index}" for index in range(5)]
    assert texts.count("nearest training cell") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partners": box_cells(3)}, "one partner per sample"),
        ({"headings": ("same", "same")}, "two different headings"),
        ({"titles": ["a"]}, "Expected 2 titles.*got 1"),
        ({"num_columns": 0}, "at least 1"),
    ],
)
def test_unmatched_pairs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_pairs(**{"samples": box_cells(2), "partners": box_cells(2)} | arguments)
