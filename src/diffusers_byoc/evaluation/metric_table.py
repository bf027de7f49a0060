"""All metrics of an evaluation, a row each: what they are called, what is good, what they look at, and how.

To add one, write its function in `metrics/` and its row here; every set of cells, the folds, ``metrics.json``,
``metrics.md`` and the figure follow.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..metrics import (
    CellMorphology,
    channel_consistency,
    classifier_test,
    compare_features,
    frechet_distance,
    grid_test,
    median_distance,
    memorisation,
    mmd_linear,
    mmd_rbf,
    neighbour_metrics,
    standardize_features,
    transfer_test,
    volume_classifier_test,
)
from ..metrics.spectrum import GRID_FREQUENCIES
from .features import VOXEL_GRID
from .settings import EvaluationSettings


@dataclass
class Comparison:
    """Cells of one row and held-out real cells, in one kind of features.

    Args:
        real: (H, K) held-out real cells.
        candidate: (N, K) cells of the row.
        training: (T, K) the other real cells: the scale of everything.
        names: K names, where each feature is a measurement of its own; see `Extractor`.
        is_real: the row is that of the real cells: `candidate` are some of `training`.
        labels: classes of `real` and of `candidate`; None where nobody knows them.
        settings: of the evaluation.
    """

    real: np.ndarray
    candidate: np.ndarray
    training: np.ndarray
    names: tuple[str, ...] | None
    is_real: bool
    settings: EvaluationSettings
    labels: tuple[np.ndarray, np.ndarray] | None = None
    _found: dict = field(default_factory=dict)

    @cached_property
    def scaled(self) -> tuple[np.ndarray, np.ndarray]:
        """(real, candidate) in units in which distances are taken."""
        if self.names is None:
            return self.real, self.candidate
        return tuple(standardize_features(x, self.training) for x in (self.real, self.candidate))

    @cached_property
    def bandwidth(self) -> float:
        """Of the Gaussian kernel, the same for every row."""
        training = self.training if self.names is None else standardize_features(self.training, self.training)
        return median_distance(training)

    def once(self, function: Callable):
        """`function` of this comparison, called once however many rows of the table ask."""
        if function not in self._found:
            self._found[function] = function(self)
        return self._found[function]


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Args:
        name: in ``metrics.json``, after the kind of features: ``morphology/frechet``.
        title: in ``metrics.md``.
        good: what to look for.
        kinds: of features that it is computed of, keys of `FEATURES`; "volumes" are the cells themselves.
        compute: a comparison -> the value, or (value, low, high) with its interval; nan where it is not defined, and
            if it is not for any row, the row is not shown.
        factor: by which ``metrics.md`` multiplies it.
        is_drawn: whether it stands in the figure, too.
    """

    name: str
    title: str
    good: str
    kinds: tuple[str, ...]
    compute: Callable[[Comparison], float | tuple[float, float, float]]
    factor: float = 1.0
    is_drawn: bool = False

    def title_of(self, kind: str) -> str:
        return self.title if len(self.kinds) == 1 else f"{self.title}, {TITLES.get(kind, kind)}"


def neighbours(comparison: Comparison):
    return neighbour_metrics(*comparison.scaled, comparison.settings.num_neighbours)


def columns(comparison: Comparison):
    return compare_features(comparison.real, comparison.candidate, comparison.names)


def median_effect(rows) -> float:
    effects = [row.effect for row in rows if np.isfinite(row.effect)]
    return np.median(effects) if effects else np.nan


def differing_share(rows) -> float:
    p_values = np.array([row.adjusted_p_value for row in rows])
    p_values = p_values[np.isfinite(p_values)]  # a measurement that no cell has cannot be tested
    return np.mean(p_values < 0.05) if len(p_values) else np.nan


