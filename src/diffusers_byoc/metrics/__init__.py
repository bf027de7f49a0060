"""How good are generated cells? Volumes → features; (features, features) → number.

Needs ``pip install "diffusers_byoc[metrics]"``, and for the features of Med3D ``"diffusers_byoc[med3d]"``.
"""

from .consistency import ChannelConsistency, channel_consistency
from .feature_sets import standardize_features
from .frechet import frechet_distance
from .mmd import median_distance, mmd_linear, mmd_rbf
from .morphology import (
    MORPHOLOGY_NAMES,
    CellMorphology,
    find_channels,
    measure_cell,
    measure_cells,
    morphology_features,
)
from .neighbours import Memorisation, NeighbourMetrics, memorisation, neighbour_metrics
from .poses import POSES, turn
from .reconstruction import CodebookUsage, ReconstructionQuality, codebook_usage, reconstruction_quality
from .segmentation import Segmentation, segment_channel
from .spectrum import GridTest, grid_excess, grid_test, radial_spectrum
from .texture import texture_features, texture_names
from .transfer import TransferTest, transfer_test
from .two_sample import ClassifierTest, FeatureComparison, classifier_test, compare_features
from .volume_classifier import volume_classifier_test


__all__ = [
    "MORPHOLOGY_NAMES",
    "POSES",
    "CellMorphology",
    "ChannelConsistency",
    "ClassifierTest",
    "CodebookUsage",
    "FeatureComparison",
    "GridTest",
    "Med3DConfig",
    "Med3DModel",
    "Memorisation",
    "NeighbourMetrics",
    "ReconstructionQuality",
    "Segmentation",
    "TransferTest",
    "channel_consistency",
    "classifier_test",
    "codebook_usage",
    "compare_features",
    "convert_med3d_checkpoint",
    "find_channels",
    "frechet_distance",
    "grid_excess",
    "grid_test",
    "load_med3d",
    "measure_cell",
    "measure_cells",
    "median_distance",
    "memorisation",
    "mmd_linear",
    "mmd_rbf",
    "morphology_features",
    "neighbour_metrics",
    "radial_spectrum",
    "reconstruction_quality",
    "segment_channel",
    "standardize_features",
    "texture_features",
    "texture_names",
    "transfer_test",
    "turn",
    "volume_classifier_test",
]

_MED3D_NAMES = ("Med3DConfig", "Med3DModel", "convert_med3d_checkpoint", "load_med3d")


def __getattr__(name: str):
    # Med3D is a class of transformers over one of MONAI, an extra; everything else here does without
    if name not in _MED3D_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import med3d

    return getattr(med3d, name)
