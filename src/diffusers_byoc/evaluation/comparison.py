"""The comparison: every row of cells against the same held-out real cells, fold by fold."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from ..whole_files import whole_or_absent
from .features import Extractor, kept_path
from .folds import Fold
from .metric_table import Comparison, compute_metrics
from .sets import REAL, CellSet
from .settings import EvaluationSettings


Metrics = dict[str, float]


def compare_rows(
    sets: Sequence[CellSet],
    features: Mapping[str, Mapping[str, np.ndarray]],
    extractors: Mapping[str, Extractor],
    folds: Sequence[Fold],
    settings: EvaluationSettings,
    folder: Path,
) -> list[dict[str, Metrics]]:
    """All metrics of all rows, shared over the processes; the same in each.

    In a fold, every row has equally many cells: as many as there are real ones that are not held out, and generated
    ones. Those of the rows that are made of real cells are drawn from the ones that are not held out.

    Args:
        sets: generated cells and real ones.
        features: row -> kind -> (N, K), of `extract_features`.
        extractors: kind -> its extractor.
        folds: of the real cells.
        settings: of the evaluation.
        folder: for what the 3D network found.

    Returns:
        For each fold: row -> key -> value.

    Raises:
        ValueError: if real cells are copies of each other.
    """
    state = PartialState()
    pairs = [(number, cells, row) for number in range(len(folds)) for cells in sets for row in cells.rows]
    found = []
    for number, cells, row in pairs[state.process_index :: state.num_processes]:
        metrics = _compare_features(sets, cells, row, features, extractors, folds[number], settings)
        if settings.classifier_cells:
            metrics |= _compare_volumes(sets, cells, row, number, folds[number], settings, folder)
        found.append((number, row, metrics))
    values = {(number, row): metrics for number, row, metrics in gather_object(found)}
    return [{row: values[number, row] for cells in sets for row in cells.rows} for number in range(len(folds))]


def _compare_features(sets, cells: CellSet, row: str, features, extractors, fold: Fold, settings) -> Metrics:
    held_out, training = fold
    pool = training if _is_of_real(cells) else np.arange(cells.num_cells)
    num_cells = min(len(training), *(other.num_cells for other in sets))
    chosen = _generator(settings.seed, row, held_out[0]).choice(pool, num_cells, replace=False)
    labels, real_cells = None, next(other for other in sets if other.name == REAL)
    if cells.labels is not None and real_cells.labels is not None:
        labels = np.array(real_cells.labels)[held_out], np.array(cells.labels)[chosen]
    metrics = {}
    for kind, extractor in extractors.items():
        real = features[REAL][kind]
        comparison = Comparison(
            real=real[held_out],
            candidate=features[row][kind][chosen],
            training=real[training],
            names=extractor.names,
            is_real=row == REAL,
            settings=settings,
            labels=labels,
        )
        metrics |= compute_metrics(kind, comparison)
    return metrics


def _compare_volumes(sets, cells: CellSet, row: str, number: int, fold: Fold, settings, folder: Path) -> Metrics:
    """The metrics of the cells themselves, and what they found before for the same ones."""
    held_out, training = fold
    real = next(other for other in sets if other.name == REAL)
    pool = training if _is_of_real(cells) else np.arange(cells.num_cells)
    num_cells = min(settings.classifier_cells, len(held_out), len(training), *(other.num_cells for other in sets))
    volumes = real.volumes(_generator(settings.seed, REAL, number).choice(held_out, num_cells, replace=False))
    candidate = cells.volumes(_generator(settings.seed, row, number).choice(pool, num_cells, replace=False))
    identity = f"volumes {settings.seed}{cells.change_of(row)}"
    path = kept_path(folder, identity, volumes, candidate, suffix=".json")
    if not path.is_file():
        candidate = cells.changed(candidate, row)  # which may take longer than all else
        metrics = compute_metrics("volumes", Comparison(volumes, candidate, volumes, None, row == REAL, settings))
        with whole_or_absent(path) as temporary:
            temporary.write_text(json.dumps(metrics), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def _is_of_real(cells: CellSet) -> bool:
    return cells.name == REAL


def _generator(seed: int, row: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(row.encode()), number])
