"""Gradient-boosted trees on features of cells, for all tests that learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..optional import optional


def train_trees(features: np.ndarray, labels: Sequence, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Trees that name the label of a cell. They need no scaling, and take a missing value for what it is.

    Args:
        features: (N, K), nan for what a cell does not have.
        labels: N of them.
        seed: of the trees.

    Returns:
        (n, K) features -> (n,) labels.

    Raises:
        ValueError: if no cell has any of the features.
        ImportError: if scikit-learn is missing.
    """
    ensemble = optional("sklearn.ensemble", "metrics")
    is_known = ~np.isnan(features).all(0)  # scikit-learn cannot bin a column without a number
    if not is_known.any():
        raise ValueError(
            f"Expected cells that have at least one of {features.shape[1]} features, got {len(features)} that have"
            " none. Give cells that are not empty."
        )
    # at fewer than 20 cells a leaf, the default, trees of few cells would have no branch
    trees = ensemble.HistGradientBoostingClassifier(
        min_samples_leaf=max(1, min(20, len(features) // 10)), random_state=seed
    )
    trees.fit(features[:, is_known], labels)
    return lambda cells: trees.predict(cells[:, is_known])
