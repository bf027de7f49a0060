"""A trained pipeline on the Hub: weights, a card that says what is known of them, and nothing else."""

from .card import make_card
from .evaluation_results import EvaluationResults, read_evaluation
from .hub import create_repository, full_name, prepare_folder, upload_pipeline


__all__ = [
    "EvaluationResults",
    "create_repository",
    "full_name",
    "make_card",
    "prepare_folder",
    "read_evaluation",
    "upload_pipeline",
]