def cell_volumes(comparison: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """Of (real, candidate) cells, in µm³."""
    column = comparison.names.index("cell_volume_um3")
    return comparison.real[:, column], comparison.candidate[:, column]


def consistency(comparison: Comparison):
    return channel_consistency([CellMorphology(*row) for row in comparison.candidate])


def copies(comparison: Comparison):
    samples, new = comparison.candidate, comparison.real
    if comparison.is_real:  # which are training cells: one half of the new ones takes the samples' part
        samples, new = comparison.real[::2], comparison.real[1::2]
    return memorisation(samples, comparison.training, new, VOXEL_GRID)


def grids(comparison: Comparison) -> dict[str, float]:
    """Excess and share of each period."""
    excesses = comparison.candidate.reshape(len(comparison.candidate), -1, 2, len(GRID_FREQUENCIES))
    if np.isfinite(excesses).all((1, 2, 3)).sum() < 3:  # hardly a cell to see one in
        return dict.fromkeys(("excess_2", "share_2", "excess_4", "share_4"), np.nan)
    tests = grid_test(excesses)
    return {f"{name}_{test.period}": getattr(test, name) for test in tests for name in ("excess", "share")}


def classes(comparison: Comparison):
    """Trees that learned the classes from the row's cells name those of held-out real ones; empty cells teach none."""
    is_empty = np.isnan(comparison.candidate).all()
    if is_empty or comparison.labels is None or len(np.unique(comparison.labels[1])) < 2:
        return np.nan, np.nan, np.nan
    real, candidate = comparison.labels
    test = transfer_test(comparison.candidate, candidate, comparison.real, real, seed=comparison.settings.seed)
    return with_interval(test)


def trees(comparison: Comparison):
    return with_interval(classifier_test(comparison.real, comparison.candidate, seed=comparison.settings.seed))


def network(comparison: Comparison):
    settings = comparison.settings
    test = volume_classifier_test(comparison.real, comparison.candidate, seed=settings.seed, device=settings.device)
    return with_interval(test)


def with_interval(test) -> tuple[float, float, float]:
    return (test.accuracy, *test.interval)


TITLES = {"med3d": "Med3D", "morphology": "morphology", "texture": "texture"}  # of the kinds that share a metric
VECTORS = tuple(TITLES)
MEASUREMENTS = ("morphology", "texture")

# fmt: off
METRICS = (
    Metric("frechet", "Fréchet distance", "low", VECTORS, lambda c: frechet_distance(*c.scaled), is_drawn=True),
    Metric("mmd_linear", "MMD x 10⁴, the paper's", "low", VECTORS, lambda c: mmd_linear(*c.scaled), 1e4),
    Metric("mmd_rbf", "MMD x 10⁴, Gaussian kernel", "0", VECTORS, lambda c: mmd_rbf(*c.scaled, c.bandwidth), 1e4),
    Metric("precision", "precision", "high", VECTORS, lambda c: c.once(neighbours).precision),
    Metric("recall", "recall", "high", VECTORS, lambda c: c.once(neighbours).recall),
    Metric("density", "density", "1", VECTORS, lambda c: c.once(neighbours).density),
    Metric("coverage", "coverage", "high", VECTORS, lambda c: c.once(neighbours).coverage, is_drawn=True),
    Metric("median_effect", "median Wasserstein distance of a feature, in its σ", "low", MEASUREMENTS,
           lambda c: median_effect(c.once(columns))),
    Metric("features_that_differ", "share of features that differ (p < 0.05, corrected)", "low", MEASUREMENTS,
           lambda c: differing_share(c.once(columns))),
    Metric("classifier_accuracy", "accuracy of telling it from real, trees", "0.5", MEASUREMENTS, trees,
           is_drawn=True),
    Metric("class_accuracy", "accuracy of naming the class of real cells, trees that learned from these", "as real",
           MEASUREMENTS, classes),
    Metric("volume_mean", "mean cell volume, over that of held-out cells", "1", ("morphology",),
           lambda c: np.divide(*(volumes.mean() for volumes in c.once(cell_volumes)[::-1]))),
    Metric("volume_spread", "standard deviation of the cell volume, over that of held-out cells", "1", ("morphology",),
           lambda c: np.divide(*(volumes.std(ddof=1) for volumes in c.once(cell_volumes)[::-1]))),
    Metric("nucleus_inside_share", "share of the nucleus inside the cell", "as real", ("morphology",),
           lambda c: c.once(consistency).nucleus_inside_share),
    Metric("one_nucleus_share", "share of cells with one nucleus, inside", "as real", ("morphology",),
           lambda c: c.once(consistency).one_nucleus_share),
    Metric("volume_correlation", "correlation of cell and nucleus volume", "as real", ("morphology",),
           lambda c: c.once(consistency).volume_correlation),
    Metric("classifier_accuracy", "accuracy of telling it from real, 3D network", "0.5", ("volumes",), network,
           is_drawn=True),
    Metric("excess_2", "power at a grid of period 2, over its surroundings", "1", ("grid",),
           lambda c: c.once(grids)["excess_2"]),
    Metric("share_2", "share of cells with a grid of period 2", "0", ("grid",), lambda c: c.once(grids)["share_2"]),
    Metric("excess_4", "power at a grid of period 4, over its surroundings", "1", ("grid",),
           lambda c: c.once(grids)["excess_4"]),
    Metric("share_4", "share of cells with a grid of period 4", "0", ("grid",), lambda c: c.once(grids)["share_4"]),
    Metric("distance_ratio", "distance to the nearest training cell, over that of held-out cells", "1", ("voxels",),
           lambda c: c.once(copies).distance_ratio),
    Metric("near_share", "share of samples nearer to one than 95 % of held-out cells", "0.05", ("voxels",),
           lambda c: c.once(copies).near_share),
)
# fmt: on

#: All kinds of features, in the table's order.
KINDS = tuple(dict.fromkeys(kind for metric in METRICS for kind in metric.kinds))


def compute_metrics(kind: str, comparison: Comparison) -> dict[str, float]:
    """Key of ``metrics.json`` -> value, of all metrics of one kind of features."""
    values = {}
    for metric in METRICS:
        if kind in metric.kinds:
            found = np.atleast_1d(metric.compute(comparison))
            for ending, value in zip(("", "_low", "_high"), found, strict=False):
                values[f"{kind}/{metric.name}{ending}"] = float(value)
    return values
