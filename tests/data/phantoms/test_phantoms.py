import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import threshold_otsu

from diffusers_byoc.data.phantoms import PHENOTYPES, make_phantom
from diffusers_byoc.data.phantoms.measurement import axes_um


SEEDS = range(12)


@pytest.fixture(scope="module")
def phantoms():
    return {phenotype: [make_phantom(phenotype, seed) for seed in SEEDS] for phenotype in PHENOTYPES}


def mean_of(phantoms, quantity):
    return {phenotype: np.mean([quantity(p.truth) for p in cells]) for phenotype, cells in phantoms.items()}


def elongation(truth):
    return truth.cell_axes_um[0] / truth.cell_axes_um[1]


def flatness(truth):
    return truth.cell_axes_um[1] / truth.cell_axes_um[2]


def check_anatomy(phantom, max_size):
    cell, nucleus = phantom.masks
    assert phantom.volume.dtype == np.uint16
    assert phantom.volume.shape == phantom.masks.shape
    assert max(phantom.volume.shape[1:]) <= max_size
    assert ndimage.label(cell)[1] == 1
    assert ndimage.label(nucleus)[1] == 1
    assert not (nucleus & ~cell).any()
    assert 0.15 <= phantom.truth.nucleus_to_cell_ratio <= 0.45
    inner = np.zeros_like(cell)
    inner[1:-1, 1:-1, 1:-1] = True
    assert not (cell & ~inner).any(), "the crop cuts the cell"


@pytest.mark.parametrize("phenotype", PHENOTYPES)
def test_the_same_seed_gives_the_same_voxels(phenotype):
    first, second = make_phantom(phenotype, 3), make_phantom(phenotype, seed=3)
    np.testing.assert_array_equal(first.volume, second.volume)
    assert first.truth == second.truth


def test_seeds_and_phenotypes_give_different_cells(phantoms):
    volumes = [p.truth.cell_volume_um3 for cells in phantoms.values() for p in cells]
    assert len(set(volumes)) == len(volumes)
    assert len({p.volume.shape for cells in phantoms.values() for p in cells}) > len(SEEDS)


def test_every_cell_is_one_piece_with_its_nucleus_inside(phantoms):
    for cells in phantoms.values():
        for phantom in cells:
            check_anatomy(phantom, max_size=64)


@pytest.mark.parametrize("phenotype", PHENOTYPES)
@pytest.mark.parametrize(("max_size", "voxel_size_um"), [(32, 1.0), (32, 2.0), (48, 3.0), (128, 0.5)])
def test_any_size_keeps_the_anatomy(phenotype, max_size, voxel_size_um):
    for seed in (0, 1):
        check_anatomy(make_phantom(phenotype, seed, max_size=max_size, voxel_size_um=voxel_size_um), max_size)


@pytest.mark.parametrize("phenotype", PHENOTYPES)
def test_the_shape_does_not_depend_on_the_voxel_size(phenotype):
    coarse = make_phantom(phenotype, 5, max_size=96, voxel_size_um=1.0).truth
    fine = make_phantom(phenotype, 5, max_size=192, voxel_size_um=0.5).truth
    assert coarse.cell_volume_um3 == pytest.approx(fine.cell_volume_um3, rel=0.02)
    assert coarse.nucleus_volume_um3 == pytest.approx(fine.nucleus_volume_um3, rel=0.02)
    assert coarse.cell_axes_um == pytest.approx(fine.cell_axes_um, rel=0.02)


def test_truth_is_what_the_masks_measure():
    phantom = make_phantom("binimetinib", 2, max_size=48, voxel_size_um=1.5)
    cell, nucleus = phantom.masks
    truth = phantom.truth
    assert truth.cell_volume_um3 == pytest.approx(cell.sum() * 1.5**3)
    assert truth.nucleus_to_cell_ratio == pytest.approx(nucleus.sum() / cell.sum())
    centroids = [np.array(ndimage.center_of_mass(mask)) * 1.5 for mask in (cell, nucleus)]
    assert truth.nucleus_offset_um == pytest.approx(np.linalg.norm(centroids[0] - centroids[1]))
    assert sorted(truth.cell_axes_um, reverse=True) == list(truth.cell_axes_um)


