"""Volumes of single cells: from files, from the phantom generator, and as network input."""

from .augmentation import augment_cells, draw_augmentation
from .cells import CellDataset
from .files import Volume, read_volume, write_ome_tiff, write_volume
from .folder import CellFolder
from .phantom_cells import PhantomCells
from .processor import PreprocessingRecord, VolumeProcessor
from .records import decode_volume, encode_volume
from .resampling import resample_volume
from .shards import write_shards
from .splits import Population, Split, read_split, split_cells, write_split
from .streams import StreamBatches, StreamedCells
from .tables import CellTable


__all__ = [
    "PHENOTYPES",
    "CellDataset",
    "CellFolder",
    "CellTable",
    "Phantom",
    "PhantomCells",
    "PhantomTruth",
    "Population",
    "PreprocessingRecord",
    "Split",
    "StreamBatches",
    "StreamedCells",
    "Volume",
    "VolumeProcessor",
    "augment_cells",
    "decode_volume",
    "draw_augmentation",
    "encode_volume",
    "make_phantom",
    "read_split",
    "read_volume",
    "resample_volume",
    "split_cells",
    "write_ome_tiff",
    "write_shards",
    "write_split",
    "write_volume",
]

_PHANTOM_NAMES = ("PHENOTYPES", "Phantom", "PhantomTruth", "make_phantom")


def __getattr__(name: str):
    # phantoms need scipy, an extra; everything else here does without
    if name not in _PHANTOM_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import phantoms

    return getattr(phantoms, name)
