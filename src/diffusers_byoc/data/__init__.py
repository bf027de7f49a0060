"""Volumes of single cells: from files, from the phantom generator, and as network input."""

from .augmentation import augment_cells, draw_augmentation
from .formats.reading import read_volume, write_ome_tiff, write_volume
from .formats.records import decode_volume, encode_volume
from .formats.shards import write_shards
from .formats.volume import Volume
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
    "read_split",
    "read_volume",
    "resample_volume",
    "split_cells",
    "write_ome_tiff",
    "write_shards",
    "write_split",
    "write_volume",
]