def test_axes_of_an_ellipsoid_are_its_full_axes():
    grid = np.mgrid[-24:25, -24:25, -24:25].reshape(3, -1).T.astype(float)
    half_axes = np.array([6.0, 20.0, 11.0])
    inside = grid[((grid / half_axes) ** 2).sum(axis=1) <= 1]
    assert axes_um(inside) == pytest.approx((40.0, 22.0, 12.0), rel=0.02)


def test_otsu_finds_the_true_cell_and_nucleus(phantoms):
    for cells in phantoms.values():
        for phantom in cells:
            for channel, mask in zip(phantom.volume, phantom.masks, strict=True):
                segmented = channel > threshold_otsu(channel)
                assert segmented.sum() == pytest.approx(mask.sum(), rel=0.15)
                dice = 2 * (segmented & mask).sum() / (segmented.sum() + mask.sum())
                assert dice > 0.93


def test_otsu_keeps_the_protrusions(phantoms):
    for phantom in phantoms["blebbistatin"]:
        segmented = phantom.volume[0] > threshold_otsu(phantom.volume[0])
        axes = axes_um(np.argwhere(segmented) * phantom.voxel_size_um)
        assert axes == pytest.approx(phantom.truth.cell_axes_um, rel=0.08)


def test_exposure_is_bright_and_unsaturated(phantoms):
    for cells in phantoms.values():
        for phantom in cells:
            for channel, mask in zip(phantom.volume, phantom.masks, strict=True):
                assert channel.max() < np.iinfo(np.uint16).max
                assert 0.35 < channel[mask].mean() / channel.max() < 0.75


def test_phenotypes_differ_as_described(phantoms):
    elongations = mean_of(phantoms, elongation)
    assert elongations["blebbistatin"] > 1.3 * elongations["binimetinib"]
    assert elongations["binimetinib"] > 1.15 * elongations["nocodazole"]
    assert elongations["nocodazole"] < 1.15  # round ...

    flatnesses = mean_of(phantoms, flatness)
    assert flatnesses["nocodazole"] > 1.9  # ... and flat
    assert max(flatnesses["binimetinib"], flatnesses["blebbistatin"]) < 1.7

    protrusions = mean_of(phantoms, lambda truth: truth.num_protrusions)
    assert protrusions["blebbistatin"] > protrusions["binimetinib"] > protrusions["nocodazole"] == 0


@pytest.mark.parametrize("phenotype", PHENOTYPES)
def test_masking_only_takes_the_offset_and_the_outside(phenotype):
    masked = make_phantom(phenotype, 1).volume
    raw = make_phantom(phenotype, 1, mask_background=False).volume
    cell = make_phantom(phenotype, 1).masks[0]
    kept = ndimage.binary_erosion(cell)
    np.testing.assert_array_equal(masked[:, kept], np.maximum(raw[:, kept].astype(int) - 100, 0))

    outside = ~ndimage.binary_dilation(cell, iterations=5)
    assert (masked[:, outside] == 0).all()
    background = raw[:, outside]
    assert background.min() > 0 and background.std() > 1
    assert background.mean() < 0.3 * raw[0][cell].mean()


def test_a_cell_that_does_not_fit_is_drawn_smaller():
    large = make_phantom("blebbistatin", 0, max_size=96).truth
    small = make_phantom("blebbistatin", 0, max_size=40)
    assert max(small.volume.shape) <= 40
    assert small.truth.cell_volume_um3 < 0.6 * large.cell_volume_um3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phenotype": "dmso", "seed": 0}, "binimetinib, blebbistatin, nocodazole, got 'dmso'"),
        ({"phenotype": "nocodazole", "seed": -1}, "`seed` of at least 0, got -1"),
        ({"phenotype": "nocodazole", "seed": 0, "max_size": 8}, "at least 32 voxels, got 8"),
        ({"phenotype": "nocodazole", "seed": 0, "voxel_size_um": 0.0}, r"in \(0, 3\], got 0.0"),
        ({"phenotype": "nocodazole", "seed": 0, "voxel_size_um": 5.0}, r"in \(0, 3\], got 5.0"),
        ({"phenotype": "nocodazole", "seed": 0, "voxel_size_um": 0.25}, "Raise max_size to 120"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("phenotype", PHENOTYPES)
def test_anatomy_of_many(phenotype):
    for seed in range(500):
        check_anatomy(make_phantom(phenotype, seed), max_size=64)
        check_anatomy(make_phantom(phenotype, seed, max_size=32), max_size=32)
