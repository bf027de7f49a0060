"""Volumes of single cells: from files, from the phantom generator, and as network input.

Importing this imports no torch; the first use of a name does if it needs it. Cutting stacks does not, and so starts at
once, in every process.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .augmentation import augment_cells, draw_augmentation
    from .formats.reading import read_volume, write_ome_tiff, write_volume
    from .formats.records import decode_volume, encode_volume
    from .formats.shards import write_shards
    from .formats.volume import Volume
    from .one_channel import prepare_channel
    from .phantoms import PHENOTYPES, Phantom, PhantomTruth, make_phantom
    from .processor import PreprocessingRecord, VolumeProcessor
    from .resampling import resample_volume
    from .sets.batches import StepBatches, StreamBatches
    from .sets.cells import CellDataset, Cells
    from .sets.folder import CellFolder
    from .sets.phantom_cells import PhantomCells
    from .sets.splits import Population, Split, read_split, split_cells, write_split
    from .sets.stream import StreamedCells
    from .sets.table import CellTable

__all__ = [
    "PHENOTYPES",
    "CellDataset",
    "CellFolder",
    "CellTable",
    "Cells",
    "Phantom",
    "PhantomCells",
    "PhantomTruth",
    "Population",
    "PreprocessingRecord",
    "Split",
    "StepBatches",
    "StreamBatches",
    "StreamedCells",
    "Volume",
    "VolumeProcessor",
    "augment_cells",
    "decode_volume",
    "draw_augmentation",
    "encode_volume",
    "make_phantom",
    "prepare_channel",
    "read_split",
    "read_volume",
    "resample_volume",
    "split_cells",
    "write_ome_tiff",
    "write_shards",
    "write_split",
    "write_volume",
]

_NAMES_OF = {
    ".augmentation": ("augment_cells", "draw_augmentation"),
    ".formats.reading": ("read_volume", "write_ome_tiff", "write_volume"),
    ".formats.records": ("decode_volume", "encode_volume"),
    ".formats.shards": ("write_shards",),
    ".formats.volume": ("Volume",),
    ".one_channel": ("prepare_channel",),
    ".phantoms": ("PHENOTYPES", "Phantom", "PhantomTruth", "make_phantom"),
    ".processor": ("PreprocessingRecord", "VolumeProcessor"),
    ".resampling": ("resample_volume",),
    ".sets.batches": ("StepBatches", "StreamBatches"),
    ".sets.cells": ("CellDataset", "Cells"),
    ".sets.folder": ("CellFolder",),
    ".sets.phantom_cells": ("PhantomCells",),
    ".sets.splits": ("Population", "Split", "read_split", "split_cells", "write_split"),
    ".sets.stream": ("StreamedCells",),
    ".sets.table": ("CellTable",),
}
_MODULES = {name: module for module, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
