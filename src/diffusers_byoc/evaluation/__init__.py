"""Generated cells against real ones: sets of cells, one table of metrics, a report.

Needs ``pip install "diffusers_byoc[train]"``, and for the features of Med3D ``"diffusers_byoc[med3d]"``.
"""

from .any_pipeline import autoencoder_of, channel_names_of, has_classes
from .comparison import compare_rows
from .features import FEATURES, Extractor, extract_features
from .folds import MIN_CELLS, make_folds
from .metric_table import METRICS, Comparison, Metric
from .reconstruction import judge_reconstruction
from .report import Results, summarize_folds, write_report
from .sets import CellSet, Variant, folder_cells, real_cells
from .settings import EvaluationSettings
from .suspicions import suspicions


__all__ = [
    "FEATURES",
    "METRICS",
    "MIN_CELLS",
    "CellSet",
    "Comparison",
    "EvaluationSettings",
    "Extractor",
    "Metric",
    "Results",
    "Variant",
    "autoencoder_of",
    "channel_names_of",
    "compare_rows",
    "extract_features",
    "folder_cells",
    "has_classes",
    "judge_reconstruction",
    "make_folds",
    "real_cells",
    "summarize_folds",
    "suspicions",
    "write_report",
]
