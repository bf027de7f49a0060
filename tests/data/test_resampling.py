import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_byoc.data import resample_volume


def positions(length, size_um):
    """Centres of voxels in µm from the middle of the volume."""
    return (np.arange(length) - (length - 1) / 2) * size_um


def ellipsoid(shape, voxel_um, center_um, radii_um):
    """Share of each voxel that lies inside, by 5³ points a voxel."""
    inside = np.zeros(shape)
    for shift in np.ndindex(5, 5, 5):
        axes = [
            positions(length, size) + (step - 2) / 5 * size
            for length, size, step in zip(shape, voxel_um, shift, strict=True)
        ]
        z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
        distance = sum(
            ((axis - middle) / radius) ** 2
            for axis, middle, radius in zip((z, y, x), center_um, radii_um, strict=True)
        )
        inside += distance <= 1
    return inside / 125


def moments(values, voxel_um):
    """Volume in µm³ and centroid in µm."""
    axes = np.meshgrid(*(positions(n, size) for n, size in zip(values.shape, voxel_um, strict=True)), indexing="ij")
    return values.sum() * math.prod(voxel_um), [(axis * values).sum() / values.sum() for axis in axes]


sizes_um = st.tuples(*[st.floats(0.2, 2.5)] * 3)


@settings(max_examples=50, deadline=None)
@given(sizes_um, sizes_um, st.tuples(*[st.integers(8, 15)] * 3))
def test_a_ramp_stays_where_it_is(source_um, target_um, shape):
    slopes = (3.0, -2.0, 0.5)
    ramp = sum(
        np.expand_dims(slope * positions(n, size), tuple({0, 1, 2} - {axis}))
        for axis, (slope, n, size) in enumerate(zip(slopes, shape, source_um, strict=True))
    )
    resampled = resample_volume(ramp[None], source_um, target_um)[0]
    expected, inner = 0, []
    for axis, slope in enumerate(slopes):
        old, new = source_um[axis], target_um[axis]
        centers = positions(resampled.shape[axis], new)
        expected = expected + np.expand_dims(slope * centers, tuple({0, 1, 2} - {axis}))
        # the reach of the smoothing, and of the interpolation, from the ends
        reach = int(max(0, new / old - 1) + 0.5) * old + 1e-6
        inner.append(np.flatnonzero(np.abs(centers) <= (shape[axis] - 1) / 2 * old - reach))
    np.testing.assert_allclose(resampled[np.ix_(*inner)], expected[np.ix_(*inner)], atol=1e-9)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("target_um", [0.3, 0.8, 1.0, 1.6, (1.0, 0.4, 0.4)])
@pytest.mark.parametrize("source_um", [0.65, (1.5, 0.5, 0.5)])
def test_an_ellipsoid_keeps_volume_and_place(source_um, target_um, order):
    source, target = np.broadcast_to(source_um, 3), np.broadcast_to(target_um, 3)
    shape = [math.ceil(30 / size) for size in source]
    cell = ellipsoid(shape, source, (1.3, -2.1, 0.7), (9.0, 7.0, 11.0))
    cell = np.rint(cell * 200).astype(np.uint8) if order else (cell > 0.5).astype(np.uint8)
    before, place = moments(cell.astype(float), source)
    resampled = resample_volume(cell[None], source, target, order)
    assert resampled.dtype == (np.float32 if order else np.uint8)
    after, new_place = moments(resampled[0].astype(float), target)
    assert after == pytest.approx(before, rel=0.01 if order else 0.06)
    # the nearest voxel may be half an old one off, all over where the growth is even
    assert np.abs(np.subtract(new_place, place)).max() < (0.02 if order else 0.51 * source.max())


@pytest.mark.parametrize("target_um", [0.5, 1.3, 2.0, 3.0, 4.5])
def test_background_stays_exact_and_nothing_rings(target_um):
    cell = np.zeros((2, 40, 40, 40), np.uint16)
    cell[:, 12:28, 14:26, 16:24] = 1000
    resampled = resample_volume(cell, 1.0, target_um)
    assert 0 <= resampled.min() and resampled.max() <= 1000 * (1 + 1e-6)
    for axis, (first, last) in enumerate([(12, 27), (14, 25), (16, 23)]):
        centers = positions(resampled.shape[axis + 1], target_um) + 19.5
        occupied = centers[(resampled > 0).any(axis=tuple({0, 1, 2, 3} - {axis + 1}))]
        assert first - 2 * max(target_um, 1) <= occupied.min() and occupied.max() <= last + 2 * max(target_um, 1)


def test_a_fine_texture_does_not_alias():
    stripes = np.indices((1, 30, 30, 60)).sum(axis=0) % 2 * 100.0
    coarse = resample_volume(stripes, 1.0, 3.0)[:, 2:-2, 2:-2, 2:-2]
    assert np.abs(coarse - 50).max() < 2  # without smoothing: 0 and 100


def test_doubling_by_hand():
    data = np.array([0.0, 4.0]).reshape(1, 1, 1, 2)
    np.testing.assert_allclose(resample_volume(data, (1, 1, 1), (1, 1, 0.5)).ravel(), [0, 1, 3, 4])
    np.testing.assert_array_equal(resample_volume(data, (1, 1, 1), (1, 1, 0.5), order=0).ravel(), [0, 0, 4, 4])


@settings(max_examples=30, deadline=None)
@given(sizes_um, sizes_um, st.sampled_from(["bool", "uint16", "int64"]))
def test_labels_stay_labels(source_um, target_um, dtype):
    labels = np.random.default_rng(0).integers(0, 5, (2, 5, 6, 7))
    labels = (labels * 2**60 if dtype == "int64" else labels).astype(dtype)  # more digits than a float has
    resampled = resample_volume(labels, source_um, target_um, order=0)
    assert resampled.dtype == labels.dtype and set(np.unique(resampled)) <= set(np.unique(labels))
    assert resampled.shape == resample_volume(labels.astype(np.float32), source_um, target_um).shape


@settings(max_examples=50, deadline=None)
@given(sizes_um, sizes_um)
def test_extents_agree(source_um, target_um):
    resampled = resample_volume(np.ones((1, 9, 8, 7), np.uint8), source_um, target_um)
    for new, target, old, source in zip(resampled.shape[1:], target_um, (9, 8, 7), source_um, strict=True):
        assert abs(new * target - old * source) <= target / 2 + 1e-6 or new == 1
    np.testing.assert_allclose(resampled, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "arguments", "match"),
    [
        (np.ones((5, 5, 5)), (1.0, 2.0), r"\(C, Z, Y, X\)"),
        (np.ones((1, 5, 5, 5)), (0.0, 2.0), "voxel_size_um"),
        (np.ones((1, 5, 5, 5)), (1.0, (1.0, 2.0)), "voxel_size_um"),
        (np.ones((1, 5, 5, 5)), (1.0, 2.0, 3), "`order`"),
        (np.ones((1, 50, 50, 50)), (650.0, 1.0), "Check the units"),
    ],
)
def test_refusals(data, arguments, match):
    with pytest.raises(ValueError, match=match):
        resample_volume(data, *arguments)
