"""What nearest neighbours tell: fidelity and diversity apart, and whether samples are copies of training cells.

Source: Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models"; Naeem et al.
2020, "Reliable fidelity and diversity metrics for generative models" (density, coverage); Meehan et al. 2020, "A
non-parametric test to detect data-copying in generative models".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from .feature_sets import check_features, check_pair
from .poses import nearest_in_any_pose


if TYPE_CHECKING:
    from .feature_sets import Features

#: Samples count as suspiciously near below this quantile of the distances of held-out cells.
NEAR_QUANTILE = 0.05

_CHUNK = 1000


@dataclass(frozen=True)
class NeighbourMetrics:
    """What `neighbour_metrics` finds.

    Attributes:
        precision: share in [0, 1] of the generated cells that lie among the real ones: within the k-th neighbour
            distance of at least one of them. Fidelity.
        recall: share in [0, 1] of the real cells that lie among the generated ones. Diversity.
        density: mean number of real neighbourhoods a generated cell lies in, over k; 1 in expectation for equal
            distributions, and not bounded by it. As precision, but no outlier among the real cells dominates it.
        coverage: share in [0, 1] of the real cells with a generated one in their neighbourhood. As recall, but no
            outlier among the generated cells dominates it.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_metrics(real: Features, generated: Features, k: int = 5) -> NeighbourMetrics:
    """Precision, recall, density and coverage of generated cells.

    They depend on the sizes of the sets: compare rows of equal sizes only, and with that of real against real.

    Args:
        real: (N, K) finite, N > k.
        generated: (N', K) finite, N' > k.
        k: neighbours that span a neighbourhood, the cell itself not counted.

    Returns:
        The four numbers.

    Raises:
        ValueError: if the features do not have these shapes or are not finite, or a set has at most k cells.
        ImportError: if scikit-learn is missing.
    """
    if k < 1:
        raise ValueError(f"Expected k of at least 1, got {k}. Raise it.")
    real, generated = check_pair(real, generated, min_cells=k + 1)
    real_radii, generated_radii = _neighbourhood_radii(real, k), _neighbourhood_radii(generated, k)
    pairwise_distances = optional("sklearn.metrics", "metrics").pairwise_distances

    num_neighbourhoods, is_covered = [], np.zeros(len(real), bool)
    is_among_generated = np.zeros(len(real), bool)
    for start in range(0, len(generated), _CHUNK):
        distances = pairwise_distances(generated[start : start + _CHUNK], real)  # (chunk, N)
        is_in_real = distances <= real_radii
        num_neighbourhoods.append(is_in_real.sum(1))
        is_covered |= is_in_real.any(0)
        is_among_generated |= (distances <= generated_radii[start : start + _CHUNK, None]).any(0)
    num_neighbourhoods = np.concatenate(num_neighbourhoods)
    return NeighbourMetrics(
        precision=float((num_neighbourhoods > 0).mean()),
        recall=float(is_among_generated.mean()),
        density=float(num_neighbourhoods.mean() / k),
        coverage=float(is_covered.mean()),
    )


@dataclass(frozen=True)
class Memorisation:
    """What `memorisation` finds.

    Attributes:
        distances: (N,) distance of each sample to its nearest training cell.
        nearest: (N,) index of that training cell.
        poses: (N,) the pose in which the sample is nearest to it, for `turn`; 0, as it is, unless poses were tried.
        held_out_distances: (H,) distance of each held-out cell to its nearest training cell.
        distance_ratio: median of the first over median of the last; near 1 for new cells, 0 for copies.
        near_share: share in [0, 1] of the samples that lie nearer to a training cell than all but 5 % of the held-out
            cells do; about 0.05 for new cells, 1 for copies.
        p_value: one-sided Mann-Whitney test of whether samples lie nearer to the training cells than held-out cells.
    """

    distances: np.ndarray
    nearest: np.ndarray
    poses: np.ndarray
    held_out_distances: np.ndarray
    distance_ratio: float
    near_share: float
    p_value: float


def memorisation(
    samples: Features, training: Features, held_out: Features, cube_size: int | None = None
) -> Memorisation:
    """Compare how near samples and held-out cells come to the training cells.

    A small distance alone says nothing, as real cells resemble each other too; held-out cells show how much. They
    must be of the kind of the training cells but not among them.

    A generator that was trained on turned and mirrored cells may copy a cell in any pose. Where the features are
    voxels, `cube_size` says so, and the distance is the smallest in all 48 poses of the cube, of samples and of
    held-out cells alike.

    Args:
        samples: (N, K) finite features of generated cells.
        training: (T, K) of the cells the generator was trained on.
        held_out: (H, K) of cells it never saw.
        cube_size: S, where the features are the voxels of M cubes (K = M S³); None where poses mean nothing.

    Returns:
        Distances, the training cell nearest to each sample, and their summary.

    Raises:
        ValueError: if the features do not have these shapes or are not finite.
        ImportError: if SciPy or scikit-learn is missing.
    """
    samples, training = check_pair(samples, training, min_cells=1)
    held_out = check_features(held_out, "held_out", min_cells=1)
    if cube_size is None:
        search = optional("sklearn.neighbors", "metrics").NearestNeighbors(n_neighbors=1).fit(training)
        distances, nearest = (column[:, 0] for column in search.kneighbors(samples))
        poses = np.zeros(len(samples), int)
        held_out_distances = search.kneighbors(held_out)[0][:, 0]
    else:
        distances, nearest, poses = nearest_in_any_pose(samples, training, cube_size)
        held_out_distances = nearest_in_any_pose(held_out, training, cube_size)[0]
    typical = np.median(held_out_distances)
    if typical == 0:
        raise ValueError(
            "Expected held-out cells that are not training cells, got copies of them (median distance 0). Split anew."
        )
    test = optional("scipy.stats", "metrics").mannwhitneyu(distances, held_out_distances, alternative="less")
    return Memorisation(
        distances=distances,
        nearest=nearest,
        poses=poses,
        held_out_distances=held_out_distances,
        distance_ratio=float(np.median(distances) / typical),
        near_share=float((distances < np.quantile(held_out_distances, NEAR_QUANTILE)).mean()),
        p_value=float(test.pvalue),
    )


def _neighbourhood_radii(features: np.ndarray, k: int) -> np.ndarray:
    """(N,) distance of each cell to its k-th neighbour, itself not counted."""
    # `kneighbors` without an argument leaves each cell out of its own neighbours
    search = optional("sklearn.neighbors", "metrics").NearestNeighbors(n_neighbors=k).fit(features)
    return search.kneighbors()[0][:, -1]
