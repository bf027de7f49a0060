"""A phantom cell from its phenotype and a seed."""

import math
from dataclasses import dataclass

import numpy as np

from .image import CAMERA_OFFSET, draw_densities, draw_mitochondria, photograph
from .measurement import PhantomTruth, measure
from .shape import MARGIN_VOXELS, RECIPES, distances, draw_geometry, fit, recipe_at


PHENOTYPES = tuple(RECIPES)

MIN_SIZE = 32  # voxels; below, a spindly cell is all protrusion, for those keep a width of 1.8 voxels
MAX_VOXEL_SIZE_UM = 3.0  # a nucleus is then still about four voxels wide
MIN_FIELD_UM = 30.0  # a narrower field would shrink a typical cell below half its size


@dataclass(frozen=True)
class Phantom:
    """One phantom cell, cropped to its bounding box and a small margin.

    Attributes:
        volume: (M, d, h, w) uint16 camera counts; channel 0 the cell body, channel 1 the nucleus, channel 2, if
            asked for, the mitochondria.
        masks: (M, d, h, w) bool, the true cell (nucleus included), nucleus and mitochondria.
        phenotype: one of `PHENOTYPES`.
        seed: the seed it was made from.
        voxel_size_um: edge of its cubic voxels.
        truth: what the masks measure.
        dose: it was made with, µM; None for the full effect.
    """

    volume: np.ndarray
    masks: np.ndarray
    phenotype: str
    seed: int
    voxel_size_um: float
    truth: PhantomTruth
    dose: float | None = None


def _check(phenotype: str, seed: int, max_size: int, voxel_size_um: float, dose: float | None) -> None:
    if phenotype not in RECIPES:
        raise ValueError(f"Expected `phenotype` {', '.join(PHENOTYPES)}, got {phenotype!r}. Choose one.")
    if seed < 0:
        raise ValueError(f"Expected `seed` of at least 0, got {seed}. Number the cells of a set from 0.")
    if dose is not None and not 0 <= dose < math.inf:
        raise ValueError(f"Expected `dose` of at least 0 µM, got {dose}. Correct it, or leave it out.")
    if max_size < MIN_SIZE:
        raise ValueError(f"Expected `max_size` of at least {MIN_SIZE} voxels, got {max_size}. Raise it.")
    if not 0 < voxel_size_um <= MAX_VOXEL_SIZE_UM:
        raise ValueError(
            f"Expected `voxel_size_um` in (0, {MAX_VOXEL_SIZE_UM:g}], got {voxel_size_um}. Coarser voxels lose the"
            " nucleus: take finer ones."
        )
    if max_size * voxel_size_um < MIN_FIELD_UM:
        raise ValueError(
            f"Expected `max_size` * `voxel_size_um` of at least {MIN_FIELD_UM:g} µm, the room a cell needs, got"
            f" {max_size} * {voxel_size_um} = {max_size * voxel_size_um:g}. Raise max_size to"
            f" {math.ceil(MIN_FIELD_UM / voxel_size_um)} or take larger voxels."
        )


def make_phantom(
    phenotype: str,
    seed: int,
    *,
    max_size: int = 64,
    voxel_size_um: float = 1.0,
    mask_background: bool = True,
    dose: float | None = None,
    num_channels: int = 2,
) -> Phantom:
    """One phantom cell, the same for the same arguments.

    The random streams come from `SeedSequence([index of the phenotype in PHENOTYPES, seed])`, one each for shape,
    texture, camera and mitochondria. The shape therefore stays the same cell at another voxel size, and a set of cells
    needs only distinct seeds. Voxels are reproducible under one release of NumPy and SciPy; NumPy may change its
    streams.

    Args:
        phenotype: one of `PHENOTYPES`.
        seed: 0 or more.
        max_size: greatest length of the crop along any axis, voxels. A cell that would not fit is drawn smaller, and
            its truth is that of the smaller cell. Protrusions are never thinner than 1.8 voxels.
        voxel_size_um: edge of the cubic voxels, µm. `max_size=32` with 2.0 and `max_size=128` with 0.5 show the same
            field as the defaults.
        mask_background: True, as data sets of segmented single cells come: the camera's offset is subtracted and
            voxels further than 1.5 voxels outside the cell are 0. False keeps the raw counts, offset and background
            included.
        dose: of the drug, µM, at least 0; None for its full effect. Of the share h = dose / (dose + `EC50_UM`) of the
            effect (Hill's law), every number and range of the recipe is (1 - h) times that of an untreated cell plus h
            times that of the phenotype, and each protrusion exists with probability h. So the median of the body's
            volume is linear in h, and so is the mean number of protrusions. An untreated cell (dose 0) is the same
            for all phenotypes; the same seed at another dose is the same cell under another dose, but for its
            protrusions.
        num_channels: 2, or 3 for mitochondria beside cell and nucleus, which stay the same. A voxel of the cytoplasm
            at δ µm from the nucleus is in a mitochondrion with probability 0.3 exp(-δ / 5 µm).

    Returns:
        The phantom: (num_channels, d, h, w) uint16 volume with d, h, w <= max_size, true masks and true measurements.
        Cell and nucleus are one connected piece each, the nucleus inside the cell at 0.15 to 0.45 of its volume.

    Raises:
        ValueError: if the phenotype is unknown, the seed or the dose negative, the channels are others, or the sizes
            leave no room for a cell.
    """
    _check(phenotype, seed, max_size, voxel_size_um, dose)
    if num_channels not in (2, 3):
        raise ValueError(
            f"Expected `num_channels` 2 or 3, as phantoms have, got {num_channels}. Set it to one of these."
        )
    streams = np.random.SeedSequence([PHENOTYPES.index(phenotype), seed]).spawn(4)
    shape_rng, texture_rng, camera_rng, mitochondria_rng = (np.random.default_rng(stream) for stream in streams)

    # 1. shape, and the crop around it
    geometry = fit(draw_geometry(recipe_at(phenotype, dose), shape_rng), max_size, voxel_size_um)
    low, high = geometry.bounds()
    sizes = np.ceil((high - low) / voxel_size_um).astype(int) + 2 * MARGIN_VOXELS
    grid = [
        (center + (np.arange(size) - (size - 1) / 2) * voxel_size_um).astype(np.float32)
        for center, size in zip((low + high) / 2, sizes, strict=True)
    ]
    cell, nucleus = distances(geometry, grid, voxel_size_um)
    masks = np.stack([cell < 0, nucleus < 0])

    # 2. image
    densities = draw_densities(cell, nucleus, voxel_size_um, texture_rng)
    if num_channels == 3:
        mitochondria, mask = draw_mitochondria(cell, nucleus, voxel_size_um, mitochondria_rng)
        densities, masks = np.stack([*densities, mitochondria]), np.stack([*masks, mask])
    counts = np.rint(photograph(densities, voxel_size_um, camera_rng))
    if mask_background:
        counts = (counts - CAMERA_OFFSET) * (cell < 1.5 * voxel_size_um)
    volume = np.clip(counts, 0, np.iinfo(np.uint16).max).astype(np.uint16)

    truth = measure(masks, voxel_size_um, geometry.num_protrusions)
    return Phantom(volume, masks, phenotype, seed, voxel_size_um, truth, dose)
