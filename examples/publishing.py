"""Put a trained pipeline on the Hub, with a card that says what it was trained on."""

import argparse
import re
from pathlib import Path

from huggingface_hub import HfApi

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import CellDataset, PhantomCells


TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"
PUBLISHED = [
    "model_index.json",
    "*/*.json",
    "*/diffusion_pytorch_model*.safetensors",
    "README.md",
    "report.md",
    "*.png",
]


def create_repository(args: argparse.Namespace) -> str:
    """The full name of the repository that the run will fill; made if missing.

    Raises:
        OSError: if the Hub refuses, for want of a token for example.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        private = args.hub_private_repo or None  # None leaves it to the organisation's settings
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except OSError as error:  # huggingface_hub's errors are
        raise OSError(
            f"cannot push to {name} ({error}); log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        ) from error


def push_pipeline(
    args: argparse.Namespace, pipeline: BYOCPipeline, cells: CellDataset, held_out_cells: CellDataset | None
) -> None:
    """Write OUTPUT_DIR/README.md and upload the pipeline, the card and the report; no checkpoint, no cell."""
    card = make_card(args, pipeline, cells, held_out_cells)
    (Path(args.output_dir) / "README.md").write_text(card, encoding="utf-8")
    HfApi().upload_folder(
        repo_id=args.hub_model_id,
        folder_path=args.output_dir,
        allow_patterns=PUBLISHED,
        ignore_patterns=["autoencoder/*", "diffusion/*", "logs/*", "latents/*", "wandb/*", "split.json"],
        commit_message="Add the pipeline",
    )


def make_card(
    args: argparse.Namespace, pipeline: BYOCPipeline, cells: CellDataset, held_out_cells: CellDataset | None
) -> str:
    """The model card's template, filled in with what the run knows; what it cannot know it leaves to the author."""
    is_phantoms = isinstance(cells, PhantomCells)
    size = "x".join([str(pipeline.vqvae.config.sample_size)] * 3)
    names = sorted({cells.class_names[label] for label in cells.labels})
    origin = (
        f"**{len(cells)} phantoms ({', '.join(names)}), drawn by a formula. They are not microscopy.**"
        if is_phantoms
        else f"{len(cells)} cells ({', '.join(names)}) of the author's own. Microscope, treatment and licence: "
        "ask the author."
    )
    if held_out_cells is not None:
        origin += f" {len(held_out_cells)} more were held out."
    voxel_size_um = pipeline.volume_processor.voxel_size_um
    origin += f" Voxel size: {voxel_size_um} µm." if voxel_size_um else " Voxel size: unknown, or not one."
    stages = (
        f"{args.autoencoder_max_train_steps} steps of the autoencoder (learning rate"
        f" {args.autoencoder_learning_rate}), {args.diffusion_max_train_steps} of the diffusion"
        f" ({args.diffusion_learning_rate}, {pipeline.scheduler.config.prediction_type}), seed {args.seed}, by"
        " `examples/train_byoc.py`."
    )
    sections = {
        "Trained on": origin,
        "Training": stages,
        "How good": "See `report.md`, on training cells: nothing here was measured on other ones.\n\n![](cells.png)",
    }
    card = TEMPLATE.read_text(encoding="utf-8")
    name = args.hub_model_id.split("/")[-1]
    treatment = f"the {' and the '.join(names)} {'phantoms' if is_phantoms else 'cells'} it was trained on"
    replacements = {
        "ORG/NAME": args.hub_model_id,
        "# NAME": f"# {name}",
        "SIZE": size,
        "CHANNELS": ", ".join(pipeline.vqvae.config.channel_names),
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
