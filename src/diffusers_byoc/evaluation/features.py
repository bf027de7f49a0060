"""Volumes to features: the kinds of features, and the pass over a set that reads each of its cells once."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .. import __version__
from ..metrics import (
    MORPHOLOGY_NAMES,
    find_channels,
    grid_excess,
    measure_cells,
    morphology_features,
    segment_channel,
    texture_features,
    texture_names,
)
from ..whole_files import whole_or_absent
from .sets import CellSet
from .settings import EvaluationSettings


CHUNK = 16  # cells that are read, and whose features are kept, together
VOXEL_GRID = 16  # edge of the averaged volumes in which memorisation looks for copies


@dataclass(frozen=True)
class Extractor:
    """One kind of features.

    Args:
        identity: name and all settings, under which features are kept.
        extract: (B, M, D, H, W) in [0, 1] -> (B, K).
        names: K names, where each feature is a measurement of its own, in its own unit, nan for what a cell does not
            have. Such features are compared one by one, too, and together in standard deviations of real cells.
    """

    identity: str
    extract: Callable[[np.ndarray], np.ndarray]
    names: tuple[str, ...] | None = None


def voxels(settings: EvaluationSettings) -> Extractor:
    """The volumes themselves, coarse enough to forgive small shifts."""

    def extract(volumes: np.ndarray) -> np.ndarray:
        return torch.nn.functional.adaptive_avg_pool3d(torch.from_numpy(volumes), VOXEL_GRID).flatten(1).numpy()

    return Extractor(f"voxels {VOXEL_GRID}", extract)


def morphology(settings: EvaluationSettings) -> Extractor:
    """Size, shape, brightness and soundness of cell and nucleus."""
    thresholds, channels = (settings.cell_threshold, None), find_channels(settings.channel_names)

    def extract(volumes: np.ndarray) -> np.ndarray:
        return morphology_features(measure_cells(volumes, settings.voxel_size_um, thresholds, *channels))

    identity = f"morphology {MORPHOLOGY_NAMES} {settings.voxel_size_um} {thresholds} {channels}"
    return Extractor(identity, extract, MORPHOLOGY_NAMES)


def texture(settings: EvaluationSettings) -> Extractor:
    """Spectrum, co-occurrence, spots, wavelets of each channel, the nucleus in the nucleus, all else in the cell."""
    cell, nucleus = find_channels(settings.channel_names)

    def extract(volumes: np.ndarray) -> np.ndarray:
        features = []
        for volume in volumes:
            masks = [segment_channel(volume[cell], settings.cell_threshold).mask] * len(volume)
            if nucleus is not None:
                masks[nucleus] = segment_channel(volume[nucleus]).mask
            features.append(texture_features(volume, masks))
        return np.stack(features)

    names = texture_names(settings.channel_names)
    return Extractor(f"texture {names} {cell} {nucleus} {settings.cell_threshold}", extract, names)


def grid(settings: EvaluationSettings) -> Extractor:
    """Power at the frequencies of grids, stripes and chequers inside the cell."""
    cell, _ = find_channels(settings.channel_names)

    def extract(volumes: np.ndarray) -> np.ndarray:
        masks = [segment_channel(volume[cell], settings.cell_threshold).mask for volume in volumes]
        return np.stack([grid_excess(v, mask).ravel() for v, mask in zip(volumes, masks, strict=True)])

    return Extractor(f"grid {cell} {settings.cell_threshold}", extract)


def med3d(settings: EvaluationSettings) -> Extractor:
    """Features of the network that the paper's FID rests on."""
    from ..metrics import load_med3d  # an extra, which the other features do without

    model = load_med3d(settings.med3d)
    # summed on the CPU: not every device has float64, and each would round another way
    weights = torch.stack([weight.double().sum() for weight in model.state_dict().values()]).tolist()
    model.to(settings.device, memory_format=torch.channels_last_3d)

    @torch.no_grad()
    def extract(volumes: np.ndarray) -> np.ndarray:
        batches = torch.from_numpy(volumes).to(settings.device).split(8)
        return torch.cat([model(batch).features.cpu() for batch in batches]).numpy()

    return Extractor(f"med3d {model.config.to_json_string()} {weights}", extract)


#: Kind of features -> what makes its extractor.
FEATURES = {"med3d": med3d, "morphology": morphology, "texture": texture, "grid": grid, "voxels": voxels}


def extract_features(
    cells: CellSet, extractors: Mapping[str, Extractor], folder: Path
) -> dict[str, dict[str, np.ndarray]]:
    """Features of all rows that a set makes, shared over the processes; the same arrays in each.

    Every cell is read once, and changed once for each row. Features are kept under a digest of the volumes, of what
    was done to them and of the extractor: what was computed is never computed again, and never taken for another's.

    Args:
        cells: the set.
        extractors: kind -> its extractor.
        folder: for the kept features.

    Returns:
        Row -> kind -> (N, K) features, in the order of the cells.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    mine = _chunks(cells)[state.process_index :: state.num_processes]
    found = []
    for indices in tqdm(mine, f"Measuring {cells.name} cells", disable=not state.is_local_main_process):
        found.append((indices, _features_of_chunk(cells, cells.volumes(indices), extractors, folder)))
    found = gather_object(found)
    order = np.argsort(np.concatenate([indices for indices, _ in found]))
    return {
        row: {kind: np.concatenate([chunk[row][kind] for _, chunk in found])[order] for kind in extractors}
        for row in cells.rows
    }


def kept_path(folder: Path, identity: str, *volumes: np.ndarray, suffix: str = ".npy") -> Path:
    """Where what was computed of these volumes is kept; `identity` says what that is, with all settings."""
    digest = hashlib.blake2b(f"{__version__} {identity}".encode(), digest_size=16)
    for array in volumes:
        digest.update(np.ascontiguousarray(array))
    return folder / f"{digest.hexdigest()}{suffix}"


def _chunks(cells: CellSet) -> list[np.ndarray]:
    """Indices of cells that are read together.

    Cells that follow each other, often of one image, are kept apart: a row may lend channels from cell to cell.
    """
    num_chunks = -(-cells.num_cells // CHUNK)
    return [np.arange(start, cells.num_cells, num_chunks) for start in range(num_chunks)]


def _features_of_chunk(
    cells: CellSet, volumes: np.ndarray, extractors: Mapping[str, Extractor], folder: Path
) -> dict[str, dict[str, np.ndarray]]:
    """Row -> kind -> (B, K)."""
    features = {}
    for row in cells.rows:
        paths = {kind: kept_path(folder, e.identity + cells.change_of(row), volumes) for kind, e in extractors.items()}
        missing = [kind for kind, path in paths.items() if not path.is_file()]
        if missing:
            changed = cells.changed(volumes, row)
        for kind in missing:
            with whole_or_absent(paths[kind]) as temporary:
                np.save(temporary, extractors[kind].extract(changed))
        features[row] = {kind: np.load(path, allow_pickle=False) for kind, path in paths.items()}
    return features
