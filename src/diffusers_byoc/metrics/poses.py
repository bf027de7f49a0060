"""The 48 poses of a cube, and the nearest cell in any of them."""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations, product

import numpy as np

from ..optional import optional


#: (order of the axes, step along each) of every pose; the first leaves a cube as it is.
POSES = tuple(product(permutations(range(3)), product((1, -1), repeat=3)))

_BLOCK = 32  # cells that are compared in all poses at a time


def turn(volumes: np.ndarray, pose: int) -> np.ndarray:
    """Turn and mirror cubes.

    Args:
        volumes: (..., S, S, S).
        pose: index into `POSES`.

    Returns:
        The same shape, a view.
    """
    axes, steps = POSES[pose]
    first = volumes.ndim - 3
    turned = volumes.transpose(*range(first), *(first + axis for axis in axes))
    return turned[(..., *(slice(None, None, step) for step in steps))]


def nearest_in_any_pose(
    samples: np.ndarray, training: np.ndarray, cube_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The training cell that is nearest to each sample in any pose of the sample.

    Exact, but most pairs are never compared: a pose moves a voxel within its orbit alone, at most 48 places, so the
    distance of the sorted values of each orbit, the same for all poses, is at most that of the cells in any pose.

    Args:
        samples: (N, M S³) voxels.
        training: (T, M S³).
        cube_size: S.

    Returns:
        (N,) Euclidean distances, (N,) indices of the training cells, and (N,) poses.

    Raises:
        ValueError: if the columns are not the voxels of cubes of that size.
        ImportError: if scikit-learn is missing.
    """
    if samples.shape[1] % cube_size**3:
        raise ValueError(
            f"Expected the voxels of cubes of {cube_size}³, got {samples.shape[1]} columns. Correct cube_size."
        )
    pairwise_distances = optional("sklearn.metrics", "metrics").pairwise_distances
    sorted_samples, sorted_training = (_sorted_orbits(cells, cube_size) for cells in (samples, training))
    squares = (training**2).sum(1)
    margin = 1e-6 * (1 + np.sqrt(squares.max()))  # of rounding, so that equal cells are not passed by
    rounded = training.astype(np.float32)  # twice as fast, and enough to say which is nearest
    distances, nearest, poses = np.full(len(samples), np.inf), *np.zeros((2, len(samples)), int)
    for index, sample in enumerate(samples):
        bounds = pairwise_distances(sorted_samples[index : index + 1], sorted_training)[0]
        order = np.argsort(bounds)
        turned = sample.reshape(-1, cube_size**3)[:, _places(cube_size)].swapaxes(0, 1).reshape(len(POSES), -1)
        rounded_turned = turned.astype(np.float32)
        for start in range(0, len(order), _BLOCK):
            block = order[start : start + _BLOCK]
            if bounds[block[0]] > distances[index] + margin:
                break
            products = rounded_turned @ rounded[block].T  # (48, block): a pose changes no norm
            pose, place = np.unravel_index((squares[block] - 2 * products).argmin(), products.shape)
            distance = np.linalg.norm(turned[pose] - training[block[place]])  # not from squares: copies are at 0
            if distance < distances[index]:
                distances[index], nearest[index], poses[index] = distance, block[place], pose
    return distances, nearest, poses


@lru_cache(maxsize=4)
def _places(size: int) -> np.ndarray:
    """(48, S³) for each pose, which voxel comes to each place."""
    cube = np.arange(size**3).reshape(size, size, size)
    return np.stack([turn(cube, pose).ravel() for pose in range(len(POSES))])


def _sorted_orbits(features: np.ndarray, size: int) -> np.ndarray:
    """Voxels ordered by orbit, and by value within each, channel by channel: the same for all poses of a cell."""
    orbits = np.unique(_places(size).min(0), return_inverse=True)[1].ravel()  # (S³,) number of each voxel's orbit
    channels = features.reshape(len(features), -1, size**3)
    low, span = channels.min(), np.ptp(channels) + 1
    keys = (channels - low) + orbits * span  # sorting these keeps orbits together
    keys.sort(-1)
    return (keys - np.sort(orbits) * span + low).reshape(len(features), -1)
