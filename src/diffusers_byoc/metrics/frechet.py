"""The Fréchet distance between two sets of features; on Med3D features it is the paper's FID.

Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", eq. 6;
BYOC, section 4.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from .feature_sets import check_pair


if TYPE_CHECKING:
    from .feature_sets import Features


def frechet_distance(features_1: Features, features_2: Features) -> float:
    """Squared Fréchet distance of the normal distributions with the sets' means and (N - 1) covariances.

    |μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), in float64. With centred features A₁, A₂ (Σ = AᵀA), the last trace is the
    sum of the singular values of A₁A₂ᵀ. Computed so, it needs no root of a singular matrix, stays exact for fewer
    cells than features, and costs the cube of the smaller of the two numbers.

    It is biased: two sets of N cells from the same distribution are a distance apart that shrinks with N. Compare
    only distances between sets of equal sizes.

    Args:
        features_1: (N₁, K) finite, N₁ ≥ 2.
        features_2: (N₂, K) finite, N₂ ≥ 2.

    Returns:
        The distance, ≥ 0 up to rounding, symmetric.

    Raises:
        ValueError: if the features do not have these shapes or are not finite.
        ImportError: if SciPy is missing.
    """
    features_1, features_2 = check_pair(features_1, features_2)
    linalg = optional("scipy.linalg", "metrics")
    mean_difference = features_1.mean(0) - features_2.mean(0)
    factors = []
    for features in (features_1, features_2):
        centered = (features - features.mean(0)) / np.sqrt(len(features) - 1)
        # the triangular factor of a QR decomposition has the same AᵀA in min(N, K) rows
        factors.append(linalg.qr(centered, mode="r", check_finite=False)[0][: min(centered.shape)])
    trace_of_root = linalg.svdvals(factors[0] @ factors[1].T, check_finite=False).sum()
    variances = sum(np.sum(factor**2) for factor in factors)
    return float(mean_difference @ mean_difference + variances - 2 * trace_of_root)
