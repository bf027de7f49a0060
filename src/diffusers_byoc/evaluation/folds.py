"""Which real cells are held out: all rows of a table are compared with the same ones."""

import os
from pathlib import Path

import numpy as np

from ..data import CellDataset, read_split, split_cells, write_split


MIN_CELLS = 10  # generated, and on either side of a split

Fold = tuple[np.ndarray, np.ndarray]  # indices of the held-out cells, and of the others


def make_folds(
    cells: CellDataset,
    folder: Path | None = None,
    num_folds: int = 5,
    fold: int | None = None,
    seed: int = 0,
    split_file: str | os.PathLike | None = None,
    min_cells: int = MIN_CELLS,
) -> list[Fold]:
    """The folds of a cross-validation, or one split.

    Args:
        cells: the real cells.
        folder: for ``split_0.json`` and so on, for training, or for another model's evaluation; None to keep none.
        num_folds: parts of the cells, each held out once.
        fold: only this one of them.
        seed: of the parting.
        split_file: one split in place of folds, as a run has left it.
        min_cells: on either side of a split.

    Returns:
        The folds.

    Raises:
        ValueError: if a side of a split has fewer cells, or the split is one of other cells.
        OSError: if there is no such file.
    """
    if split_file is not None:
        splits = [read_split(split_file, cells.population)]
    else:
        numbers = range(num_folds) if fold is None else [fold]
        splits = [split_cells(cells.population, num_folds=num_folds, fold=number, seed=seed) for number in numbers]
    folds = []
    for split in splits:
        is_held_out = np.isin(cells.ids, split.held_out)
        folds.append((np.flatnonzero(is_held_out), np.flatnonzero(~is_held_out)))
        smallest = min(map(len, folds[-1]))
        if smallest < min_cells:
            raise ValueError(
                f"Expected at least {min_cells} real cells on each side of a split, got {smallest} of {len(cells)}."
                " Give more cells, or fewer folds."
            )
    if folder is not None:
        for number, split in enumerate(splits):
            write_split(folder / f"split_{number}.json", split)
    return folds
