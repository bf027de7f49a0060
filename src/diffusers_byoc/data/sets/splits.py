"""Which cells a model trains on and which are held out: by whole source images, so that none is on both sides."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ...whole_files import whole_or_absent


@dataclass(frozen=True)
class Population:
    """All cells of a data set, one entry each, without their voxels.

    Args:
        ids: what tells the cells apart, the same wherever the data set lies: a file's name, a row's number.
        labels: names of their classes.
        groups: cells of one group (source image, plate, donor) are never separated by a split.
        conditions: name -> (N, length) float64, numbers that a model can be trained on beside the label (a dose, a
            time; an embedding, of more than one), in their own units.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)

    @property
    def fingerprint(self) -> str:
        """Changes with the cells and their labels, not with their order."""
        lines = sorted(f"{json.dumps(pair)}\n" for pair in zip(self.ids, self.labels, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Cells to train on and cells held out, and how they were chosen; see `split_cells`."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    held_out_share: float
    num_folds: int | None
    fold: int | None
    seed: int
    fingerprint: str


def split_cells(
    population: Population,
    held_out_share: float = 0.2,
    num_folds: int | None = None,
    fold: int | None = None,
    seed: int = 0,
) -> Split:
    """Hold out whole groups of cells, of every label as near to its share as the groups allow.

    The groups, the largest first and equals in an order that `seed` shuffles, go one after the other to the side (or
    fold) where the numbers of cells of every label then are nearest to what they should be. With one cell a group the
    shares are exact to a cell of each label. The order of the cells makes no difference.

    Args:
        population: all cells.
        held_out_share: in [0, 1); 0 holds out nothing. Not used with `num_folds`.
        num_folds: cut into this many equal folds, at least 2; every cell is held out in exactly one of them.
        fold: which fold is held out, in [0, num_folds).
        seed: 0 or more.

    Raises:
        ValueError: if an argument is out of range, or there are fewer groups than sides.
    """
    if num_folds is None:
        if fold is not None:
            raise ValueError(f"Expected `num_folds` with `fold` {fold}, got none. Give both.")
        if not 0 <= held_out_share < 1:
            raise ValueError(f"Expected `held_out_share` in [0, 1), got {held_out_share}. Correct it.")
        shares, held_out_part = [held_out_share, 1 - held_out_share], 0
    else:
        if num_folds < 2:
            raise ValueError(f"Expected `num_folds` of at least 2, got {num_folds}. Raise it.")
        if fold is None or not 0 <= fold < num_folds:
            raise ValueError(f"Expected `fold` among 0 to {num_folds - 1}, got {fold}. Give both, or none of them.")
        held_out_share, shares, held_out_part = 1 / num_folds, [1 / num_folds] * num_folds, fold
    if seed < 0:
        raise ValueError(f"Expected `seed` of at least 0, got {seed}. Raise it.")

    if held_out_share:
        parts = _deal_groups(population, np.array(shares), seed)
        is_held_out = parts == held_out_part
    else:
        is_held_out = np.zeros(len(population.ids), bool)
    ids = np.array(population.ids, object)
    return Split(
        train=tuple(sorted(ids[~is_held_out])),
        held_out=tuple(sorted(ids[is_held_out])),
        held_out_share=held_out_share,
        num_folds=num_folds,
        fold=fold,
        seed=seed,
        fingerprint=population.fingerprint,
    )


def write_split(path: str | os.PathLike, split: Split) -> None:
    """Write `split` as JSON; the file appears whole or not at all."""
    with whole_or_absent(path) as temporary:
        temporary.write_text(json.dumps(asdict(split), indent=1), encoding="utf-8")


def read_split(path: str | os.PathLike, population: Population) -> Split:
    """The split in a file, for the data set that it was made for.

    Raises:
        ValueError: if the file is no split, or `population` is not the one that was split.
        OSError: if the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        split = Split(**content | {name: tuple(content[name]) for name in ("train", "held_out")})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"Expected a split file, got {path}, which is none ({error}). Give the split.json of a training run."
        ) from error
    existing, known = set(population.ids), {*split.train, *split.held_out}
    if split.fingerprint != population.fingerprint or known != existing or len(known) != len(population.ids):
        examples = sorted(existing ^ known)[:3] or "none, but other labels"
        raise ValueError(
            f"Expected the {len(known)} cells for which {path} was made, got {len(existing)} others (differing:"
            f" {examples}). Give the data set of that run, with its columns, or split anew."
        )
    return split


def _deal_groups(population: Population, shares: np.ndarray, seed: int) -> np.ndarray:
    """(N,) part of every cell; parts get `shares` of every label, as nearly as whole groups can."""
    _, label_of = np.unique(np.array(population.labels, object), return_inverse=True)
    names, group_of = np.unique(np.array(population.groups, object), return_inverse=True)
    if len(names) < len(shares):
        raise ValueError(
            f"Expected at least {len(shares)} groups of cells to split, got {len(names)} ({', '.join(names)}). Group"
            " by another column, or hold out nothing."
        )
    counts = np.zeros((len(names), label_of.max() + 1))  # cells of each group and label
    np.add.at(counts, (group_of, label_of), 1)
    excess = -np.outer(shares, counts.sum(0))  # of each part and label: cells it has more than it should
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    part_of = np.empty(len(names), int)
    for group in order:
        # squared excess after adding the group, less that before: what is common to all parts left out
        part_of[group] = np.argmin((excess * counts[group]).sum(1))
        excess[part_of[group]] += counts[group]
    for empty in set(range(len(shares))) - set(part_of):
        largest = np.bincount(part_of, minlength=len(shares)).argmax()
        part_of[[group for group in order if part_of[group] == largest][-1]] = empty
    return part_of[group_of]
