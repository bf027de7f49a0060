import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import FIDMetric
from torchmetrics.image.fid import _compute_fid

from diffusers_byoc.metrics import frechet_distance


def correlated(num_cells: int, num_features: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(num_cells, num_features)) @ generator.normal(size=(num_features, num_features))


def test_a_shifted_copy_is_the_squared_shift_away():
    features = torch.randn(500, 8, dtype=torch.float64)
    assert frechet_distance(features, features + 3.0) == pytest.approx(8 * 3.0**2)


def test_a_scaled_copy_differs_by_the_squared_difference_of_the_deviations():
    features = correlated(200, 5, 0)
    features -= features.mean(0)
    variances = features.var(0, ddof=1)
    assert frechet_distance(features, 3 * features) == pytest.approx((2**2 * variances).sum())


@pytest.mark.parametrize(("num_1", "num_2", "num_features"), [(300, 200, 6), (12, 9, 40), (50, 9, 20)])
def test_it_agrees_with_the_matrix_square_root_also_with_fewer_cells_than_features(num_1, num_2, num_features):
    a, b = correlated(num_1, num_features, 1), correlated(num_2, num_features, 2) + 0.3
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the trace of the root of a product of positive semi-definite matrices, by its eigenvalues
    root = np.sqrt(np.clip(scipy.linalg.eigvals(cov_a @ cov_b).real, 0, None)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_it_agrees_with_torchmetrics_and_monai():
    a, b = (torch.from_numpy(correlated(400, 16, seed)) for seed in (3, 4))
    covariances = a.T.cov(), b.T.cov()
    theirs = _compute_fid(a.mean(0), covariances[0], b.mean(0), covariances[1]).item()
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    try:
        monai = FIDMetric()(a, b).item()
    except (TypeError, ValueError):  # MONAI calls scipy.linalg.sqrtm(disp=...), gone from SciPy 1.18
        pytest.skip("MONAI's FID does not run with this SciPy")
    assert frechet_distance(a, b) == pytest.approx(monai, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 9), st.integers(0, 1000))
def test_it_is_symmetric_zero_for_equals_and_never_negative(num_1, num_2, num_features, seed):
    generator = np.random.default_rng(seed)
    a, b = (generator.normal(size=(num, num_features)) for num in (num_1, num_2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) >= -1e-9


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros(5), np.zeros((5, 1)), r"\(N, K\)"),
        (np.zeros((5, 2)), np.zeros((5, 3)), "2 and 3 columns"),
        (np.zeros((1, 2)), np.zeros((5, 2)), "at least 2 cells"),
        (np.full((5, 2), np.nan), np.zeros((5, 2)), "standardize_features"),
        (np.full((5, 2), "a"), np.zeros((5, 2)), "real numbers"),
    ],
)
def test_bad_features_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)
