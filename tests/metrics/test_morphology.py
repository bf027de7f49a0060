import dataclasses
import importlib
import math
import sys

import numpy as np
import pytest
import torch
import trimesh
from skimage.measure import marching_cubes

from diffusers_byoc.metrics import MORPHOLOGY_NAMES, CellMorphology, channel_consistency, measure_cell, measure_cells


def ball(radius: float, center=(24, 24, 24), size: int = 48, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    """A filled ball; centre in voxels, radius in units of the spacing."""
    grid = np.meshgrid(*[(np.arange(size) - c) * s for c, s in zip(center, spacing, strict=True)], indexing="ij")
    return sum(axis**2 for axis in grid) <= radius**2


def cell_of(cell: np.ndarray, nucleus: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """Masks -> (2, D, H, W) intensities in [0, 1]."""
    volume = 0.05 + np.stack([cell * 0.5, nucleus * 0.7])
    volume = volume + noise * np.random.default_rng(0).normal(size=volume.shape)
    return np.clip(volume, 0.0, 1.0)


def test_balls_have_the_volume_of_balls():
    found = measure_cell(cell_of(ball(18), ball(9)))
    # voxelised balls approach 4/3 π r³; a voxel layer is 3/r of the volume, its rounding a fraction of that
    assert found.cell_volume_um3 == pytest.approx(4 / 3 * math.pi * 18**3, rel=0.01)
    assert found.nucleus_volume_um3 == pytest.approx(4 / 3 * math.pi * 9**3, rel=0.02)
    assert found.nucleus_to_cell_ratio == pytest.approx(1 / 8, rel=0.03)
    assert found.cell_extent == pytest.approx(ball(18).sum() / 37**3)
    assert (found.num_cell_components, found.largest_component_share, found.nucleus_inside_share) == (1, 1.0, 1.0)


def test_volumes_are_in_micrometres_for_anisotropic_voxels():
    spacing = (2.0, 0.5, 0.5)
    found = measure_cell(cell_of(ball(11, spacing=spacing), ball(5, spacing=spacing)), voxel_size_um=spacing)
    assert found.cell_volume_um3 == pytest.approx(4 / 3 * math.pi * 11**3, rel=0.02)
    assert found.nucleus_volume_um3 == pytest.approx(4 / 3 * math.pi * 5**3, rel=0.05)


def test_camera_noise_changes_the_volumes_by_less_than_two_percent():
    clean, noisy = measure_cell(cell_of(ball(18), ball(9))), measure_cell(cell_of(ball(18), ball(9), noise=0.08))
    assert noisy.cell_volume_um3 == pytest.approx(clean.cell_volume_um3, rel=0.02)
    assert noisy.nucleus_volume_um3 == pytest.approx(clean.nucleus_volume_um3, rel=0.02)
    assert noisy.num_cell_components == 1 and noisy.nucleus_inside_share > 0.99


def test_two_cells_are_two_components():
    large, small = ball(9, (12, 24, 24)), ball(6, (36, 24, 24))
    found = measure_cell(cell_of(large | small, ball(3, (12, 24, 24))))
    assert found.num_cell_components == 2
    assert found.largest_component_share == pytest.approx(large.sum() / (large.sum() + small.sum()))


def test_a_speck_is_not_a_component_but_counts_in_the_share():
    body, speck = ball(12), ball(1.5, (5, 5, 5))
    found = measure_cell(cell_of(body | speck, ball(6)))
    assert speck.sum() < 0.01 * body.sum()
    assert found.num_cell_components == 1
    assert found.cell_volume_um3 == body.sum()
    assert found.largest_component_share == pytest.approx(body.sum() / (body.sum() + speck.sum()))


def test_a_diagonal_protrusion_stays_connected():
    body = ball(8)
    for step in range(20):
        body[24 + step, 24 + step, 24 + step] = True
    assert measure_cell(cell_of(body, ball(4))).num_cell_components == 1


def test_a_nucleus_half_outside_is_half_inside():
    cell = np.zeros((48, 48, 48), bool)
    cell[8:24, 8:40, 8:40] = True
    nucleus = np.zeros_like(cell)
    nucleus[20:28, 20:28, 20:28] = True
    found = measure_cell(cell_of(cell, nucleus))
    assert found.nucleus_inside_share == 0.5
    assert found.cell_extent == 1.0


def test_the_hole_that_a_nucleus_leaves_in_the_cell_channel_is_filled():
    found = measure_cell(cell_of(ball(18) & ~ball(9), ball(9) & ~ball(3)))
    assert found.nucleus_inside_share == 1.0
    assert found.cell_volume_um3 == ball(18).sum()
    assert found.nucleus_volume_um3 == ball(9).sum()


@pytest.mark.parametrize("background", ["zeros", "ones", "noise"])
def test_empty_channels_give_zeros_and_nan(background):
    noise = np.clip(np.random.default_rng(0).normal(0.1, 0.02, (48, 48, 48)), 0, 1)
    empty = {"zeros": np.zeros((48, 48, 48)), "ones": np.ones((48, 48, 48)), "noise": noise}[background]
    full = cell_of(ball(18), ball(9))

    no_cell = measure_cell(np.stack([empty, full[1]]))
    assert (no_cell.cell_volume_um3, no_cell.num_cell_components, no_cell.nucleus_inside_share) == (0, 0, 0)
    assert no_cell.nucleus_volume_um3 == ball(9).sum()
    for value in (no_cell.nucleus_to_cell_ratio, no_cell.largest_component_share, no_cell.cell_extent):
        assert math.isnan(value)

    no_nucleus = measure_cell(np.stack([full[0], empty]))
    assert (no_nucleus.nucleus_volume_um3, no_nucleus.nucleus_to_cell_ratio) == (0, 0)
    assert math.isnan(no_nucleus.nucleus_inside_share)
    assert no_nucleus.cell_volume_um3 == ball(18).sum()


def test_fixed_thresholds_replace_otsu():
    volume = np.stack([0.2 * ball(18) + 0.4 * ball(9), 0.03 * ball(5)])
    assert measure_cell(volume, thresholds=(0.1, 0.01)).cell_volume_um3 == ball(18).sum()
    assert measure_cell(volume, thresholds=(0.3, 0.01)).cell_volume_um3 == ball(9).sum()
    assert measure_cell(volume, thresholds=(0.3, 0.01)).nucleus_volume_um3 == ball(5).sum()
    assert measure_cell(volume, thresholds=(0.1, None)).nucleus_volume_um3 == 0  # too little contrast for Otsu
    with pytest.raises(ValueError, match=r"\(cell, nucleus\)"):
        measure_cell(volume, thresholds=(0.1,))


def test_a_cut_open_membrane_needs_a_low_threshold():
    shell = ball(18) & ~ball(16)
    volume = np.stack([np.where(shell, 0.9, 0.1 * ball(18)), 0.8 * ball(8)])
    volume[:, 28:] = 0
    whole = ball(18)[:28].sum()
    assert measure_cell(volume).nucleus_inside_share < 0.5
    found = measure_cell(volume, thresholds=(0.05, None))
    assert (found.cell_volume_um3, found.nucleus_inside_share) == (whole, 1.0)


def test_channels_can_be_chosen():
    cell, nucleus = cell_of(ball(18), ball(9))
    volume = np.stack([np.zeros_like(cell), nucleus, cell])
    assert measure_cell(volume, cell_channel=2) == measure_cell(np.stack([cell, nucleus]))


def test_a_batch_gives_one_measurement_a_cell_whatever_the_array():
    volumes = np.stack([cell_of(ball(radius), ball(radius / 2)) for radius in (8, 12, 16)])
    found = measure_cells(volumes)
    assert [type(cell) for cell in found] == [CellMorphology] * 3
    assert [cell.cell_volume_um3 for cell in found] == [ball(radius).sum() for radius in (8, 12, 16)]
    assert measure_cells(torch.from_numpy(volumes)) == found
    assert measure_cells(torch.from_numpy(volumes).bfloat16())[0].cell_volume_um3 == ball(8).sum()
    assert set(dataclasses.asdict(found[0])) >= {"cell_volume_um3", "nucleus_inside_share"}


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (np.zeros((2, 8, 8)), r"\(M, D, H, W\), got shape \(2, 8, 8\)"),
        (np.zeros((1, 2, 8, 8, 8)), "measure_cells"),
        (np.zeros((1, 8, 8, 8)), "nucleus_channel among the 1 channels .*got 1. Give .*nucleus_channel=None"),
        (np.full((2, 8, 8, 8), 255), r"\[0, 1\], got \[255, 255\]"),
        (np.full((2, 8, 8, 8), np.nan), "got .nan"),
    ],
)
def test_bad_volumes_are_refused_with_the_remedy(volume, message):
    with pytest.raises(ValueError, match=message):
        measure_cell(volume)
    with pytest.raises(ValueError, match=r"It is volumes\[1\]\.$"):
        measure_cells([cell_of(ball(8), ball(4)), volume])


