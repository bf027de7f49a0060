"""The image of a phantom cell: fluorophores in its shape, seen through a microscope by a camera."""

import math

import numpy as np

from ...optional import optional


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], spacing: float) -> np.ndarray:
    """(d, h, w) float32 field of unit variance whose finest detail is `spacing` voxels: a random cubic B-spline."""
    bases = []
    for size in shape:
        knots = np.arange(-1, size / spacing + 2, dtype=np.float32)
        away = np.abs(np.arange(size, dtype=np.float32)[:, None] / np.float32(spacing) - knots)
        basis = np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, np.maximum(2 - away, 0) ** 3 / 6)
        bases.append(basis / np.sqrt((basis**2).sum(axis=1, keepdims=True)))
    field = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    for basis in bases:
        field = np.tensordot(field, basis.astype(np.float32), axes=(0, 1))  # the contracted axis comes back last
    return field


def _blobs(shape: tuple[int, ...], centers: np.ndarray, radii: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """(d, h, w) float32 sum of Gaussian blobs; centres and radii in voxels."""
    field = np.zeros(shape, dtype=np.float32)
    for center, radius, height in zip(centers, radii, heights, strict=True):
        box, profile = [], []
        for size, c in zip(shape, center, strict=True):
            low, high = max(0, int(c - 3 * radius)), min(size, int(c + 3 * radius) + 2)
            box.append(slice(low, high))
            profile.append(np.exp(-((np.arange(low, high) - c) ** 2) / (2 * radius**2)).astype(np.float32))
        field[tuple(box)] += height * profile[0][:, None, None] * profile[1][:, None] * profile[2]
    return field


def draw_densities(
    cell: np.ndarray, nucleus: np.ndarray, voxel_size_um: float, rng: np.random.Generator
) -> np.ndarray:
    """(2, d, h, w) float32 fluorophore density, about 1 in the cytoplasm and in euchromatin."""
    shape = cell.shape
    in_cell = np.clip(0.5 - cell / voxel_size_um, 0, 1)  # the covered part of a voxel: no staircase at the surface
    in_nucleus = np.clip(0.5 - nucleus / voxel_size_um, 0, 1)
    coarse, fine = (_smooth_noise(rng, shape, max(1.0, um / voxel_size_um)) for um in (4.0, 1.3))

    # 1. cytoplasm, brighter in the cortex, displaced by the nucleus
    cortex = np.exp(-((cell + np.float32(0.9)) ** 2) / np.float32(2 * 0.8**2))
    cytoplasm = 1 + 0.15 * coarse + 0.13 * fine + 0.26 * cortex
    body = in_cell * np.maximum(cytoplasm, 0.35) * (1 - rng.uniform(0.25, 0.40) * in_nucleus)

    # 2. chromatin: texture, a denser rim, bright foci, dark nucleoli
    inside = np.argwhere(nucleus < -1.2 * min(1.0, -float(nucleus.min()) / 3))
    num_foci, num_nucleoli = int(rng.integers(5, 12)), int(rng.integers(1, 4))
    sites = inside[rng.integers(len(inside), size=num_foci + num_nucleoli)].astype(float)
    foci_radii = rng.uniform(0.6, 1.1, num_foci) / voxel_size_um
    nucleoli_radii = rng.uniform(1.0, 1.7, num_nucleoli) / voxel_size_um
    foci = _blobs(shape, sites[:num_foci], foci_radii, rng.uniform(0.25, 0.6, num_foci))
    nucleoli = _blobs(shape, sites[num_foci:], nucleoli_radii, rng.uniform(0.45, 0.7, num_nucleoli))
    coarse, fine = (_smooth_noise(rng, shape, max(1.0, um / voxel_size_um)) for um in (2.6, 1.1))
    rim = np.exp(-((nucleus + np.float32(0.7)) ** 2) / np.float32(2 * 0.6**2))
    chromatin = 1 + 0.13 * coarse + 0.09 * fine + 0.12 * rim + foci
    chromatin = np.maximum(chromatin, 0.4) * np.maximum(1 - nucleoli, 0.25)
    return np.stack([body, in_nucleus * chromatin + 0.03 * in_cell])  # a little free dye in the cytoplasm


_MITOCHONDRIA_SHARE = 0.3  # of the cytoplasm at the nucleus
_MITOCHONDRIA_REACH_UM = 5.0  # over which that share falls to 1/e
_MITOCHONDRIA_SPACING_UM = 2.5
_MITOCHONDRIA_EDGE = 0.6


def draw_mitochondria(
    cell: np.ndarray, nucleus: np.ndarray, voxel_size_um: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(d, h, w) float32 fluorophore density of the mitochondria and their bool mask: tubes around the nucleus.

    A tube is where two independent fields of unit variance are both near zero. The sum of their squares is below
    -2 ln(1 - p) with probability p, which falls with the distance from the nucleus as `make_phantom` says.
    """
    spacing = max(1.0, _MITOCHONDRIA_SPACING_UM / voxel_size_um)
    squares = sum(_smooth_noise(rng, cell.shape, spacing) ** 2 for _ in range(2))
    share = _MITOCHONDRIA_SHARE * np.exp(-np.maximum(nucleus, 0) / _MITOCHONDRIA_REACH_UM)
    excess = -2 * np.log1p(-share) - squares
    in_cell, in_nucleus = (np.clip(0.5 - distance / voxel_size_um, 0, 1) for distance in (cell, nucleus))
    tubes = in_cell * (1 - in_nucleus) * np.clip(0.5 + excess / _MITOCHONDRIA_EDGE, 0, 1)
    return (tubes + 0.03 * in_cell).astype(np.float32), (excess > 0) & (cell < 0) & (nucleus >= 0)


_PSF_AXIAL_UM = 0.85  # standard deviations
_PSF_LATERAL_UM = 0.40
_PHOTONS = 260.0  # median at density 1
_PHOTONS_SPREAD = 0.25
_BACKGROUND = 0.03  # medium and out-of-focus light, of density 1
_READ_NOISE = 1.6  # electrons
_COUNTS_PER_ELECTRON = 2.2
CAMERA_OFFSET = 100.0  # counts


def photograph(densities: np.ndarray, voxel_size_um: float, rng: np.random.Generator) -> np.ndarray:
    """(M, d, h, w) float camera counts with their offset, of as many densities: blur, photon noise, read noise."""
    sigma = np.array([_PSF_AXIAL_UM, _PSF_LATERAL_UM, _PSF_LATERAL_UM]) / voxel_size_um
    counts = np.empty(densities.shape, dtype=np.float32)
    ndimage = optional("scipy.ndimage", "data")
    for channel, density in enumerate(densities):
        blurred = ndimage.gaussian_filter(density, sigma, mode="constant", truncate=3.0)
        brightness = _PHOTONS * math.exp(_PHOTONS_SPREAD * float(np.clip(rng.normal(), -2.5, 2.5)))
        electrons = rng.poisson(brightness * (blurred + _BACKGROUND)).astype(np.float32)
        electrons += _READ_NOISE * rng.standard_normal(density.shape, dtype=np.float32)
        counts[channel] = CAMERA_OFFSET + _COUNTS_PER_ELECTRON * electrons
    return counts
