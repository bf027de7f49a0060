import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from diffusers_byoc.metrics import CellMorphology, channel_consistency


def cell(**values) -> CellMorphology:
    blank = {field.name: 0.0 for field in dataclasses.fields(CellMorphology)}
    return CellMorphology(**blank | {"num_nucleus_components": 1, "num_nuclei_inside": 1} | values)


def test_the_shares_count_cells_with_one_nucleus_inside():
    cells = [
        cell(nucleus_inside_share=1.0),
        cell(nucleus_inside_share=0.5, num_nuclei_inside=0),
        cell(nucleus_inside_share=0.9, num_nucleus_components=2),
        cell(nucleus_inside_share=math.nan, num_nucleus_components=0, num_nuclei_inside=0),
    ]
    found = channel_consistency(cells)
    assert found.nucleus_inside_share == pytest.approx(0.8)
    assert found.one_nucleus_share == 0.25
    assert (found.num_cells, found.num_complete) == (4, 0)
    assert math.isnan(found.volume_correlation)


def test_the_correlation_is_pearsons_of_the_logarithms_of_complete_cells():
    generator = np.random.default_rng(0)
    size = generator.normal(8, 0.3, 50)
    nucleus = size - 1 + generator.normal(0, 0.2, 50)
    cells = [cell(cell_volume_um3=np.exp(a), nucleus_volume_um3=np.exp(b)) for a, b in zip(size, nucleus, strict=True)]
    found = channel_consistency([*cells, cell(cell_volume_um3=1.0, nucleus_volume_um3=0.0)])
    r = scipy.stats.pearsonr(size, nucleus).statistic
    assert found.volume_correlation == pytest.approx(r)
    half = scipy.stats.norm.ppf(0.975) / np.sqrt(50 - 3)
    assert found.volume_correlation_interval == pytest.approx(
        (np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half))
    )
    assert (found.num_cells, found.num_complete) == (51, 50)
    with pytest.raises(ValueError, match="at least one cell"):
        channel_consistency([])
