"""What the cells of the page measure, beside phantoms of the same phenotype."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..data import PHENOTYPES, PhantomCells, VolumeProcessor
from ..metrics import MORPHOLOGY_NAMES, find_channels, measure_cells, morphology_features


NUM_PHANTOMS = 24
_PHANTOM_SEED = 20_000  # no pretrained pipeline was trained on it

#: Columns of `MORPHOLOGY_NAMES` that the page shows -> their titles.
SHOWN = {
    "cell_volume_um3": "cell volume, µm³",
    "cell_long_axis_um": "cell length, µm",
    "cell_sphericity": "cell sphericity",
    "cell_elongation": "cell elongation",
    "cell_solidity": "cell solidity",
    "nucleus_volume_um3": "nucleus volume, µm³",
    "nucleus_to_cell_ratio": "nucleus / cell volume",
    "nucleus_inside_share": "share of nucleus inside",
    "num_nuclei_inside": "nuclei inside",
}
_COLUMNS = [MORPHOLOGY_NAMES.index(name) for name in SHOWN]


def measure(
    volumes: np.ndarray, voxel_size_um: Sequence[float], channel_names: Sequence[str] = ("cell", "nucleus")
) -> np.ndarray:
    """The measurements of `SHOWN`.

    Args:
        volumes: (B, M, D, H, W) in [0, 1].
        voxel_size_um: (z, y, x).
        channel_names: M names.

    Returns:
        (B, len(SHOWN)), nan for what a cell does not have.
    """
    cell, nucleus = find_channels(channel_names)
    measured = measure_cells(volumes, voxel_size_um, cell_channel=cell, nucleus_channel=nucleus)
    return morphology_features(measured)[:, _COLUMNS]


@lru_cache
def measure_phantoms(phenotype: str) -> np.ndarray | None:
    """(NUM_PHANTOMS, len(SHOWN)) of phantoms of 64³ voxels of 1 µm; None for what is no phenotype of phantoms."""
    if phenotype not in PHENOTYPES:
        return None
    phantoms = PhantomCells(NUM_PHANTOMS, VolumeProcessor(64, voxel_size_um=1.0), [phenotype], seed=_PHANTOM_SEED)
    volumes = np.stack([phantoms[index]["volumes"].numpy() for index in range(NUM_PHANTOMS)]) / 2 + 0.5
    return measure(volumes, (1.0, 1.0, 1.0))


def table(measured: np.ndarray, chosen: int, phantoms: np.ndarray | None) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the chosen cell, all shown cells, phantoms.

    Args:
        measured: (B, len(SHOWN)).
        chosen: number of a cell.
        phantoms: (N, len(SHOWN)), or None for none.
    """
    headings = ["", f"cell {chosen + 1}", f"all {len(measured)} shown"]
    columns = [measured]
    if phantoms is not None:
        headings.append(f"{len(phantoms)} phantoms")
        columns.append(phantoms)
    rows = [
        [title, _number(measured[chosen, index]), *(_range(column[:, index]) for column in columns)]
        for index, title in enumerate(SHOWN.values())
    ]
    return headings, rows


def distributions(measured: np.ndarray, phantoms: np.ndarray | None) -> dict[str, dict[str, np.ndarray]]:
    """Set -> title -> one value a cell, as `feature_distributions` takes them, of what all sets have."""
    sets = {"shown": measured} | ({} if phantoms is None else {"phantoms": phantoms})
    is_known = np.all([np.isfinite(values).any(axis=0) for values in sets.values()], axis=0)
    known = [(index, title) for index, title in enumerate(SHOWN.values()) if is_known[index]]
    return {name: {title: values[:, index] for index, title in known} for name, values in sets.items()}


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _range(values: np.ndarray) -> str:
    """Median and, in brackets, the fifth and the 95th percentile."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return "–"
    low, median, high = (_number(value) for value in np.percentile(values, (5, 50, 95)))
    return f"{median} ({low} to {high})"
