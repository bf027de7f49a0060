"""Texture by frequency, inside the cell: the radial power spectrum, and whether a decoder left its grid.

A decoder that doubles the grid of its features can draw each block of 2³ voxels apart from its neighbours. In the
power spectrum such stripes, grids and chequers are peaks at the frequencies that repeat with the block: 1/2 a voxel
for a period of 2, multiples of 1/4 for a period of 4. No cell has peaks there.

Source: Durall et al. 2020, "Watch your up-convolution: CNN based generative deep neural networks are failing to
reproduce spectral distributions"; Odena et al. 2016, "Deconvolution and checkerboard artifacts".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from ..optional import optional
from .segmentation import bounding_box


#: Shells of the radial spectrum, of equal width from 0 to √3/2 cycles per voxel, the corner of the spectrum.
NUM_SHELLS = 16

#: (26, 3) frequencies (z, y, x), cycles per voxel, at which a grid of period 2 or 4 has its peaks.
GRID_FREQUENCIES = np.array([k for k in product((0.0, 0.25, 0.5), repeat=3) if any(k)])

#: (26,) the period of each: 4 if any of its axes repeats after 4 voxels, otherwise 2.
GRID_PERIODS = np.where((GRID_FREQUENCIES == 0.25).any(1), 4, 2)

#: A volume has a grid where its power at one of these frequencies is this many times that of the surroundings. Of 72
#: phantoms none has 4 (docs/evaluation.md).
GRID_EXCESS = 4.0

_TAPER = 2.0  # voxels from the mask's border over which the window rises
_HIGH_PASS = 1.5  # voxels, of the Gaussian that is taken away before looking for grids
_PEAK, _SURROUNDINGS = 0.06, 0.2  # cycles per voxel from a grid's frequency: its peak, and what it is compared with
_NOISE = 1e-3  # of the intensity range: what is weaker than white noise of this deviation is not seen and not counted
_LOG_MEAN = 0.5772156649015329  # -E[log E] of the exponential distribution, which the power of noise has


@dataclass(frozen=True)
class GridTest:
    """What `grid_test` finds for one period.

    Attributes:
        period: of the grid, in voxels.
        excess: power at the grid's frequencies over that of their surroundings, geometric mean over the volumes, at
            the frequency, in the channel and in the signal (detail or its energy) where it is highest; near 1 without
            a grid.
        low: lower bound of that mean, corrected for all of which it is the highest (95 %, Bonferroni, Student's t on
            the logarithms).
        share: share in [0, 1] of the volumes that by themselves have more than `GRID_EXCESS`.
        is_present: whether `low` is above 1.5, or `share` above 0.05.
        frequency: (z, y, x) in cycles per voxel, of the highest excess: (0, 0, 0.5) are stripes along x.
    """

    period: int
    excess: float
    low: float
    share: float
    is_present: bool
    frequency: tuple[float, float, float]


def radial_spectrum(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Power of each channel inside a cell, by the length of the frequency.

    The channel minus its mean in the mask, under a window that falls to 0 at the mask's border. White noise of
    standard deviation σ has the power σ² at every frequency.

    Args:
        volume: (M, D, H, W) in [0, 1].
        mask: (D, H, W) bool, the cell.

    Returns:
        (M, `NUM_SHELLS`) power, mean over each shell; nan for an empty mask.

    Raises:
        ValueError: if the mask does not fit the volume.
        ImportError: if SciPy is missing.
    """
    window = _window(volume, mask)
    if not window.any():
        return np.full((len(volume), NUM_SHELLS), np.nan)
    shells = _shells(window.shape)
    counts = np.bincount(shells.ravel(), minlength=NUM_SHELLS)
    spectra = [
        np.bincount(shells.ravel(), _power(channel - np.average(channel, weights=window), window).ravel(), NUM_SHELLS)
        for channel in volume
    ]
    return np.stack(spectra) / counts


