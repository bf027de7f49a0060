import numpy as np
import pytest
import scipy.stats
import torch

from diffusers_byoc.metrics import frechet_distance, median_distance, mmd_linear, mmd_rbf
from diffusers_byoc.metrics import mmd as module


def brute_force(a: np.ndarray, b: np.ndarray, bandwidth: float) -> float:
    """Gretton's estimator, pair by pair."""

    def kernel(x, y):
        return np.exp(-((x - y) ** 2).sum() / (2 * bandwidth**2))

    within = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    return sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_the_papers_mmd_is_the_mean_squared_difference_of_the_means():
    features = torch.randn(50, 4)
    assert mmd_linear(features, features + 0.5) == pytest.approx(0.25)
    # "FID minus 2048 x MMD is a small positive remainder": here the covariances are equal
    assert frechet_distance(features, features + 0.5) == pytest.approx(4 * mmd_linear(features, features + 0.5))


def test_the_gaussian_kernels_mmd_is_that_of_all_pairs_in_any_chunks(monkeypatch):
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(13, 3)), generator.normal(size=(9, 3)) + 1
    expected = brute_force(a, b, 1.7)
    assert mmd_rbf(a, b, 1.7) == pytest.approx(expected)
    monkeypatch.setattr(module, "_CHUNK", 4)
    assert mmd_rbf(a, b, 1.7) == pytest.approx(expected)


def test_its_expectation_is_that_of_two_normal_distributions():
    # E k(x, y) of x ~ N(m, 1), y ~ N(0, 1) is s/√(s² + 2) exp(-m² / (2 (s² + 2)))
    bandwidth, shift = 1.3, 0.8
    scale = bandwidth / np.sqrt(bandwidth**2 + 2)
    expected = 2 * scale * (1 - np.exp(-(shift**2) / (2 * (bandwidth**2 + 2))))
    quantiles = scipy.stats.norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]
    # that a cell's kernel with itself is left out costs equal quantiles (1 - E k) / N in each set
    assert mmd_rbf(quantiles, quantiles + shift, bandwidth) == pytest.approx(expected, abs=2 / 2000)


def test_it_is_unbiased_and_sees_what_the_mean_does_not():
    generator = np.random.default_rng(0)
    same = [mmd_rbf(*generator.normal(size=(2, 40, 3)), 2.0) for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)  # the biased estimate is 10 times that off
    narrow, wide = generator.normal(size=(300, 3)), 3 * generator.normal(size=(300, 3))
    assert mmd_rbf(narrow, wide) > 5 * np.std(same)


def test_the_bandwidth_is_the_median_of_all_distances():
    features = np.array([[0.0], [1.0], [4.0]])  # distances 1, 3, 4
    assert median_distance(features) == 3
    assert median_distance(np.random.default_rng(0).normal(size=(3000, 2))) == pytest.approx(1.665, rel=0.05)
    with pytest.raises(ValueError, match="median distance of 0"):
        median_distance(np.ones((4, 2)))
    with pytest.raises(ValueError, match="positive, finite bandwidth"):
        mmd_rbf(features, features, 0.0)
