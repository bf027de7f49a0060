"""Two-sample tests: can generated cells be told from real ones, and by which measurement?

Source: Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests"; Nadeau and Bengio 2003, "Inference for the
generalization error"; Benjamini and Hochberg 1995.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from .feature_sets import check_pair
from .trees import train_trees


if TYPE_CHECKING:
    from .feature_sets import Features


@dataclass(frozen=True)
class FeatureComparison:
    """One row of `compare_features`.

    Attributes:
        name: of the feature.
        wasserstein: distance of the two distributions, in the unit of the feature.
        effect: the same in standard deviations of the real cells; nan where these do not vary.
        statistic: of the two-sample Kolmogorov-Smirnov test: the largest difference of the two distribution functions.
        p_value: of that test.
        adjusted_p_value: corrected for the number of features (Benjamini-Hochberg, or as asked for).
        num_real: real cells that have the feature.
        num_generated: generated cells that have it.
    """

    name: str
    wasserstein: float
    effect: float
    statistic: float
    p_value: float
    adjusted_p_value: float
    num_real: int
    num_generated: int


def compare_features(
    real: Features, generated: Features, names: Sequence[str], correction: str = "bh"
) -> list[FeatureComparison]:
    """Compare the distributions of each feature, cells without it left out.

    Args:
        real: (N, K), nan for what a cell does not have.
        generated: (N', K), the same.
        names: K names.
        correction: of the p-values for testing K features: "bh" bounds the share of false discoveries (Benjamini and
            Hochberg), for features that rise together; "by" for any dependence (Benjamini and Yekutieli).

    Returns:
        K rows in the order of the names; nan where a set has no cell with the feature.

    Raises:
        ValueError: if shapes and names do not match, or a value is infinite.
        ImportError: if SciPy is missing.
    """
    real, generated = check_pair(real, generated, min_cells=1, allow_nan=True)
    if real.shape[1] != len(names):
        raise ValueError(f"Expected a name for each of {real.shape[1]} columns, got {len(names)} names. Match them.")
    if correction not in ("bh", "by"):
        raise ValueError(f"Expected correction 'bh' or 'by', got {correction!r}. Choose one.")
    stats = optional("scipy.stats", "metrics")
    rows = []
    for real_column, generated_column in zip(real.T, generated.T, strict=True):
        a, b = real_column[~np.isnan(real_column)], generated_column[~np.isnan(generated_column)]
        row = dict.fromkeys(("wasserstein", "effect", "statistic", "p_value"), float("nan"))
        if len(a) and len(b):
            test, distance, spread = stats.ks_2samp(a, b), stats.wasserstein_distance(a, b), a.std()
            row = {"wasserstein": distance, "effect": distance / spread if spread else np.nan}
            row |= {"statistic": test.statistic, "p_value": test.pvalue}
        rows.append({key: float(value) for key, value in row.items()} | {"num_real": len(a), "num_generated": len(b)})
    p_values = np.array([row["p_value"] for row in rows])
    adjusted = np.full(len(rows), np.nan)
    tested = ~np.isnan(p_values)
    if tested.any():
        adjusted[tested] = stats.false_discovery_control(p_values[tested], method=correction)
    return [
        FeatureComparison(name=name, adjusted_p_value=float(p_value), **row)
        for name, p_value, row in zip(names, adjusted, rows, strict=True)
    ]


@dataclass(frozen=True)
class ClassifierTest:
    """What a classifier two-sample test finds.

    Attributes:
        accuracy: share in [0, 1] of the cells, none of them seen in training, that the classifier puts right. 0.5:
            it cannot tell generated from real. 1: it always can.
        interval: 95 % confidence interval of the accuracy (Wilson). Folds share most of their training cells, so the
            cells count for fewer than they are, by Nadeau and Bengio's factor: 1 + k / (k - 1) for k folds. Without
            it, the interval would hold 0.5 for equal distributions in 86 % of all tests only.
        p_value: one-sided test of the accuracy against 0.5, of a normal distribution with the variance of as few.
        num_cells: cells judged, half of them real.
    """

    accuracy: float
    interval: tuple[float, float]
    p_value: float
    num_cells: int


def classifier_test(real: Features, generated: Features, num_folds: int = 5, seed: int = 0) -> ClassifierTest:
    """Train gradient-boosted trees to tell generated cells from real ones, by their features.

    Of the larger set a sample of the smaller's size
    takes part, so that guessing gives 0.5.

    Args:
        real: (N, K), nan for what a cell does not have.
        generated: (N', K), the same.
        num_folds: of the cross-validation; every cell is judged once, by trees that did not see it.
        seed: of the folds and of the sample.

    Returns:
        The cross-validated accuracy.

    Raises:
        ValueError: if the features do not have these shapes, no cell has any, or a set has fewer cells than folds.
        ImportError: if scikit-learn or SciPy is missing.
    """
    real, generated = check_pair(real, generated, min_cells=num_folds, allow_nan=True)

    def judge(training, is_generated, judged, fold):
        return train_trees(training, is_generated, seed)(judged)

    return cross_validated_test(real, generated, judge, num_folds, seed)


def cross_validated_test(
    real: np.ndarray,
    generated: np.ndarray,
    judge: Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray],
    num_folds: int,
    seed: int,
) -> ClassifierTest:
    """The test itself, whatever the classifier.

    Args:
        real: (N, ...) real cells.
        generated: (N', ...) generated ones.
        judge: (training cells, whether each is generated, cells to judge, fold) -> (judged,) whether it takes each
            for generated.
        num_folds: of the cross-validation.
        seed: of the folds and of the sample of the larger set.

    Returns:
        The cross-validated accuracy.

    Raises:
        ValueError: if a set has fewer cells than folds.
        ImportError: if scikit-learn or SciPy is missing.
    """
    num_each = min(len(real), len(generated))
    if not 2 <= num_folds <= num_each:
        raise ValueError(
            f"Expected num_folds from 2 to the {num_each} cells of the smaller set, got {num_folds}. Give more cells."
        )
    generator = np.random.default_rng(seed)
    real, generated = (
        cells[np.sort(generator.choice(len(cells), num_each, replace=False))] for cells in (real, generated)
    )
    cells, is_generated = np.concatenate([real, generated]), np.repeat([False, True], num_each)
    folds = optional("sklearn.model_selection", "metrics").StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    num_right = 0
    for fold, (training, judged) in enumerate(folds.split(cells.reshape(len(cells), -1), is_generated)):
        verdict = judge(cells[training], is_generated[training], cells[judged], fold)
        num_right += int((np.asarray(verdict, bool) == is_generated[judged]).sum())
    accuracy, norm = num_right / len(cells), optional("scipy.stats", "metrics").norm
    num_effective = len(cells) / (1 + num_folds / (num_folds - 1))
    z = norm.ppf(0.975)
    center = accuracy + z**2 / (2 * num_effective)
    half = z * np.sqrt(accuracy * (1 - accuracy) / num_effective + z**2 / (4 * num_effective**2))
    low, high = ((center + sign * half) / (1 + z**2 / num_effective) for sign in (-1, 1))
    return ClassifierTest(
        accuracy=accuracy,
        interval=(float(low), float(high)),
        p_value=float(norm.sf((accuracy - 0.5) * 2 * np.sqrt(num_effective))),
        num_cells=len(cells),
    )