def grid_excess(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Power at the frequencies of grids over what their surroundings in the spectrum let expect.

    The surroundings are fitted by a quadratic of the logarithm of the power, so that a spectrum may rise or fall. A
    grid may add to a channel, or only take its sharpness away in every other voxel, as copying each voxel does: so the
    channel's fine detail is looked at, and the square of it, its local energy.

    Args:
        volume: (M, D, H, W) in [0, 1], 16 voxels or more along each axis.
        mask: (D, H, W) bool, the cell.

    Returns:
        (M, 2, 26) ratios for the detail and its energy at `GRID_FREQUENCIES`, 1 in expectation without a grid; nan for
        an empty mask.

    Raises:
        ValueError: if the mask does not fit the volume, or that is too small.
        ImportError: if SciPy is missing.
    """
    if min(volume.shape[1:]) < 16:
        raise ValueError(f"Expected at least 16 voxels along each axis, got {volume.shape[1:]}. Give whole cells.")
    window = _window(volume, mask)
    if not window.any():
        return np.full((len(volume), 2, len(GRID_FREQUENCIES)), np.nan)
    gaussian_filter = optional("scipy.ndimage", "metrics").gaussian_filter
    ratios = []
    for channel in volume:
        detail = channel - gaussian_filter(channel, _HIGH_PASS)
        energy = detail**2
        energy -= np.average(energy, weights=window)
        # the square of a detail of deviation σ varies by σ²: the limit of what can be seen is squared, too
        for signal, noise in ((detail, _NOISE), (energy, _NOISE**2)):
            power = _power(signal, window).ravel() + noise**2
            logarithm = np.log(power)
            ratios.append([_excess(power, logarithm, *region) for region in _regions(window.shape)])
    return np.array(ratios).reshape(len(volume), 2, len(GRID_FREQUENCIES))


def grid_test(excesses: np.ndarray | Sequence[np.ndarray]) -> tuple[GridTest, GridTest]:
    """Whether a set of volumes has a grid of period 2, and one of period 4.

    Args:
        excesses: (B, M, 2, 26) from `grid_excess` of each volume, B ≥ 3; volumes with nan, without a cell, are left
            out.

    Returns:
        The finding for period 2 and that for period 4.

    Raises:
        ValueError: if the excesses do not have that shape, or fewer than 3 volumes have a cell.
        ImportError: if SciPy is missing.
    """
    excesses = np.asarray(excesses, dtype=np.float64)
    if excesses.ndim != 4 or excesses.shape[2:] != (2, len(GRID_FREQUENCIES)):
        raise ValueError(f"Expected (B, M, 2, 26) excesses, got {excesses.shape}. Stack what grid_excess returns.")
    excesses = excesses[np.isfinite(excesses).all((1, 2, 3))]
    if len(excesses) < 3:
        raise ValueError(f"Expected at least 3 volumes with a cell, got {len(excesses)}. Give more.")
    tests = []
    for period in (2, 4):
        is_period = period == GRID_PERIODS
        chosen = excesses[..., is_period].reshape(len(excesses), -1)  # (B, M * 2 * frequencies)
        share = float((chosen > GRID_EXCESS).any(1).mean())
        logarithms = np.log(chosen)
        means, errors = logarithms.mean(0), logarithms.std(0, ddof=1) / np.sqrt(len(chosen))
        quantile = optional("scipy.stats", "metrics").t.ppf(1 - 0.05 / chosen.shape[1], len(chosen) - 1)
        low = float(np.exp((means - quantile * errors).max()))
        frequency = GRID_FREQUENCIES[is_period][means.argmax() % is_period.sum()]
        tests.append(
            GridTest(
                period=period,
                excess=float(np.exp(means.max())),
                low=low,
                share=share,
                is_present=low > 1.5 or share > 0.05,
                frequency=tuple(frequency.tolist()),
            )
        )
    return tuple(tests)


def _window(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(D, H, W) in [0, 1], 0 outside the mask and 1 well inside it."""
    if volume.ndim != 4 or volume.shape[1:] != mask.shape:
        raise ValueError(
            f"Expected a volume (M, D, H, W) and a mask (D, H, W), got {volume.shape} and {mask.shape}. Give the mask "
            "of that cell."
        )
    window = np.zeros(mask.shape)
    if mask.any():
        box = bounding_box(mask)
        depth = optional("scipy.ndimage", "metrics").distance_transform_edt(np.pad(mask[box], 1))[1:-1, 1:-1, 1:-1]
        window[box] = np.sin(np.pi / 2 * np.clip(depth / _TAPER, 0, 1)) ** 2
    return window


def _power(signal: np.ndarray, window: np.ndarray) -> np.ndarray:
    """|Fourier transform|² of a windowed signal, on the half of the frequencies that a real signal needs."""
    transform = optional("scipy.fft", "metrics").rfftn(signal * window, _padded(window.shape))
    return (transform.real**2 + transform.imag**2) / (window**2).sum()


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // 4) * 4 for size in shape)  # so that 1/4 and 1/2 are frequencies of the transform


def _frequencies(shape: tuple[int, ...]) -> list[np.ndarray]:
    depth, height, width = _padded(shape)
    axes = np.fft.fftfreq(depth), np.fft.fftfreq(height), np.fft.rfftfreq(width)
    return [np.abs(axis) for axis in np.meshgrid(*axes, indexing="ij")]


@lru_cache(maxsize=4)
def _shells(shape: tuple[int, ...]) -> np.ndarray:
    """Number of the shell of each frequency."""
    lengths = np.sqrt(sum(axis**2 for axis in _frequencies(shape)))
    return np.minimum((lengths / (np.sqrt(3) / 2) * NUM_SHELLS).astype(int), NUM_SHELLS - 1)


@lru_cache(maxsize=4)
def _regions(shape: tuple[int, ...]) -> list[tuple[np.ndarray, ...]]:
    """For each of `GRID_FREQUENCIES`: what `_excess` needs beside the power."""
    axes = _frequencies(shape)
    is_low = sum(axis**2 for axis in axes) < 0.1**2  # where the cell's shape is
    regions = []
    for frequency in GRID_FREQUENCIES:
        offsets = [axis - position for axis, position in zip(axes, frequency, strict=True)]
        distance = np.sqrt(sum(offset**2 for offset in offsets))
        is_peak, is_around = distance <= _PEAK, (distance > _PEAK) & (distance <= _SURROUNDINGS) & ~is_low
        peak, around = np.flatnonzero(is_peak), np.flatnonzero(is_around)  # quicker than masks

        # a quadratic of the offset; along an axis whose frequency is 0 or 1/2, spectra are symmetric
        slopes = [offset for offset, position in zip(offsets, frequency, strict=True) if position == 0.25]
        terms = [np.ones_like(distance), *slopes, *(offset**2 for offset in offsets)]
        fit = np.linalg.pinv(np.stack([term[is_around] for term in terms], 1))
        regions.append((peak, around, np.stack([term[is_peak] for term in terms], 1), fit))
    return regions


def _excess(power, logarithm, peak, around, terms, fit) -> float:
    """Mean of the power at a peak over what a fit to its surroundings says."""
    expected = np.exp(terms @ (fit @ logarithm[around]) + _LOG_MEAN)
    return float(np.mean(power[peak] / expected))