@pytest.mark.parametrize("voxel_size_um", [0.0, -1.0, (1.0, 2.0), float("nan")])
def test_bad_voxel_sizes_are_refused(voxel_size_um):
    with pytest.raises(ValueError, match="voxel_size_um"):
        measure_cell(np.zeros((2, 8, 8, 8)), voxel_size_um=voxel_size_um)


def test_a_missing_scikit_image_names_the_extra(monkeypatch):
    for name in ("skimage", "skimage.filters"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "diffusers_byoc.metrics.morphology")
    morphology = importlib.import_module("diffusers_byoc.metrics.morphology")
    with pytest.raises(ImportError, match=r"diffusers_byoc\[metrics\]"):
        morphology.measure_cell(np.zeros((2, 8, 8, 8)))


def test_a_volume_of_one_channel_is_measured_without_a_nucleus():
    both = measure_cell(cell_of(ball(12), ball(6)))
    alone = measure_cell(cell_of(ball(12), ball(6))[:1], nucleus_channel=None)
    for name in MORPHOLOGY_NAMES:
        is_about_nucleus = "nucle" in name
        expected = math.nan if is_about_nucleus else getattr(both, name)
        assert getattr(alone, name) == pytest.approx(expected, nan_ok=True), name
    fit = channel_consistency([alone, alone])
    assert math.isnan(fit.one_nucleus_share) and math.isnan(fit.nucleus_inside_share) and fit.num_complete == 0


def test_volume_and_area_of_the_surface_are_those_of_trimesh():
    mask = np.zeros((24, 24, 24), bool)
    mask[4:20, 6:12, 3:21] = mask[10:14, 6:20, 8:16] = True
    spacing = (2.0, 1.0, 0.5)
    vertices, faces, _, _ = marching_cubes(np.pad(mask, 1).astype(np.float32), 0.5, spacing=spacing)
    mesh = trimesh.smoothing.filter_taubin(trimesh.Trimesh(vertices, faces, process=False), iterations=30)
    cell = measure_cell(mask[None].astype(np.float32), spacing, nucleus_channel=None)
    assert cell.cell_surface_um2 == pytest.approx(mesh.area)
    assert cell.cell_sphericity == pytest.approx(np.pi ** (1 / 3) * (6 * abs(mesh.volume)) ** (2 / 3) / mesh.area)
    assert cell.cell_solidity == pytest.approx(abs(mesh.volume) / mesh.convex_hull.volume, rel=1e-6)
