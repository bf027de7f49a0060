"""The model card: the template, filled with what the run's record, the pipeline and its evaluation say."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .evaluation_results import EvaluationResults


TEMPLATE = Path(__file__).parent / "template.md"
RUN_RECORD = "arguments.json"  # which a training leaves beside its pipeline
TAGS = ["diffusers_byoc", "microscopy", "fluorescence", "3d", "single-cell"]
PHANTOM_LICENSE = "none needed, a formula of diffusers_byoc (Apache-2.0) makes them"


def read_run_record(folder: str | os.PathLike) -> dict[str, dict]:
    """Stage -> what it was made with, of a training's output folder; empty without such a record."""
    path = Path(folder) / RUN_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def make_card(
    pipeline: DiffusionPipeline,
    repo_id: str,
    record: Mapping[str, Mapping],
    evaluation: EvaluationResults | None = None,
    license: str | None = None,
    data_description: str | None = None,
    data_license: str | None = None,
    has_fp16: bool = True,
    has_picture: bool = False,
    has_report: bool = False,
) -> ModelCard:
    """The card; what nobody wrote down it says to be unknown.

    Args:
        pipeline: a `BYOCPipeline` or `BaselinePipeline`.
        repo_id: ORGANISATION/NAME, where it will be.
        record: of `read_run_record`.
        evaluation: of `read_evaluation`.
        license: of the weights, by the Hub's name of it (``cc-by-4.0``); None for Apache-2.0 if they are of phantoms,
            and otherwise unstated.
        data_description: of the cells: which, how many, from which microscope; None for what the record says.
        data_license: of the cells.
        has_fp16: there are weights of that variant.
        has_picture: ``cells.png`` lies beside the card.
        has_report: so does ``report.md``.
    """
    processor, config = pipeline.volume_processor, pipeline.config
    labels = config.get("label2id") or {}
    last = list(record.values())[-1] if record else {}
    arguments, cells = last.get("arguments", {}), last.get("cells", {})
    is_phantom = cells.get("is_phantom", False)
    dataset_name, base_model = (_on_hub(arguments.get(name)) for name in ("dataset_name", "pretrained"))
    scheduler = getattr(pipeline, "scheduler", None)
    size = processor.config.sample_size
    names = list(processor.config.channel_names)
    card_data = ModelCardData(
        license=license or ("apache-2.0" if is_phantom else None),
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[*TAGS, "diffusion" if scheduler else "gan", *(["phantoms"] if is_phantom else []), *sorted(labels)],
        datasets=[dataset_name] if dataset_name else None,
        base_model=base_model,
        model_name=repo_id.split("/")[-1] if evaluation else None,  # of the model-index
        eval_results=evaluation.model_index() if evaluation else None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        pipeline_class=type(pipeline).__name__,
        is_phantom=is_phantom,
        size="x".join([str(size)] * 3),
        voxel_size_um=processor.voxel_size_um and _sizes(processor.voxel_size_um),
        channel_names=names,
        class_names=sorted(labels, key=labels.get),
        conditions=[_describe_condition(**condition) for condition in config.get("conditions") or []],
        typical=_typical_conditions(config.get("conditions") or []),
        shape=f"(8, {len(names)}, {size}, {size}, {size})",
        data=data_description or _describe_data(last, dataset_name),
        data_license=data_license or (PHANTOM_LICENSE if is_phantom else None),
        base_model=base_model,
        is_baseline="baseline" in arguments,
        command="byoc-train-baseline" if "baseline" in arguments else "byoc-train",
        preset=_name_of(arguments.get("preset")),
        seed=arguments.get("seed"),
        hardware=last.get("hardware", "hardware that nobody noted"),
        stages=[_describe_stage(name, entry) for name, entry in record.items()],
        versions=", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items()),
        prediction_type=scheduler and scheduler.config.get("prediction_type"),
        scheduler=type(scheduler).__name__,
        num_inference_steps=config.get("default_num_inference_steps"),
        metrics=evaluation.rows() if evaluation else None,
        comparison=evaluation and evaluation.comparison,
        has_fp16=has_fp16,
        has_picture=has_picture,
        has_report=has_report,
    )


def _on_hub(name: str | None) -> str | None:
    """The name of a repository on the Hub, without what lies on the author's disk."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:  # a pattern, a path
        return None
    return name


def _describe_data(last: Mapping, dataset_name: str | None) -> str:
    """From the record of the last stage."""
    cells, counts = last.get("cells"), last.get("data", {})
    if not cells:
        return "The run left no record of its cells; ask the author."
    what = (
        f"{counts['num_cells']} {'phantoms' if cells['is_phantom'] else 'cells'} ({', '.join(cells['class_names'])})"
    )
    if cells["is_phantom"]:
        text = f"{what}, drawn by a formula."
    elif dataset_name:
        text = f"{what} of [{dataset_name}](https://huggingface.co/datasets/{dataset_name})."
    else:
        text = f"{what} of the author's own. Microscope and treatment: ask the author."
    if counts["num_held_out"]:
        text += f" {counts['num_held_out']} more were held out."
    size = cells["voxel_size_um"]
    return f"{text} Voxel size: {_sizes(size)} µm." if size else f"{text} Voxel size: unknown, or not one."


def _describe_stage(name: str, entry: Mapping) -> dict[str, str]:
    """A row of the card's table, from the record of a stage."""
    arguments = entry["arguments"]

    def of_stage(argument: str):
        own = f"{name}_{argument}"
        return arguments[own] if own in arguments else arguments.get(argument)

    minutes = of_stage("max_train_minutes")
    return {
        "name": name,
        "steps": f"{of_stage('max_train_steps'):,}" + (f", at most {minutes:g} minutes" if minutes else ""),
        "batch": of_stage("train_batch_size") * of_stage("gradient_accumulation_steps") * entry["num_processes"],
        "learning_rate": f"{of_stage('learning_rate'):g}",
    }


def _describe_condition(name: str, min: Sequence[float], max: Sequence[float], **_) -> str:
    return f"{name} (from {min[0]:g} to {max[0]:g})" if len(min) == 1 else f"{name} ({len(min)} numbers)"


def _typical_conditions(statistics: Sequence[Mapping]) -> str:
    """Python that gives conditions as the training cells had on average."""
    if any(len(condition["mean"]) > 1 for condition in statistics):
        return "typical_conditions(pipe.config.conditions)"
    return str({condition["name"]: float(f"{condition['mean'][0]:.3g}") for condition in statistics}).replace("'", '"')


def _sizes(lengths: Sequence[float]) -> str:
    return " x ".join(f"{length:g}" for length in lengths)


def _name_of(preset: str | None) -> str | None:
    """Without the folders of the author's disk."""
    return preset and Path(preset).name
