import numpy as np
import pytest
import torch

from diffusers_byoc.volumes import check_unit_range, voxel_size_triple


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_intensities_must_lie_between_zero_and_one(make):
    check_unit_range(make([0.0, 1.0]))
    check_unit_range(make([-9e-4, 1 + 9e-4]))
    for outside in ([-0.01, 1.0], [0.0, 1.01], [0.0, float("nan")]):
        with pytest.raises(ValueError, match=r"^Expected cells in \[0, 1\], got \[.*\]\. Map .*\.$"):
            check_unit_range(make(outside), "cells")


def test_a_voxel_size_is_one_number_or_three():
    assert voxel_size_triple(2) == (2.0, 2.0, 2.0)
    assert voxel_size_triple(np.array([1.0, 0.5, 0.25])) == (1.0, 0.5, 0.25)
    for wrong in (0, -1.0, float("nan"), float("inf"), (1.0, 2.0), (1.0, 1.0, 0.0), "1 µm", None, np.ones((3, 3))):
        with pytest.raises(ValueError, match=r"^Expected `voxel_size_um` as one positive number"):
            voxel_size_triple(wrong)
