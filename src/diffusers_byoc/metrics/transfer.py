"""Train on generated cells, test on real ones: did the generator learn what tells the classes apart?

Source: Esteban et al. 2017, "Real-valued (medical) time series generation with recurrent conditional GANs" (TSTR);
Wilson 1927.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from .feature_sets import check_pair
from .trees import train_trees


if TYPE_CHECKING:
    from .feature_sets import Features


@dataclass(frozen=True)
class TransferTest:
    """What `transfer_test` finds.

    Attributes:
        accuracy: share in [0, 1] of the held-out real cells whose class the classifier names.
        interval: its 95 % confidence interval (Wilson).
        num_cells: held-out cells judged.
    """

    accuracy: float
    interval: tuple[float, float]
    num_cells: int


def transfer_test(
    training: Features, training_labels: Sequence, held_out: Features, held_out_labels: Sequence, seed: int = 0
) -> TransferTest:
    """Train gradient-boosted trees to name the class (drug) of cells, and judge them on held-out real cells.

    Compare the accuracy of trees that learned from generated cells with that of trees that learned from as many real
    ones. Lower: what tells the classes apart was not learned, or not in all its variety.

    Args:
        training: (N, K) features of the cells to learn from, generated or real; nan for what a cell does not have.
        training_labels: N classes, at least two different ones.
        held_out: (H, K) features of real cells that neither the generator nor the trees saw.
        held_out_labels: H classes.
        seed: of the trees.

    Returns:
        The accuracy on the held-out cells.

    Raises:
        ValueError: if features and labels do not fit, there is one class only, or no cell to learn from has a feature.
        ImportError: if scikit-learn or SciPy is missing.
    """
    training, held_out = check_pair(training, held_out, min_cells=1, allow_nan=True)
    training_labels, held_out_labels = np.asarray(training_labels), np.asarray(held_out_labels)
    if (len(training_labels), len(held_out_labels)) != (len(training), len(held_out)):
        raise ValueError(
            f"Expected a label for each of {len(training)} and {len(held_out)} cells, got {len(training_labels)} and "
            f"{len(held_out_labels)}. Match their numbers."
        )
    if len(np.unique(training_labels)) < 2:
        raise ValueError("Expected cells of at least two classes to learn from, got one. Give several classes.")
    num_right = int((train_trees(training, training_labels, seed)(held_out) == held_out_labels).sum())
    test = optional("scipy.stats", "metrics").binomtest(num_right, len(held_out))
    interval = test.proportion_ci(0.95, "wilson")
    return TransferTest(num_right / len(held_out), (float(interval.low), float(interval.high)), len(held_out))
