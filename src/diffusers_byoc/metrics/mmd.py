"""Maximum mean discrepancy: the paper's, which sees means only, and the one of a Gaussian kernel, which sees it all.

Source: Gretton et al. 2012, "A kernel two-sample test"; BYOC, section 4.2 and Table 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from .feature_sets import check_features, check_pair


if TYPE_CHECKING:
    from .feature_sets import Features

_CHUNK = 1000  # rows of the kernel matrix in memory at a time
_MEDIAN_CELLS = 1000  # cells whose pairs the median is taken over


def mmd_linear(features_1: Features, features_2: Features) -> float:
    """Squared distance of the two means over the number of features.

    The paper's MMD: in all rows of its Table 1, FID exceeds K times this number by a small covariance term.

    Args:
        features_1: (N₁, K) finite.
        features_2: (N₂, K) finite.

    Returns:
        |μ₁ - μ₂|² / K. The paper prints it times 10⁴.

    Raises:
        ValueError: if the features do not have these shapes or are not finite.
    """
    features_1, features_2 = check_pair(features_1, features_2, min_cells=1)
    return float(np.mean((features_1.mean(0) - features_2.mean(0)) ** 2))


def median_distance(features: Features, seed: int = 0) -> float:
    """Median Euclidean distance between two different cells, the customary bandwidth of `mmd_rbf`.

    Args:
        features: (N, K) finite, N ≥ 2; of more than 1000 cells, 1000 are drawn.
        seed: of that draw.

    Returns:
        The distance, in the units of the features.

    Raises:
        ValueError: if the features do not have this shape, are not finite, or at least half of all pairs are equal.
        ImportError: if SciPy is missing.
    """
    features = check_features(features, "features")
    if len(features) > _MEDIAN_CELLS:
        features = np.random.default_rng(seed).choice(features, _MEDIAN_CELLS, replace=False)
    median = float(np.median(optional("scipy.spatial.distance", "metrics").pdist(features)))
    if median == 0:
        raise ValueError("Expected cells that differ, got a median distance of 0. Give a bandwidth or other features.")
    return median


def mmd_rbf(features_1: Features, features_2: Features, bandwidth: float | None = None) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with the kernel exp(-|x - y|² / (2 bandwidth²)).

    Its expectation is 0 exactly if the distributions are equal; the estimate then lies on either side of 0.

    Args:
        features_1: (N₁, K) finite, N₁ ≥ 2.
        features_2: (N₂, K) finite, N₂ ≥ 2.
        bandwidth: in the units of the features; None takes `median_distance` of both sets together. Numbers compare
            only under one bandwidth: for a table, take that of the real cells.

    Returns:
        At most 2.

    Raises:
        ValueError: if the features do not have these shapes or are not finite, or the bandwidth is not positive.
        ImportError: if SciPy or scikit-learn is missing.

    Source: Gretton et al. 2012, lemma 6.
    """
    features_1, features_2 = check_pair(features_1, features_2)
    if bandwidth is None:
        bandwidth = median_distance(np.concatenate([features_1, features_2]))
    if not 0 < bandwidth < np.inf:
        raise ValueError(f"Expected a positive, finite bandwidth, got {bandwidth}. Leave it out for the median.")
    num_1, num_2 = len(features_1), len(features_2)
    # a cell's kernel with itself is 1 and does not count
    within_1 = (_kernel_sum(features_1, features_1, bandwidth) - num_1) / (num_1 * (num_1 - 1))
    within_2 = (_kernel_sum(features_2, features_2, bandwidth) - num_2) / (num_2 * (num_2 - 1))
    between = _kernel_sum(features_1, features_2, bandwidth) / (num_1 * num_2)
    return float(within_1 + within_2 - 2 * between)


def _kernel_sum(rows: np.ndarray, columns: np.ndarray, bandwidth: float) -> float:
    """Sum of the kernel over all pairs."""
    pairwise = optional("sklearn.metrics.pairwise", "metrics")
    gamma = 1 / (2 * bandwidth**2)
    chunks = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
    return sum(pairwise.rbf_kernel(chunk, columns, gamma).sum() for chunk in chunks)
