"""What the metrics take: features, one row a cell; and how columns of different units become comparable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional


if TYPE_CHECKING:
    import torch

    Features = np.ndarray | torch.Tensor


#: A standardised feature is cut off here: far beyond what differs between real cells.
MAX_DEVIATIONS = 10.0


def check_features(features: Features, name: str, min_cells: int = 2, allow_nan: bool = False) -> np.ndarray:
    """(N, K) features as float64 NumPy.

    Raises:
        ValueError: if they are not (N, K) real numbers with N ≥ `min_cells`, or not finite; NaN, for what a cell does
            not have, passes where `allow_nan` says so.
    """
    if hasattr(features, "detach"):
        features = features.detach().cpu().double().numpy()  # not every device has float64
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype.kind not in "buif":
        raise ValueError(
            f"Expected {name} as (N, K) real numbers, got {features.shape} of {features.dtype}. Give a row a cell."
        )
    if len(features) < min_cells:
        raise ValueError(f"Expected at least {min_cells} cells in {name}, got {len(features)}. Give more cells.")
    features = features.astype(np.float64)
    if np.isinf(features).any() or (np.isnan(features).any() and not allow_nan):
        remedy = "Look for the cells that cause it" if allow_nan else "Call standardize_features, which replaces NaN"
        raise ValueError(f"Expected finite {name}, got NaN or infinity. {remedy}.")
    return features


def check_pair(
    features_1: Features, features_2: Features, min_cells: int = 2, allow_nan: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features with the same columns; see `check_features`."""
    features_1 = check_features(features_1, "features_1", min_cells, allow_nan)
    features_2 = check_features(features_2, "features_2", min_cells, allow_nan)
    if features_1.shape[1] != features_2.shape[1]:
        raise ValueError(
            f"Expected the same features of both sets, got {features_1.shape[1]} and {features_2.shape[1]} columns."
            " Extract both in the same way."
        )
    return features_1, features_2


def standardize_features(features: Features, reference: Features) -> np.ndarray:
    """Features in standard deviations of a reference set, at most `MAX_DEVIATIONS`, without NaN.

    A feature that a cell does not have (the shape of a missing nucleus) takes the mean of the reference set if some
    cell there does not have it either, and then neither adds to a distance nor takes from it. If all have it, it
    counts as `MAX_DEVIATIONS`: otherwise volumes without any cell would be nearer to cells than bad cells are. A
    column that is constant in the reference is centred and keeps its unit. Without the limit, a feature in which
    hardly any real cell differs from the others (the number of parts) would alone decide a distance as soon as one
    cell does.

    Args:
        features: (N, K), NaN for what a cell does not have.
        reference: (R, K), R ≥ 2, the real cells; the same for all sets that are compared.

    Returns:
        (N, K) float64, finite.

    Raises:
        ValueError: if the shapes do not fit, or a value is infinite.
        ImportError: if scikit-learn is missing.
    """
    features = check_features(features, "features", min_cells=1, allow_nan=True)
    reference = check_features(reference, "reference", allow_nan=True)
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"Expected the {reference.shape[1]} columns of the reference, got {features.shape[1]}. Extract both alike."
        )
    preprocessing = optional("sklearn.preprocessing", "metrics")
    with np.errstate(invalid="ignore"):  # a column of nan has no mean, which is what nan_to_num answers
        scaler = preprocessing.StandardScaler().fit(reference)
    scaled = scaler.transform(features).clip(-MAX_DEVIATIONS, MAX_DEVIATIONS)
    missing = np.where(np.isnan(reference).any(axis=0), 0.0, MAX_DEVIATIONS)
    return np.where(np.isnan(scaled), missing, scaled)
