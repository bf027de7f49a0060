"""Data sets of single cells, as a training loop, an evaluation and a baseline all see them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor
from torch.utils.data import Dataset

from .files import VOLUME_SUFFIXES, Volume, read_volume
from .metadata import read_metadata
from .processor import VolumeProcessor


METADATA_NAME = "metadata.csv"
_ONLY_CLASS = "cell"  # the class of cells that have no label


class CellDataset(Dataset):
    """What every data set of cells offers; `CellFolder` and `PhantomCells` say where the cells come from.

    An item is ``{"volumes": (M, S, S, S) float32 in [-1, 1], "class_labels": () int64}``.

    A subclass calls `_prepare` at the end of its constructor: it reads and preprocesses every cell once, so that a
    bad one is found before training and not hours into it, and keeps as many of them in memory as `cache_gb` allows.
    The others are read again at each access. Worker processes share the memory; each process of a distributed run has
    its own.

    Attributes:
        processor: makes raw crops into network input.
        class_names: sorted names of the classes; a class label is an index into it.
        labels: class label of every cell.
        voxel_size_um: (z, y, x) edge of a voxel in µm where all cells agree, otherwise None.
    """

    def __init__(self, processor: VolumeProcessor, class_names: Sequence[str], names: Sequence[str]):
        self.processor = processor
        self.class_names = sorted(set(class_names))
        self.labels = [self.class_names.index(name) for name in names]
        self.voxel_size_um: tuple[float, float, float] | None = None
        self._cache = torch.empty(0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]
        # a copy, because an augmentation in place would otherwise change the cell for good
        volume = self._cache[index].clone() if index < len(self._cache) else self._preprocess(self._read(index), index)
        return {"volumes": volume, "class_labels": torch.tensor(self.labels[index])}

    def _read(self, index: int) -> Volume:
        """The raw crop of one cell."""
        raise NotImplementedError

    def _where(self, index: int) -> str:
        """How an error message names the cell."""
        raise NotImplementedError

    def _preprocess(self, volume: Volume, index: int) -> Tensor:
        try:
            return self.processor.preprocess(volume.data)
        except ValueError as err:
            raise ValueError(f"{self._where(index)}: {err}") from err

    def _prepare(self, cache_gb: float, description: str) -> None:
        if not cache_gb >= 0:
            raise ValueError(f"`cache_gb` must be 0 or more, got {cache_gb}")
        config = self.processor.config
        shape = (config.num_channels, *(config.sample_size,) * 3)
        num_cached = min(len(self), int(cache_gb * 1e9 / (4 * np.prod(shape))))
        cache = torch.empty(num_cached, *shape)
        voxel_sizes = set()
        for index in logging.tqdm(range(len(self)), desc=description, unit="cell"):
            volume = self._read(index)
            voxel_sizes.add(volume.voxel_size_um)
            preprocessed = self._preprocess(volume, index)
            if index < num_cached:
                cache[index] = preprocessed
        self._cache = cache
        self.voxel_size_um = voxel_sizes.pop() if len(voxel_sizes) == 1 else None


class CellFolder(CellDataset):
    """A folder of volume files, one cell each.

    With a ``metadata.csv`` (the convention of 🤗 Datasets) its rows are the cells: column `file_name`, relative to the
    folder, and optionally `label`; other columns are ignored. Without one, every ``.tif``, ``.tiff``, ``.npy`` and
    ``.npz`` file below the folder is a cell, labelled by the sub-folder it lies in, or not at all.

    Args:
        root: the folder.
        processor: makes the crops into network input.
        label: keep only the cells of this label, or of these.
        cache_gb: memory for preprocessed cells, in 10⁹ bytes; at 64³ and two channels a cell takes 2.1 MB.

    Attributes:
        paths: file of every cell.

    Raises:
        FileNotFoundError: if the folder, or the file of a metadata row, does not exist.
        ValueError: if the folder has no cells, a label has none, the metadata are faulty, or a file is no volume that
            `processor` accepts. The message names the file or the row.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        processor: VolumeProcessor,
        label: str | Sequence[str] | None = None,
        cache_gb: float = 4.0,
    ):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the cells")
        cells = _cells_of_metadata(root) if (root / METADATA_NAME).is_file() else _cells_of_folder(root)
        if label is not None:
            wanted, existing = {label} if isinstance(label, str) else set(label), {name for _, name in cells}
            if not wanted or wanted - existing:
                raise ValueError(
                    f"{root}: no cells with the label {', '.join(sorted(wanted - existing)) or '(none given)'};"
                    f" the labels there are: {', '.join(sorted(existing))}"
                )
            cells = [(path, name) for path, name in cells if name in wanted]
        self.paths = [path for path, _ in cells]
        names = [name for _, name in cells]
        super().__init__(processor, names, names)
        self._prepare(cache_gb, f"Reading {root.name}")

    def _read(self, index: int) -> Volume:
        volume = read_volume(self.paths[index])
        expected = [name.lower() for name in self.processor.config.channel_names]
        got = [name.lower() for name in volume.channel_names or expected]
        if got != expected and sorted(got) == sorted(expected):
            raise ValueError(
                f"{self.paths[index]}: expected the channels in the order {', '.join(expected)}, got {', '.join(got)};"
                " reorder them, or set `channel_names` of the processor"
            )
        return volume

    def _where(self, index: int) -> str:
        return str(self.paths[index])


