import numpy as np
import pytest

from diffusers_byoc.metrics import memorisation, neighbour_metrics
from diffusers_byoc.metrics import neighbours as module


def brute_force(real: np.ndarray, generated: np.ndarray, k: int):
    def radii(x):
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, k]

    distances = np.linalg.norm(generated[:, None] - real[None], axis=2)
    in_real, in_generated = distances <= radii(real), distances <= radii(generated)[:, None]
    return in_real.any(1).mean(), in_generated.any(0).mean(), in_real.sum(1).mean() / k, in_real.any(0).mean()


def test_the_four_numbers_are_those_of_all_pairs_in_any_chunks(monkeypatch):
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(40, 3)), 1.4 * generator.normal(size=(31, 3)) + 0.7
    expected = brute_force(real, generated, 3)
    monkeypatch.setattr(module, "_CHUNK", 7)
    found = neighbour_metrics(real, generated, k=3)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected)


def test_equal_distributions_score_full_and_distant_ones_nothing():
    real, generated = np.random.default_rng(0).normal(size=(2, 400, 4))
    near, far = neighbour_metrics(real, generated), neighbour_metrics(real, generated + 50)
    assert near.precision > 0.9 and near.recall > 0.9 and near.coverage > 0.9
    assert near.density == pytest.approx(1, abs=0.1)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_a_dropped_mode_costs_recall_and_coverage_but_no_precision():
    generator = np.random.default_rng(0)
    real = np.concatenate([generator.normal(size=(200, 2)), generator.normal(size=(200, 2)) + 30])
    found = neighbour_metrics(real, generator.normal(size=(400, 2)))
    assert found.precision > 0.95
    assert found.recall == pytest.approx(0.5, abs=0.05) and found.coverage == pytest.approx(0.5, abs=0.05)


def test_too_few_cells_for_k_are_refused():
    with pytest.raises(ValueError, match="at least 6 cells"):
        neighbour_metrics(np.eye(5), np.eye(5), k=5)


def test_copies_are_found_and_new_cells_are_not():
    training, held_out, samples = np.random.default_rng(0).normal(size=(3, 400, 5))
    new = memorisation(samples, training, held_out)
    assert new.near_share < 0.1 and 0.9 < new.distance_ratio < 1.1 and new.p_value > 0.01

    order = np.random.default_rng(1).permutation(400)[:100]
    copies = memorisation(training[order] + 1e-3, training, held_out)
    assert copies.near_share == 1 and copies.distance_ratio < 0.01 and copies.p_value < 1e-10
    np.testing.assert_array_equal(copies.nearest, order)
    np.testing.assert_allclose(copies.distances, 1e-3 * np.sqrt(5), rtol=1e-3)

    half = memorisation(np.concatenate([samples[:50], training[:50]]), training, held_out)
    assert half.near_share == pytest.approx(0.5, abs=0.08)


def test_held_out_cells_that_were_trained_on_are_refused():
    training = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match="Split anew"):
        memorisation(training + 1, training, training[:10])
