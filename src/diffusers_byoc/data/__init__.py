"""Volumes of single cells: from files, from the phantom generator, and as network input."""

from .cells import CellDataset, CellFolder, PhantomCells
from .files import Volume, read_volume, write_ome_tiff
from .processor import VolumeProcessor
from .records import decode_volume, encode_volume
from .resampling import resample_volume


__all__ = [
    "PHENOTYPES",
    "CellDataset",
    "CellFolder",
    "Phantom",
    "PhantomCells",
    "PhantomTruth",
    "Volume",
    "VolumeProcessor",
    "decode_volume",
    "encode_volume",
    "make_phantom",
    "read_volume",
    "resample_volume",
    "write_ome_tiff",
]

_PHANTOM_NAMES = ("PHENOTYPES", "Phantom", "PhantomTruth", "make_phantom")


def __getattr__(name: str):
    # phantoms need scipy, an extra; everything else here does without
    if name not in _PHANTOM_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import phantoms
    except ModuleNotFoundError as err:
        raise ImportError("phantom cells need scipy: pip install diffusers_byoc[data]") from err
    return getattr(phantoms, name)
