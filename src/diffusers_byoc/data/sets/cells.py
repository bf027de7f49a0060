"""Data sets of single cells, as a training loop, an evaluation and a baseline all see them."""

import copy
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..formats.volume import Volume
from ..processor import PreprocessingRecord, VolumeProcessor
from .batches import StepBatches
from .splits import Population


ONLY_CLASS = "cell"  # the class of cells that have no label


class Cells(Protocol):
    """What training, evaluation and baselines ask of cells, wherever these come from.

    Attributes:
        processor: made raw crops into network input.
        population: all cells of the source, also those that were not kept; what a split is made of.
        class_names: names of the classes; a class label is an index into it.
        labels: class label of every cell.
        ids: what tells the cells apart, see `Population`.
        conditions: name -> (N, length) numbers of every cell, see `Population`.
        voxel_size_um: (z, y, x) edge of a voxel of the preprocessed cells in µm where all agree, otherwise None.
        is_indexable: cells can be read in any order, ``cells[index]``; otherwise they can be iterated over.
        is_phantom: they are drawn by a formula, not seen through a microscope.
    """

    processor: VolumeProcessor
    population: Population
    class_names: list[str]
    labels: list[int]
    ids: list[str]
    conditions: dict[str, np.ndarray]
    voxel_size_um: tuple[float, float, float] | None
    is_indexable: bool
    is_phantom: bool

    def __len__(self) -> int: ...

    def subset(self, ids: Iterable[str]) -> "Cells":
        """The cells among `ids`; classes are shared. Other ids are ignored."""

    def with_classes(self, class_names: Sequence[str], indices: Sequence[int]) -> "Cells":
        """The same cells in other classes: those of class i, as it was, in class ``indices[i]`` of `class_names`."""

    def loader(
        self,
        batch_size: int,
        first_batch: int,
        num_batches: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        buffer_size: int = 1000,
        **options,
    ) -> DataLoader:
        """One process's batches of an endless run of shuffled epochs.

        Args:
            batch_size: cells of a batch of one process.
            first_batch: where to begin; what follows is what an unbroken run would have had.
            num_batches: how many batches.
            seed: of the shuffling.
            process_index: of this process.
            num_processes: taking part.
            buffer_size: cells that a process draws from, if they cannot be read in any order.
            options: of the DataLoader: `num_workers`, `worker_init_fn`.
        """

    def indexable(self, num_cells: int, seed: int) -> Sequence[dict[str, Tensor]]:
        """Cells that can be read in any order: all, or of a stream up to `num_cells` random ones, in memory."""


