import math

import numpy as np
import pytest

from diffusers_byoc.data import PHENOTYPES, PhantomCells, VolumeProcessor, make_phantom
from diffusers_byoc.data.phantoms.shape import EC50_UM, RECIPES, UNTREATED, recipe_at


COARSE = {"max_size": 32, "voxel_size_um": 2.0}


def test_the_law_is_hills():
    assert recipe_at("nocodazole", None) is RECIPES["nocodazole"]
    half = recipe_at("blebbistatin", EC50_UM)
    for name in ("body_volume_um3", "bend", "protrusion_probability"):
        middle = (getattr(UNTREATED, name) + getattr(RECIPES["blebbistatin"], name)) / 2
        assert getattr(half, name) == pytest.approx(middle)
    assert half.short_axis == pytest.approx(
        np.mean([UNTREATED.short_axis, RECIPES["blebbistatin"].short_axis], axis=0)
    )
    assert half.protrusion_length == RECIPES["blebbistatin"].protrusion_length


def test_the_volume_of_a_cell_follows_its_dose():
    """The same seed is the same cell: what a dose does to its volume is the law, up to the voxels."""
    for seed in range(3):
        volumes = [
            make_phantom("nocodazole", seed, dose=dose, max_size=64, voxel_size_um=1.0).truth.cell_volume_um3
            for dose in (0.0, 6.0)
        ]
        untreated, full = UNTREATED.body_volume_um3, RECIPES["nocodazole"].body_volume_um3
        assert volumes[1] / volumes[0] == pytest.approx((untreated + 3 * full) / (4 * untreated), rel=0.03)


def test_an_untreated_cell_is_the_same_for_all_drugs_and_has_no_protrusions():
    recipes = {recipe_at(phenotype, 0.0).body_volume_um3 for phenotype in PHENOTYPES}
    assert recipes == {UNTREATED.body_volume_um3}
    assert all(make_phantom("blebbistatin", seed, dose=0, **COARSE).truth.num_protrusions == 0 for seed in range(5))


def test_protrusions_grow_in_number_with_the_dose():
    low, high = (
        np.mean([make_phantom("blebbistatin", s, dose=d, **COARSE).truth.num_protrusions for s in range(12)])
        for d in (0.5, 50.0)
    )
    assert low < 0.6 * high  # a fifth of those at full effect, against 0.96 of them


@pytest.mark.parametrize("dose", [-1.0, math.inf, math.nan])
def test_doses_that_are_none_are_refused(dose):
    with pytest.raises(ValueError, match="`dose` of at least 0 µM, got"):
        make_phantom("nocodazole", 0, dose=dose)


def test_phantom_cells_have_doses_as_conditions():
    processor = VolumeProcessor(32, 2, ("cell", "nucleus"), voxel_size_um=2.0)
    cells = PhantomCells(6, processor, ["blebbistatin", "nocodazole"], doses=[0.0, 8.0])
    assert cells.conditions["dose_um"].tolist() == [[0.0], [0.0], [8.0], [8.0], [0.0], [0.0]]
    assert [cells.phantom(index).dose for index in (1, 3)] == [0.0, 8.0]
    assert cells[3]["conditions"]["dose_um"].tolist() == [8.0]
    some = cells.subset([cells.ids[3], cells.ids[4]])
    assert some.conditions["dose_um"].tolist() == [[8.0], [0.0]]
    assert "conditions" not in PhantomCells(1, processor)[0]
    with pytest.raises(ValueError, match="a dose or more"):
        PhantomCells(1, processor, doses=[])
