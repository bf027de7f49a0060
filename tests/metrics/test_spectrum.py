import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from diffusers_byoc.data import PhantomCells, VolumeProcessor
from diffusers_byoc.metrics import grid_excess, grid_test, radial_spectrum, segment_channel
from diffusers_byoc.metrics.spectrum import GRID_FREQUENCIES, GRID_PERIODS, NUM_SHELLS


@pytest.fixture(scope="module")
def phantoms():
    """(volume, mask of its cell) of six phantoms."""
    cells = PhantomCells(6, VolumeProcessor(), ["nocodazole", "blebbistatin"], seed=11)
    volumes = [((cells[index]["volumes"] + 1) / 2).numpy() for index in range(6)]
    return [(volume, segment_channel(volume[0]).mask) for volume in volumes]


def ball(size=48, radius=20):
    z, y, x = np.indices((size,) * 3) - (size - 1) / 2
    return z**2 + y**2 + x**2 <= radius**2


def test_white_noise_has_its_variance_at_every_frequency():
    noise = 0.5 + np.random.default_rng(0).normal(0, [[[[0.02]]], [[[0.1]]]], (2, 48, 48, 48))
    spectrum = radial_spectrum(noise, ball())
    assert spectrum.shape == (2, NUM_SHELLS)
    # the second shell on: from the first, the mean was taken away
    np.testing.assert_allclose(spectrum[:, 2:], np.broadcast_to([[0.02**2], [0.1**2]], (2, NUM_SHELLS - 2)), rtol=0.25)


def test_a_wave_has_its_power_in_the_shell_of_its_frequency():
    x = np.indices((48, 48, 48))[2]
    spectrum = radial_spectrum(0.5 + 0.1 * np.cos(2 * np.pi * 0.3 * x)[None], ball())[0]
    assert spectrum.argmax() == int(0.3 / (np.sqrt(3) / 2) * NUM_SHELLS)
    assert spectrum.max() > 20 * np.delete(spectrum, [spectrum.argmax() + i for i in (-1, 0, 1)]).max()


def test_what_lies_outside_the_cell_does_not_count():
    noise = np.random.default_rng(0).random((1, 48, 48, 48))
    other = np.where(ball(), noise, 0.0)
    np.testing.assert_allclose(radial_spectrum(other, ball()), radial_spectrum(noise, ball()))


def test_an_empty_cell_has_no_spectrum():
    nothing = np.zeros((2, 32, 32, 32))
    assert np.isnan(radial_spectrum(nothing, nothing[0] > 0)).all()
    assert np.isnan(grid_excess(nothing, nothing[0] > 0)).all()


@pytest.mark.parametrize("sigma", [0, 1, 2])
def test_phantoms_sharp_or_blurred_have_no_grid(phantoms, sigma):
    found = grid_test([grid_excess(gaussian_filter(v, (0, *[sigma] * 3)), mask) for v, mask in phantoms])
    assert [test.period for test in found] == [2, 4]
    assert not any(test.is_present for test in found) and max(test.share for test in found) == 0


def waves(*frequency):
    z, y, x = np.indices((64, 64, 64))
    return np.cos(2 * np.pi * (frequency[0] * z + frequency[1] * y + frequency[2] * x))


def repeated(volume, period):
    """Every block of period³ voxels by its mean."""
    for axis in (1, 2, 3):
        volume = np.add.reduceat(volume, np.arange(0, volume.shape[axis], period), axis).repeat(period, axis) / period
    return volume


@pytest.mark.parametrize(
    ("damage", "period", "frequency"),
    [
        (lambda v: v + 0.01 * waves(0, 0, 0.5), 2, (0, 0, 0.5)),  # stripes
        (lambda v: v + 0.01 * waves(0.5, 0.5, 0.5), 2, (0.5, 0.5, 0.5)),  # chequer
        (lambda v: v * (1 + 0.05 * waves(0, 0.5, 0.5)), 2, (0, 0.5, 0.5)),
        (lambda v: 0.7 * v + 0.3 * repeated(v, 2), 2, None),
        (lambda v: v + 0.05 * waves(0, 0.25, 0), 4, (0, 0.25, 0)),
        (lambda v: repeated(v, 4), 4, None),
    ],
)
def test_stripes_chequers_and_blocks_are_found(phantoms, damage, period, frequency):
    found = grid_test([grid_excess(np.where(mask, damage(v), v).clip(0, 1), mask) for v, mask in phantoms])
    test = found[(2, 4).index(period)]
    assert test.is_present and test.share > 0.5 and test.low > 1.5
    assert frequency is None or test.frequency == frequency


def test_a_grid_in_one_volume_of_six_is_found_there(phantoms):
    striped = phantoms[3][0] + 0.02 * waves(0.5, 0, 0) * phantoms[3][1]
    test = grid_test([grid_excess(striped if i == 3 else v, mask) for i, (v, mask) in enumerate(phantoms)])[0]
    assert test.share == pytest.approx(1 / 6) and test.is_present


def test_what_nobody_can_see_is_no_grid():
    volume = np.full((1, 48, 48, 48), 0.5)
    volume[0] += 1e-5 * waves(0, 0, 0.5)[:48, :48, :48]
    assert grid_excess(volume, ball()).max() < 2


def test_each_frequency_belongs_to_one_period():
    assert GRID_FREQUENCIES.shape == (26, 3) and (GRID_PERIODS == 2).sum() == 7 and (GRID_PERIODS == 4).sum() == 19


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: radial_spectrum(np.zeros((2, 32, 32, 32)), np.zeros((16, 16, 16), bool)), "Expected a volume"),
        (lambda: grid_excess(np.zeros((2, 8, 32, 32)), np.zeros((8, 32, 32), bool)), "at least 16 voxels"),
        (lambda: grid_test(np.zeros((4, 2, 26))), r"Expected \(B, M, 2, 26\)"),
        (lambda: grid_test(np.full((4, 2, 2, 26), np.nan)), "at least 3 volumes with a cell, got 0"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
