"""Radiomic texture of single cells: spectrum, grey-level co-occurrence, blobs and edges by scale, wavelets.

What morphology hardly sees and a reader of the pictures sees first: grain, rims, spots, and whether they are there at
the right scale. PyRadiomics, the library of the field, cannot be installed from PyPI for Python 3.11; these are its
families of features, by the libraries that it rests on.

Source: Haralick et al. 1973, "Textural features for image classification"; van Griethuysen et al. 2017, "Computational
radiomics system to decode the radiographic phenotype"; Mallat 1989, "A theory for multiresolution signal
decomposition: the wavelet representation".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from ..optional import optional
from .segmentation import bounding_box
from .spectrum import NUM_SHELLS, radial_spectrum


#: Neighbours of a voxel in three dimensions, one of each pair of opposite ones.
DIRECTIONS = tuple(d for d in product((-1, 0, 1), repeat=3) if d > (0, 0, 0))
#: Voxels between the two of a pair of the co-occurrence matrices.
DISTANCES = (1, 2)
#: Voxels, of the Gaussians of the Laplacian: spots of a radius of √3 times that answer most.
SCALES = (1.0, 2.0, 3.0)
#: Wavelet by which a channel is parted into bands.
WAVELET = "coif1"
#: Eight bands, a letter an axis (z, y, x): "L" low and "H" high frequencies.
BANDS = tuple("".join(letters) for letters in product("LH", repeat=3))

_GRAY_LEVELS = 16  # of the co-occurrence matrices, over the range of a channel in its mask
_PAIR_MEASURES = ("contrast", "homogeneity", "correlation", "energy", "entropy")
_MOMENTS = ("mean", "std", "skewness", "kurtosis")


def texture_names(channel_names: Sequence[str]) -> tuple[str, ...]:
    """Names of the columns of `texture_features`, channel after channel."""
    of_channel = (
        *(f"spectrum_{shell:02}" for shell in range(NUM_SHELLS)),
        *(f"pairs_{distance}_{measure}" for distance in DISTANCES for measure in _PAIR_MEASURES),
        *(f"spots_{scale:g}_{moment}" for scale in SCALES for moment in _MOMENTS),
        *(f"wavelet_{band}_{measure}" for band in BANDS for measure in ("energy", "kurtosis")),
    )
    return tuple(f"{channel}_{name}" for channel in channel_names for name in of_channel)


def texture_features(volume: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Texture of each channel of a cell, inside a mask.

    Args:
        volume: (M, D, H, W) in [0, 1].
        masks: M of (D, H, W) bool, where each channel is looked at: the nucleus in the nucleus, all else in the cell.

    Returns:
        (K,) float64, as `texture_names`: decimal logarithms of the radial spectrum and of the energies of wavelet
        bands; the rest in units of its own. nan for a channel whose mask is empty.

    Raises:
        ValueError: if the masks do not fit the volume.
        ImportError: if SciPy, scikit-image or PyWavelets is missing.
    """
    if volume.ndim != 4 or len(masks) != len(volume):
        raise ValueError(f"Expected (M, D, H, W) and M masks, got {volume.shape} and {len(masks)}. Match both.")
    return np.concatenate([_texture(channel, mask) for channel, mask in zip(volume, masks, strict=True)])


def _texture(channel: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(K,) of one channel."""
    spectrum = radial_spectrum(channel[None], mask)[0]
    if not mask.any():
        return np.full(len(texture_names([""])), np.nan)
    box = bounding_box(mask, margin=8)  # 8: of filters
    channel, mask = channel[box].astype(np.float64), mask[box]
    return np.concatenate(
        [
            np.log10(np.maximum(spectrum, 1e-12)),
            *(pair_measures(channel, mask, distance) for distance in DISTANCES),
            _spots(channel, mask),
            _wavelets(channel, mask),
        ]
    )


def pair_measures(channel: np.ndarray, mask: np.ndarray, distance: int = 1) -> np.ndarray:
    """Measures of the grey-level co-occurrence matrix in three dimensions: of pairs of voxels in all 13 directions.

    Args:
        channel: (D, H, W).
        mask: (D, H, W) bool; both voxels of a pair lie in it.
        distance: along each axis in which the direction goes.

    Returns:
        (5,) contrast, homogeneity, correlation, energy and entropy in bits, in 16 grey levels over the channel's range
        in the mask; nan where no pair lies in it.

    Source: Haralick et al. 1973, as in scikit-image's `graycoprops`; that `graycomatrix` is of two dimensions.
    """
    inside = channel[mask]
    low, high = inside.min(), inside.max()
    levels = np.clip(((channel - low) / max(high - low, 1e-12) * _GRAY_LEVELS).astype(int), 0, _GRAY_LEVELS - 1)
    counts = np.zeros(_GRAY_LEVELS**2)
    for direction in DIRECTIONS:
        here, there = (_shifted(mask.shape, [sign * distance * step for step in direction]) for sign in (-1, 1))
        both = mask[here] & mask[there]
        counts += np.bincount(levels[here][both] * _GRAY_LEVELS + levels[there][both], minlength=_GRAY_LEVELS**2)
    matrix = counts.reshape(_GRAY_LEVELS, _GRAY_LEVELS)
    matrix = matrix + matrix.T
    if matrix.sum() == 0:
        return np.full(len(_PAIR_MEASURES), np.nan)
    graycoprops = optional("skimage.feature", "metrics").graycoprops
    values = [graycoprops(matrix[:, :, None, None], measure)[0, 0] for measure in _PAIR_MEASURES[:-1]]
    return np.array([*values, optional("scipy.stats", "metrics").entropy(matrix.ravel(), base=2)])


def _shifted(shape: tuple[int, ...], offset: Sequence[int]) -> tuple[slice, ...]:
    """Voxels that have a neighbour at minus this offset; for the opposite offset, these neighbours."""
    return tuple(slice(max(0, step), size + min(0, step)) for step, size in zip(offset, shape, strict=True))


def _spots(channel: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(12,) moments of the Laplacian of a Gaussian, normalised by its scale, in the mask, for each scale."""
    ndimage, stats = optional("scipy.ndimage", "metrics"), optional("scipy.stats", "metrics")
    responses = np.stack([scale**2 * ndimage.gaussian_laplace(channel, scale)[mask] for scale in SCALES])
    with np.errstate(invalid="ignore"):
        moments = (responses.mean(1), responses.std(1), stats.skew(responses, 1), stats.kurtosis(responses, 1))
    return np.stack(moments, 1).ravel()


def _wavelets(channel: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(16,) decimal logarithm of the mean square, and kurtosis, of each undecimated band, in the mask."""
    wavelets, stats = optional("pywt", "metrics"), optional("scipy.stats", "metrics")
    even = [(0, size % 2) for size in channel.shape]
    (bands,) = wavelets.swtn(np.pad(channel, even, mode="edge"), WAVELET, level=1)
    inside = tuple(map(slice, mask.shape))
    coefficients = np.stack([bands[band.replace("L", "a").replace("H", "d")][inside][mask] for band in BANDS])
    energies = np.log10(np.maximum(np.mean(coefficients**2, 1), 1e-12))
    return np.stack([energies, stats.kurtosis(coefficients, 1)], 1).ravel()
