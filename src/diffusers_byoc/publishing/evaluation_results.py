"""What `byoc-evaluate` found of a pipeline, for its card."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult
from torch import nn

from ..models.fingerprint import fingerprint_weights
from ..pipelines.generation import RECORD_NAME


@dataclass(frozen=True)
class EvaluationResults:
    """Metrics of generated cells, each with those of real ones beside it.

    Args:
        folder: of the evaluation.
        num_generated, num_real: cells that were compared.
        num_inference_steps: that the generated ones were made in; None for the pipeline's own.
        is_phantom: the "real" ones are phantoms.
        summary: "generated" and "real" -> key of ``metrics.json`` -> "mean" and "std".
    """

    folder: Path
    num_generated: int
    num_real: int
    num_inference_steps: int | None
    is_phantom: bool
    summary: Mapping[str, Mapping[str, Mapping[str, float]]]

    @property
    def comparison(self) -> str:
        """What was compared with what."""
        real = "held-out phantoms" if self.is_phantom else "held-out cells"
        steps = f" ({self.num_inference_steps} steps)" if self.num_inference_steps else ""
        return f"{self.num_generated} generated cells{steps} against {real} among {self.num_real}"

    def rows(self) -> list[dict[str, str]]:
        """For the card's table, in the order of ``metrics.md``: title, good, generated, real."""
        from ..evaluation.report import in_words, shown_metrics  # needs more than publishing does

        return [
            {"title": metric.title_of(kind), "good": metric.good}
            | {name: in_words(row, key, metric.factor) for name, row in self.summary.items()}
            for metric, kind, key in shown_metrics({"generated": self.summary["generated"]})
        ]

    def model_index(self) -> list[EvalResult]:
        """For the card's metadata, where the Hub looks for them."""
        from ..evaluation.report import shown_metrics

        what = {
            "task_type": "unconditional-image-generation",
            "dataset_type": "phantoms" if self.is_phantom else "cells",
            "dataset_name": self.comparison,
        }
        return [
            EvalResult(
                metric_type=key,
                metric_name=metric.title_of(kind),
                metric_value=float(f"{self.summary['generated'][key]['mean'] * metric.factor:.4g}"),
                **what,
            )
            for metric, kind, key in shown_metrics({"generated": self.summary["generated"]})
        ]


def read_evaluation(folder: str | os.PathLike, pretrained: str | os.PathLike) -> EvaluationResults:
    """The results in the output folder of `byoc-evaluate`.

    Args:
        folder: holds ``metrics.json`` and the cells that were judged, with their record.
        pretrained: folder of the pipeline that shall have been judged.

    Raises:
        ValueError: if the cells are those of other weights, or nobody knows of which.
        OSError: if there is no evaluation.
    """
    folder = Path(folder)
    found, cells = folder / "metrics.json", folder / "generated" / RECORD_NAME
    if not found.is_file():
        raise FileNotFoundError(f"Expected what byoc-evaluate writes in {folder}, got no metrics.json. Run it first.")
    results = json.loads(found.read_text(encoding="utf-8"))
    arguments = results["arguments"]
    theirs = json.loads(cells.read_text(encoding="utf-8"))["weights"] if cells.is_file() else None
    pipeline = DiffusionPipeline.from_pretrained(pretrained, dtype=getattr(torch, arguments["dtype"]))
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    ours = {name: fingerprint_weights(part) for name, part in parts.items()}
    if theirs != ours:
        what = "those of another one" if theirs else f"none that say which one made them ({cells})"
        raise ValueError(f"Expected cells of this pipeline in {folder}, got {what}. Evaluate this one.")
    summary = {
        row: {
            key: {name: math.nan if number is None else number for name, number in value.items()}
            for key, value in results["summary"][row].items()
        }
        for row in ("generated", "real")
    }
    is_phantom = not (arguments["train_data_dir"] or arguments["dataset_name"])
    num_cells = results["num_cells"]
    steps = arguments.get("num_inference_steps")
    return EvaluationResults(folder, num_cells["generated"], num_cells["real"], steps, is_phantom, summary)