class PhantomCells(CellDataset):
    """Phantom cells, made at construction; no files.

    The phenotypes take turns, and cell `i` depends on `seed` and `i` alone: a larger set begins with the smaller one.

    Args:
        num_cells: how many.
        processor: makes the crops into network input; its `sample_size` bounds the phantoms and its `voxel_size_um`,
            which must be isotropic, is theirs.
        phenotypes: some of `PHENOTYPES`; None for all. They are the classes.
        seed: 0 or more; sets of different seeds have no cell in common.
        cache_gb: memory for preprocessed cells, in 10⁹ bytes; at 64³ and two channels a cell takes 2.1 MB.

    Attributes:
        truths: `PhantomTruth` of every cell.

    Raises:
        ValueError: if an argument is out of range.
        ImportError: if scipy is not installed.
    """

    def __init__(
        self,
        num_cells: int,
        processor: VolumeProcessor,
        phenotypes: Sequence[str] | None = None,
        seed: int = 0,
        cache_gb: float = 4.0,
    ):
        from . import PHENOTYPES  # needs scipy

        phenotypes = PHENOTYPES if phenotypes is None else tuple(phenotypes)
        if num_cells < 1:
            raise ValueError(f"`num_cells` must be positive, got {num_cells}")
        if not phenotypes or set(phenotypes) - set(PHENOTYPES):
            raise ValueError(f"`phenotypes` must be some of {', '.join(PHENOTYPES)}, got {phenotypes}")
        if seed < 0:
            raise ValueError(f"`seed` must be 0 or more, got {seed}")
        if len(set(processor.voxel_size_um)) != 1:
            raise ValueError(
                f"phantoms have cubic voxels, got the processor's `voxel_size_um` {processor.voxel_size_um}"
            )
        if processor.config.num_channels != 2:
            raise ValueError(f"phantoms have 2 channels, got `num_channels` {processor.config.num_channels}")
        names = [phenotypes[index % len(phenotypes)] for index in range(num_cells)]
        super().__init__(processor, phenotypes, names)
        self.seed = seed
        self.truths = [None] * num_cells
        self._prepare(cache_gb, "Making phantoms")

    def phantom(self, index: int):
        """The whole `Phantom` of one cell, made again: raw counts, true masks, true measurements."""
        from . import make_phantom

        index = range(len(self))[index]
        return make_phantom(
            self.class_names[self.labels[index]],
            seed=int(np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)[0]),
            max_size=self.processor.config.sample_size,
            voxel_size_um=self.processor.voxel_size_um[0],
        )

    def _read(self, index: int) -> Volume:
        phantom = self.phantom(index)
        self.truths[index] = phantom.truth
        return Volume(phantom.volume, self.processor.voxel_size_um)

    def _where(self, index: int) -> str:
        return f"phantom {index} of seed {self.seed}"


# where the cells of a folder are: (path, label) of each


def _cells_of_folder(root: Path) -> list[tuple[Path, str]]:
    paths = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in VOLUME_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)  # e.g. the ._* files of macOS
    )
    if not paths:
        raise ValueError(f"{root}: no cells; expected {METADATA_NAME}, or files ending in {'/'.join(VOLUME_SUFFIXES)}")
    parts = [path.relative_to(root).parts for path in paths]
    at_root = sum(len(part) == 1 for part in parts)
    if 0 < at_root < len(paths):
        raise ValueError(
            f"{root}: {at_root} of {len(paths)} cells lie outside the sub-folders that name the labels; move them, or"
            f" write {METADATA_NAME} with the columns file_name and label"
        )
    return [(path, part[0] if len(part) > 1 else _ONLY_CLASS) for path, part in zip(paths, parts, strict=True)]


def _cells_of_metadata(root: Path) -> list[tuple[Path, str]]:
    metadata_path = root / METADATA_NAME
    cells, line_of = [], {}
    for line, row in read_metadata(metadata_path):
        where = f"{metadata_path}, line {line}"
        name = os.path.normpath(row["file_name"])
        if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            raise ValueError(f"{where}: {row['file_name']!r} is not inside {root}; move the file there")
        if name in line_of:
            raise ValueError(f"{where}: {row['file_name']!r} stands already in line {line_of[name]}; delete one")
        if not (root / name).is_file():
            raise FileNotFoundError(f"{where}: no file {root / name}; correct file_name, or delete the row")
        label = row.get("label", _ONLY_CLASS)
        if not label.strip():
            raise ValueError(f"{where}: label is empty; fill it in, or delete the row")
        line_of[name] = line
        cells.append((root / name, label))
    return cells
