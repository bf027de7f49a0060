import numpy as np
import pytest

from diffusers_byoc.metrics import standardize_features


def test_features_come_out_in_standard_deviations_of_the_reference():
    reference = np.random.default_rng(0).normal([10, -5], [3, 0.1], size=(500, 2))
    np.testing.assert_allclose(standardize_features(reference, reference).std(0), 1)
    spread = reference.std(0)
    np.testing.assert_allclose(standardize_features(reference.mean(0)[None] + spread, reference), 1.0)


def test_what_a_cell_does_not_have_becomes_the_references_mean_and_constants_keep_their_unit():
    reference = np.array([[1.0, 7.0, np.nan], [3.0, 7.0, np.nan], [np.nan, 7.0, np.nan]])
    found = standardize_features([[np.nan, 9.0, 4.0], [2.0, 7.0, np.nan]], reference)
    np.testing.assert_allclose(found, [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])


def test_what_every_reference_cell_has_counts_as_far_away_where_it_is_missing():
    """A volume without any cell would otherwise be nearer to cells than a bad cell is."""
    reference = np.random.default_rng(0).normal(size=(50, 2))
    reference[0, 1] = np.nan
    assert standardize_features([[np.nan, np.nan]], reference).tolist() == [[10.0, 0.0]]


def test_a_feature_that_hardly_varies_does_not_decide_alone():
    reference = np.concatenate([np.ones((99, 1)), [[1 + 1e-6]]])
    assert standardize_features([[2.0], [0.0]], reference).ravel().tolist() == [10.0, -10.0]


def test_infinite_values_and_other_columns_are_refused():
    with pytest.raises(ValueError, match="finite"):
        standardize_features([[np.inf]], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="2 columns"):
        standardize_features([[1.0]], [[1.0, 2.0], [2.0, 3.0]])
