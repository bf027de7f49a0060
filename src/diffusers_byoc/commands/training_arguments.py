"""Arguments of every command that trains, and presets of them; nothing heavy."""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .data_arguments import positive


PRESETS = Path(__file__).parent / "presets"
FLAG: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}


def apply_preset(
    parser: argparse.ArgumentParser, argv: list[str] | None, folder: Path, networks: tuple[str, ...]
) -> tuple[dict[str, Any], Path]:
    """Make the `arguments` of the preset that `argv` names the defaults of `parser`.

    Args:
        parser: has `--preset`.
        argv: the command line.
        folder: of the presets that have names.
        networks: names of what else a preset may hold: overrides of the models' configurations.

    Returns:
        All that the preset holds, and its file.
    """
    preset = parser.parse_known_args(argv)[0].preset
    path = folder / f"{preset}.json" if (folder / f"{preset}.json").is_file() else Path(preset)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        parser.error(f"Expected --preset {known} or a JSON file, got {preset}. Give one of these.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        parser.error(f"Expected a preset in JSON, got {path} ({error}). Correct the file.")
    if unknown := set(config) - {"arguments", *networks}:
        known = ", ".join(("arguments", *networks))
        parser.error(f"Expected {known} in a preset, got {sorted(unknown)} in {path}. Correct the name.")
    # without what is required, which a preset cannot know
    defaults = {action.dest for action in parser._actions if action.dest != "help"}
    if unknown := set(config.get("arguments", {})) - defaults:
        parser.error(f"Expected arguments of this command, got {sorted(unknown)} in {path}. Correct the name.")
    parser.set_defaults(**config.get("arguments", {}))
    return config, path


def given_arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """What the command line itself says, without defaults and presets."""
    absent = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name: value for name, value in vars(given).items() if value is not absent}


def spread_over_stages(
    args: argparse.Namespace, given: Mapping[str, Any], stages: Iterable[str], names: Iterable[str]
) -> None:
    """Values for all stages to each stage that was given none of its own, from one source (preset, command line)."""
    names = list(names)
    for stage in stages:
        for name in names:
            own = f"{stage}_{name}"
            if own in given or name in given:
                setattr(args, own, given.get(own, given.get(name)))


def add_optimization_arguments(parser: argparse.ArgumentParser, title: str):
    """How networks are trained, whatever they are. Returns the group, for a command's own arguments."""
    group = parser.add_argument_group(title)
    add = group.add_argument
    help_text = "of a stage, after which it ends as after its last step; the learning-rate schedule ignores it"
    add("--max_train_minutes", type=float, help=help_text)
    help_text = "processor: of this process, by CPU thread, whatever else the machine does; with a GPU the clock"
    add("--minutes_of", choices=["clock", "processor"], default="clock", help=help_text)
    add("--mixed_precision", choices=["auto", "no", "fp16", "bf16"], default="auto", help="auto: the fastest here")
    add("--allow_tf32", **FLAG, help="faster float32 products on NVIDIA GPUs since Ampere, of 10 bits' precision")
    add("--num_cpu_threads", type=positive, help="per process, without a GPU (default: a fair share of all cores)")
    add("--optimizer", choices=["adam", "adamw", "rmsprop"], default="adam")
    add("--use_8bit_adam", **FLAG, help="8-bit optimizer states, by bitsandbytes")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.99)
    add("--adam_weight_decay", type=float, default=0.0)
    add("--lr_warmup_steps", type=int, default=0)
    add("--max_grad_norm", type=float, default=1.0, help="0 clips nothing")
    add("--gradient_accumulation_steps", type=positive, default=1)
    return group


def add_license_arguments(add, name: str) -> None:
    """What a card says of rights, by the `add_argument` of a parser or group; `name` is that of the weights' own."""
    add(name, help="of the weights, as the Hub names it: cc-by-4.0 (default: apache-2.0 if trained on phantoms)")
    add("--data_license", help="of the cells, in words")


def add_output_arguments(parser: argparse.ArgumentParser):
    """What a run leaves, in which rhythm, and where to. Returns the group of checkpoints, logs and samples."""
    group = parser.add_argument_group("checkpoints, logs, samples")
    add = group.add_argument
    add("--checkpointing_steps", type=positive, default=5000)
    add("--checkpoints_total_limit", type=positive, default=2)
    add("--resume_from_checkpoint", help='"latest", or the name of a checkpoint')
    add("--report_to", choices=["tensorboard", "wandb", "all"], default="tensorboard", help="all: both")
    add("--validation_steps", type=positive, default=200, help="steps between validation losses and pictures")
    add("--num_samples", type=positive, default=8, help="cells to generate for the report")
    help_text = "the report's cell is brighter than this (default: Otsu's; membrane: 0.05)"
    add("--cell_threshold", type=float, help=help_text)

    add = parser.add_argument_group("publishing").add_argument
    add("--push_to_hub", **FLAG, help="upload the pipeline, its card and its report")
    add("--hub_model_id", help="NAME or ORGANISATION/NAME (default: the name of --output_dir)")
    add("--hub_private_repo", **FLAG)
    add_license_arguments(add, "--hub_license")
    return group
