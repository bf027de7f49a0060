import numpy as np
import pytest
import scipy.stats
import torch

from diffusers_byoc.metrics import classifier_test, compare_features, volume_classifier, volume_classifier_test


def test_a_shift_is_found_in_its_feature_and_in_no_other():
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(300, 20)), generator.normal(size=(250, 20))
    generated[:, 7] += 2.0
    rows = compare_features(real, generated, [f"f{i}" for i in range(20)])
    assert [row.name for row in rows if row.adjusted_p_value < 0.01] == ["f7"]
    assert rows[7].wasserstein == pytest.approx(2.0, abs=0.25)
    assert rows[7].effect == pytest.approx(rows[7].wasserstein / real[:, 7].std())
    assert rows[7].p_value == scipy.stats.ks_2samp(real[:, 7], generated[:, 7]).pvalue


def test_the_correction_keeps_false_discoveries_rare():
    generator = np.random.default_rng(0)
    found = corrected = 0
    for _ in range(30):
        rows = compare_features(*generator.normal(size=(2, 60, 30)), [str(i) for i in range(30)])
        found += any(row.p_value < 0.05 for row in rows)
        corrected += any(row.adjusted_p_value < 0.05 for row in rows)
    assert found > 15 and corrected <= 5


def test_a_feature_that_no_cell_has_is_no_hindrance_to_trees():
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(2, 40, 3))
    real[:, 2] = generated[:, 2] = np.nan
    generated[:, 0] += 5
    assert classifier_test(real, generated).accuracy > 0.95


def test_cells_without_a_feature_are_left_out_and_counted():
    real = np.array([[1.0, 5.0], [2.0, 5.0], [np.nan, 5.0]])
    generated = np.array([[np.nan, np.nan], [2.0, np.nan]])
    first, second = compare_features(real, generated, ["a", "b"])
    assert (first.num_real, first.num_generated, first.wasserstein) == (2, 1, 0.5)
    assert second.num_generated == 0 and np.isnan(second.adjusted_p_value) and not np.isnan(first.adjusted_p_value)
    with pytest.raises(ValueError, match="a name for each of 2 columns, got 1"):
        compare_features(real, generated, ["a"])


def test_equal_cells_cannot_be_told_apart_and_different_ones_can():
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(200, 5)), generator.normal(size=(320, 5))
    same = classifier_test(real, generated)
    assert same.interval[0] < 0.5 and same.num_cells == 400 and same.p_value > 0.01
    assert classifier_test(real, generated + 3).accuracy > 0.97
    generated[::2, 3] = np.nan  # a missing value is information
    assert 0.6 < classifier_test(real, generated).accuracy < 0.8


@pytest.mark.parametrize("num_folds", [2, 5])
def test_the_interval_is_wilsons_of_fewer_cells(num_folds):
    generator = np.random.default_rng(0)
    found = classifier_test(generator.normal(size=(45, 2)), generator.normal(size=(45, 2)) + 1, num_folds)
    # 90 cells count for 40 in five folds, for 30 in two
    num_effective = {5: 40, 2: 30}[num_folds]
    num_right = found.accuracy * num_effective
    # Wilson's limits are where the score test of the limit meets the quantile
    for limit in found.interval:
        deviation = (num_right - num_effective * limit) ** 2 / (num_effective * limit * (1 - limit))
        assert deviation == pytest.approx(scipy.stats.norm.ppf(0.975) ** 2)
    assert found.interval[0] < found.accuracy < found.interval[1]
    z = (num_right - num_effective / 2) / np.sqrt(num_effective / 4)
    assert found.p_value == pytest.approx(scipy.stats.norm.sf(z))


def test_a_structure_that_no_single_feature_shows_is_found():
    generator = np.random.default_rng(0)
    real = generator.normal(size=(400, 2))
    linked = generator.multivariate_normal([0, 0], [[1, 0.95], [0.95, 1]], 400)
    assert all(row.adjusted_p_value > 0.05 for row in compare_features(real, linked, ["a", "b"]))
    assert classifier_test(real, linked).accuracy > 0.7


def test_the_3d_network_finds_noise_that_real_cells_do_not_have_and_is_reproducible():
    generator = np.random.default_rng(0)
    smooth = np.repeat(np.repeat(np.repeat(generator.random((40, 2, 4, 4, 4)), 4, 2), 4, 3), 4, 4).astype(np.float32)
    noisy = np.clip(smooth[20:] + 0.2 * generator.normal(size=smooth[20:].shape), 0, 1).astype(np.float32)
    state = torch.get_rng_state()
    told = volume_classifier_test(smooth[:20], noisy, num_folds=2, num_steps=60, batch_size=8)
    assert told.accuracy > 0.9
    assert told == volume_classifier_test(smooth[:20], torch.from_numpy(noisy), 2, 60, 8)
    assert torch.equal(state, torch.get_rng_state())
    same = volume_classifier_test(smooth[:20], smooth[20:], num_folds=2, num_steps=20, batch_size=8)
    assert same.interval[0] < 0.5
    with pytest.raises(ValueError, match="of one shape"):
        volume_classifier_test(smooth, noisy[..., :8])
    with pytest.raises(ValueError, match="num_folds"):
        volume_classifier_test(smooth[:2], noisy, num_folds=3)
    with pytest.raises(ValueError, match="num_steps"):
        volume_classifier_test(smooth, noisy, num_steps=10)


def test_the_3d_network_is_shown_the_mean_and_the_deviation_of_every_block():
    volumes = np.random.default_rng(0).random((3, 2, 6, 4, 5)).astype(np.float32)
    found = volume_classifier._blocks(volumes)
    assert found.shape == (3, 4, 3, 2, 3)
    block = volumes[1, 0, 2:4, :2, 2:4].astype(np.float64)
    assert found[1, 0, 1, 0, 1] == pytest.approx(block.mean(), rel=1e-5)
    assert found[1, 2, 1, 0, 1] == pytest.approx(block.std(), rel=1e-4)
    edge = volumes[2, 1, :2, 2:, 4:].astype(np.float64)  # of an odd edge, half a block
    assert found[2, [1, 3], 0, 1, 2] == pytest.approx([edge.mean(), edge.std()], rel=1e-4)
