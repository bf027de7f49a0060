"""Put a trained pipeline on the Hub, with a card that says what it was trained on."""

import re
from pathlib import Path

from huggingface_hub import HfApi

from ..baselines import BaselinePipeline
from ..data import Cells
from ..pipelines import BYOCPipeline


TEMPLATE = Path(__file__).parent / "model_card.md"
PUBLISHED = [
    "model_index.json",
    "*/*.json",
    "*/diffusion_pytorch_model*.safetensors",
    "README.md",
    "report.md",
    "*.png",
]


def create_repository(name: str, private: bool = False) -> str:
    """The full name of the repository `name` (NAME or ORGANISATION/NAME); made if missing.

    Raises:
        OSError: if the Hub refuses, for want of a token for example.
    """
    try:
        private = private or None  # None leaves it to the organisation's settings
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except OSError as error:  # huggingface_hub's errors are
        raise OSError(
            f"Expected to be able to push to {name}, got {error}. Log in with `hf auth login`, or set HF_TOKEN to a"
            " token that may write."
        ) from error


def push_pipeline(
    pipeline: BYOCPipeline | BaselinePipeline,
    output_dir: str | Path,
    repo_id: str,
    cells: Cells,
    held_out_cells: Cells | None,
    training: str,
) -> None:
    """Write OUTPUT_DIR/README.md and upload the pipeline, the card and the report; no checkpoint, no cell.

    Args:
        pipeline: saved in `output_dir`.
        output_dir: of the run.
        repo_id: of an existing repository.
        cells, held_out_cells, training: as for `make_card`.
    """
    card = make_card(pipeline, repo_id, cells, held_out_cells, training)
    (Path(output_dir) / "README.md").write_text(card, encoding="utf-8")
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        allow_patterns=PUBLISHED,
        ignore_patterns=["*/checkpoint-*", "logs/*", "latents/*", "wandb/*", "split.json"],
        commit_message="Add the pipeline",
    )


def make_card(
    pipeline: BYOCPipeline | BaselinePipeline,
    repo_id: str,
    cells: Cells,
    held_out_cells: Cells | None,
    training: str,
) -> str:
    """The model card's template, filled in with what the run knows; what it cannot know it leaves to the author.

    Args:
        pipeline: trained.
        repo_id: where it will be.
        cells: that it was trained on.
        held_out_cells: that it was not trained on; None for none.
        training: a sentence: how many steps, how fast.
    """
    is_phantom = cells.is_phantom
    processor = pipeline.volume_processor
    size = "x".join([str(processor.config.sample_size)] * 3)
    names = sorted({cells.class_names[label] for label in cells.labels})
    origin = (
        f"**{len(cells)} phantoms ({', '.join(names)}), drawn by a formula. They are not microscopy.**"
        if is_phantom
        else f"{len(cells)} cells ({', '.join(names)}) of the author's own. Microscope, treatment and licence: "
        "ask the author."
    )
    if held_out_cells is not None:
        origin += f" {len(held_out_cells)} more were held out."
    voxel_size_um = processor.voxel_size_um
    origin += f" Voxel size: {voxel_size_um} µm." if voxel_size_um else " Voxel size: unknown, or not one."
    is_baseline = isinstance(pipeline, BaselinePipeline)
    by = "by `byoc-train-baseline`" if is_baseline else "by `byoc-train`"
    if getattr(pipeline, "scheduler", None):
        by = f"predicting {pipeline.scheduler.config.prediction_type}, {by}"
    sections = {
        "Trained on": origin,
        "Training": f"{training}, {by}.",
        "How good": "See `report.md`, on training cells: nothing here was measured on other ones.\n\n![](cells.png)",
    }
    card = TEMPLATE.read_text(encoding="utf-8")
    treatment = f"the {' and the '.join(names)} {'phantoms' if is_phantom else 'cells'} it was trained on"
    replacements = {
        "ORG/NAME": repo_id,
        "# NAME": f"# {repo_id.split('/')[-1]}",
        "SIZE": size,
        "CHANNELS": ", ".join(processor.config.channel_names),
        "BYOCPipeline": type(pipeline).__name__,
        "as they look under TREATMENT": f"like {treatment}",
        "license: LICENCE": "license: other",
    }
    for placeholder, value in replacements.items():
        card = card.replace(placeholder, value)
    for title, text in sections.items():
        card = re.sub(
            rf"(## {title}\n\n).*?(?=\n## |\Z)", lambda match, text=text: match[1] + text + "\n", card, flags=re.S
        )
    return card