class CellDataset(Dataset):
    """`Cells` that can be read in any order; `CellFolder`, `CellTable` and `PhantomCells` say where they come from.

    An item is ``{"volumes": (M, S, S, S) float32 in [-1, 1], "class_labels": () int64}``, and of cells with conditions
    also ``"conditions": name -> (length,) float64``.

    A subclass may call `_prepare` at the end of its constructor: it reads and preprocesses every cell once, so that a
    bad one is found before training and not hours into it, by several processes if it is told to, and keeps as many of
    them in memory as `cache_gb` allows. The others are read again at each access. Worker processes share the memory;
    each process of a distributed run has its own.

    Args:
        processor: makes raw crops into network input.
        population: all cells of the source.
        label: keep only the cells of this label, or of these.
        source: how an error message names the source.
        class_names: all classes, where the source has classes without cells; None for those of the cells kept.

    Attributes:
        processor, population, class_names, labels, ids, conditions, voxel_size_um, is_indexable, is_phantom: see
            `Cells`.
    """

    is_indexable, is_phantom = True, False

    def __init__(
        self,
        processor: VolumeProcessor,
        population: Population,
        label: str | Sequence[str] | None,
        source: str,
        class_names: Sequence[str] | None = None,
    ):
        self.processor, self.population, self.source = processor, population, source
        self._rows, names = keep_labels(population, label, source)
        self.class_names = list(class_names or sorted(set(names)))
        self.labels = [self.class_names.index(name) for name in names]
        self.voxel_size_um: tuple[float, float, float] | None = None
        self._cache: dict[int, Tensor] = {}

    @property
    def ids(self) -> list[str]:
        return [self.population.ids[row] for row in self._rows]

    @property
    def conditions(self) -> dict[str, np.ndarray]:
        return {name: values[self._rows] for name, values in self.population.conditions.items()}

    def subset(self, ids: Iterable[str]) -> "CellDataset":
        """The cells among `ids`, in this data set's order; classes and memory are shared. Other ids are ignored."""
        wanted = set(ids)
        kept = [index for index, row in enumerate(self._rows) if self.population.ids[row] in wanted]
        subset = copy.copy(self)
        subset._rows = [self._rows[index] for index in kept]
        subset.labels = [self.labels[index] for index in kept]
        return subset

    def with_classes(self, class_names: Sequence[str], indices: Sequence[int]) -> "CellDataset":
        """See `Cells.with_classes`; memory is shared."""
        same = copy.copy(self)
        same.class_names, same.labels = list(class_names), [indices[label] for label in self.labels]
        return same

    def loader(
        self,
        batch_size: int,
        first_batch: int,
        num_batches: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        buffer_size: int = 1000,
        **options,
    ) -> DataLoader:
        """See `Cells.loader`; the batches are those of `StepBatches`."""
        batches = StepBatches(len(self), batch_size, first_batch, num_batches, seed, process_index, num_processes)
        return DataLoader(self, batch_sampler=batches, **options)

    def indexable(self, num_cells: int, seed: int) -> "CellDataset":
        """All cells; nothing is read."""
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[range(len(self))[index]]
        if row in self._cache:
            # a copy, because an augmentation in place would otherwise change the cell for good
            volume = self._cache[row].clone()
        else:
            volume = self._preprocess(self._read(row), row)[0]
        return {"volumes": volume, "class_labels": torch.tensor(self.labels[index])} | conditions_item(
            self.population, row
        )

    def _read(self, row: int) -> Volume:
        """The raw crop of one cell of the population."""
        raise NotImplementedError

    def _where(self, row: int) -> str:
        """How an error message names the cell."""
        raise NotImplementedError

    def _preprocess(self, volume: Volume, row: int) -> tuple[Tensor, PreprocessingRecord]:
        return preprocess(volume, self.processor, self._where(row))

    def _prepare(self, cache_gb: float, description: str, num_workers: int = 0) -> None:
        if not cache_gb >= 0:
            raise ValueError(f"Expected `cache_gb` of at least 0, got {cache_gb}. Raise it.")
        config = self.processor.config
        shape = (config.num_channels, *(config.sample_size,) * 3)
        num_cached = min(len(self), int(cache_gb * 1e9 / (4 * np.prod(shape))))
        cache = torch.empty(num_cached, *shape)
        voxel_sizes = set()
        loader = DataLoader(_Preprocessed(self), batch_size=None, num_workers=num_workers, collate_fn=_unchanged)
        for index, preprocessed in enumerate(logging.tqdm(loader, desc=description, unit="cell")):
            if isinstance(preprocessed, Exception):
                raise preprocessed
            volume, voxel_size_um = preprocessed
            voxel_sizes.add(voxel_size_um)
            if index < num_cached:
                cache[index] = volume
        self._cache = dict(zip(self._rows, cache, strict=False))
        self.voxel_size_um = voxel_sizes.pop() if len(voxel_sizes) == 1 else None


def _unchanged(item):
    return item


class _Preprocessed(Dataset):
    """Every cell of `cells`, read, with the voxel size; of a bad one the error, which no worker process decorates."""

    def __init__(self, cells: CellDataset):
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[float, float, float] | None] | Exception:
        row = self.cells._rows[index]
        try:
            volume, record = self.cells._preprocess(self.cells._read(row), row)
        except Exception as error:
            return error
        return volume, record.voxel_size_um


def conditions_item(population: Population, row: int) -> dict[str, dict[str, Tensor]]:
    """What a cell's conditions add to its item: nothing, where it has none."""
    conditions = {name: torch.from_numpy(values[row]) for name, values in population.conditions.items()}
    return {"conditions": conditions} if conditions else {}


def preprocess(volume: Volume, processor: VolumeProcessor, where: str) -> tuple[Tensor, PreprocessingRecord]:
    """A raw crop as network input, with errors that say `where` it came from.

    Raises:
        ValueError: if `processor` refuses the crop, or the crop has its channels in another order.
    """
    try:
        check_channel_order(volume, processor)
        return processor.preprocess_with_record(volume.data, volume.voxel_size_um)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_channel_order(volume: Volume, processor: VolumeProcessor) -> None:
    """Refuse a volume with the processor's channels in another order; other names may mean the same channels.

    Raises:
        ValueError: naming both orders.
    """
    expected = [name.lower() for name in processor.config.channel_names]
    got = [name.lower() for name in volume.channel_names or expected]
    if got != expected and sorted(got) == sorted(expected):
        raise ValueError(
            f"Expected the channels in the order {', '.join(expected)}, got {', '.join(got)}. Reorder them, or set"
            " `channel_names` of the processor."
        )


def keep_labels(
    population: Population, label: str | Sequence[str] | None, source: str
) -> tuple[list[int], tuple[str, ...]]:
    """Positions and label names of the cells of `label`, of these labels, or (None) of all.

    Raises:
        ValueError: if a label has no cells.
    """
    if label is None:
        return list(range(len(population.ids))), population.labels
    wanted, existing = {label} if isinstance(label, str) else set(label), set(population.labels)
    if not wanted or wanted - existing:
        raise ValueError(
            f"Expected cells with the label {', '.join(sorted(wanted - existing)) or '(none given)'} in {source}, got"
            f" {', '.join(sorted(existing))}. Choose among these."
        )
    rows = [row for row, name in enumerate(population.labels) if name in wanted]
    return rows, tuple(population.labels[row] for row in rows)
