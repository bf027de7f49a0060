import numpy as np
import pytest

from diffusers_byoc.metrics import memorisation
from diffusers_byoc.metrics.poses import POSES, nearest_in_any_pose, turn


SIZE = 6


def cells(num, seed):
    """(N, 2, S, S, S) of blobs and grain."""
    return np.random.default_rng(seed).random((num, 2, SIZE, SIZE, SIZE)) ** 2


def flat(volumes):
    return volumes.reshape(len(volumes), -1)


def test_there_are_48_different_poses_and_the_first_changes_nothing():
    cube = np.arange(27).reshape(3, 3, 3)
    assert len({turn(cube, pose).tobytes() for pose in range(len(POSES))}) == len(POSES) == 48
    np.testing.assert_array_equal(turn(cube, 0), cube)
    assert turn(cells(2, 0), 5).shape == (2, 2, SIZE, SIZE, SIZE)


def test_the_nearest_is_that_of_all_poses_of_all_cells():
    samples, training = cells(9, 0), cells(70, 1)
    distances, nearest, poses = nearest_in_any_pose(flat(samples), flat(training), SIZE)
    for sample, distance, index, pose in zip(samples, distances, nearest, poses, strict=True):
        every = np.array([[np.linalg.norm(turn(sample, p) - other) for other in training] for p in range(48)])
        assert distance == pytest.approx(every.min())
        assert (pose, index) == np.unravel_index(every.argmin(), every.shape)


def test_turned_and_mirrored_copies_are_found_with_their_pose():
    training = cells(40, 1)
    samples = np.stack([turn(training[index], 7 * index % 48) for index in range(20)])
    found = memorisation(flat(samples), flat(training), flat(cells(20, 2)), cube_size=SIZE)
    np.testing.assert_array_equal(found.nearest, np.arange(20))
    assert found.distances.max() < 1e-12 and found.distance_ratio == 0 and found.near_share == 1
    for sample, index, pose in zip(samples, found.nearest, found.poses, strict=True):
        np.testing.assert_allclose(turn(sample, pose), training[index])
    # without poses they pass for new cells
    assert memorisation(flat(samples), flat(training), flat(cells(20, 2))).distance_ratio > 0.9


def test_new_cells_are_as_far_as_held_out_ones():
    found = memorisation(flat(cells(40, 0)), flat(cells(40, 1)), flat(cells(40, 2)), cube_size=SIZE)
    assert found.distance_ratio == pytest.approx(1, abs=0.05) and found.p_value > 0.01


def test_columns_that_are_no_cubes_are_refused():
    with pytest.raises(ValueError, match="cubes of 5³, got 432 columns"):
        nearest_in_any_pose(flat(cells(1, 0)), flat(cells(1, 1)), 5)
