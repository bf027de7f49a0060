"""What surrounds the stages of every command that trains: its cells, its record, its report, its upload."""

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from .. import __version__
from ..data import Cells
from ..publishing import create_repository, prepare_folder, upload_pipeline
from ..publishing.card import RUN_RECORD
from ..training import StageSettings, fair_num_threads, follow_launcher, is_cpu_training
from ..training.checkpoints import check_record, find_checkpoint
from ..training.hardware import machine_name
from ..training.report import write_report
from ..whole_files import remove_left_overs, whole_or_absent
from .cells import read_cells, split_for_training
from .command_line import one_line_errors


PACKAGES = ("torch", "diffusers", "accelerate", "safetensors", "numpy")
logger = get_logger(__name__, log_level="INFO")
Settings = TypeVar("Settings", bound=StageSettings)


def start_processes() -> PartialState:
    """Logs, the launcher's end, and this process among those of the run."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    follow_launcher()
    return PartialState(cpu=is_cpu_training())


def make_settings(settings_class: type[Settings], args: argparse.Namespace, stage: str) -> Settings:
    """Each field from the argument of its name, `STAGE_NAME` wins; its default where there is no such argument."""
    values, names = vars(args), [field.name for field in fields(settings_class)]
    own = {name: values[f"{stage}_{name}"] for name in names if f"{stage}_{name}" in values}
    return settings_class(**{name: (values | own)[name] for name in names if name in values or name in own})


def check_machine(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse arithmetic and launchers that no stage can work with.

    Raises:
        ValueError: saying which.
    """
    if args.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("Expected a GPU for --mixed_precision fp16, got a CPU. Say bf16, no or auto.")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "Expected DDP or DeepSpeed, got FSDP: the moving average needs whole weights. Use DeepSpeed's ZeRO-2."
        )


def data_inputs(args: argparse.Namespace) -> dict:
    """The arguments that make other cells of the same files, by name; split and files are checked elsewhere."""
    names = ["sample_size", "voxel_size_um", "oversize", "label", "image_column", "label_column", "streaming"]
    if not (args.train_data_dir or args.dataset_name):
        names += ["num_phantoms", "phantom_doses"]
    if args.streaming:  # whose order depends on them
        names += ["dataloader_num_workers", "shuffle_buffer_size"]
    names += ["condition_columns"] if "condition_columns" in args else []  # which not every generator takes
    return {name: getattr(args, name) for name in names}


def check_resumable(directory: Path, settings: StageSettings, num_processes: int, inputs: Mapping[str, Any]) -> None:
    """Refuse what `Stage.resume` would refuse, before cells are read, trained on, or the run's record is replaced.

    Args:
        directory: of the stage's checkpoints.
        settings: of the stage.
        num_processes: of the run.
        inputs: of the stage.

    Raises:
        CheckpointError: naming the argument.
        FileNotFoundError: if a checkpoint is named that does not exist.
    """
    path = find_checkpoint(directory, settings.resume_from_checkpoint)
    if path is not None:
        check_record(path, settings.decisive(num_processes) | inputs, settings.max_train_steps)


def read_training_cells(
    args: argparse.Namespace, state: PartialState, channel_names: Sequence[str], resumes: bool
) -> tuple[Cells, Cells | None, dict]:
    """The cells to train on, those held out, if any, and what tells the data of a run from others.

    Args:
        args: of the three groups of `data_arguments`, and `output_dir`.
        state: of the processes.
        channel_names: of the model.
        resumes: see `split_for_training`.
    """
    if state.is_main_process:
        remove_left_overs(Path(args.output_dir))
    with one_line_errors(ValueError, ImportError):
        columns = vars(args).get("condition_columns", ())
        everything = read_cells(args, tuple(channel_names), args.streaming, columns, args.dataloader_num_workers)
        cells, held_out_cells = split_for_training(args, everything, args.output_dir, resumes)
    num_held_out = len(held_out_cells) if held_out_cells else 0
    logger.info(f"{len(cells)} cells, {num_held_out} more held out: {', '.join(cells.class_names)}")
    data = {"fingerprint": everything.population.fingerprint, "num_cells": len(cells), "num_held_out": num_held_out}
    return cells, held_out_cells, data


def prepare_upload(args: argparse.Namespace, state: PartialState) -> None:
    """Make the repository to push to, if any: a wrong token is better found now than after days."""
    if args.push_to_hub and state.is_main_process:
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        args.hub_model_id = create_repository(name, args.hub_private_repo)


def write_record(
    args: argparse.Namespace,
    stages: Sequence[str],
    networks: Sequence[str],
    data: dict,
    cells: Cells,
    num_processes: int,
) -> None:
    """Note what the stages of this run are made with in OUTPUT_DIR/arguments.json, beside stages of earlier runs.

    Args:
        args: all arguments.
        stages: of this run.
        networks: names of those arguments that are overrides of the models' configurations.
        data: of `read_training_cells`.
        cells: that are trained on.
        num_processes: of the run.
    """
    path = Path(args.output_dir) / RUN_RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    arguments = {name: value for name, value in sorted(vars(args).items()) if name not in networks}
    for name in ("dataset_name", "pretrained"):
        if arguments.get(name) and Path(arguments[name]).exists():  # a/b may be one of the Hub's: say which, for good
            arguments[name] = str(Path(arguments[name]).resolve())
    record = {
        "arguments": arguments,
        "networks": {name: getattr(args, name) for name in networks},
        "versions": {"python": platform.python_version(), "diffusers_byoc": __version__}
        | {name: version(name) for name in PACKAGES},
        "data": data,
        "cells": {
            "class_names": sorted({cells.class_names[label] for label in cells.labels}),
            "voxel_size_um": cells.voxel_size_um or cells.processor.voxel_size_um,
            "is_phantom": cells.is_phantom,
        },
        "hardware": machine_name(args.num_cpu_threads or fair_num_threads()),  # as each stage sets it
        "num_processes": num_processes,
    }
    known |= dict.fromkeys(stages, record)
    with whole_or_absent(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")


def finish_run(
    args: argparse.Namespace,
    pipeline: DiffusionPipeline,
    cells: Cells,
    training: str,
    started: float,
) -> None:
    """The report of a trained pipeline, and its upload, if asked for.

    Args:
        args: `output_dir`, and of the report and the upload.
        pipeline: as a user will load it, on the device to generate on.
        cells: that it was trained on.
        training: what was done, for the report.
        started: `time.perf_counter()` when the run began.
    """
    origin = "phantoms" if cells.is_phantom else "cells"
    minutes = (time.perf_counter() - started) / 60
    options = {"num_samples": args.num_samples, "seed": args.seed, "cell_threshold": args.cell_threshold}
    names = (cells.class_names[label] for label in sorted(set(cells.labels)))
    what = f"{len(cells)} {origin} ({', '.join(names)})"
    write_report(
        pipeline, cells, args.output_dir, f"Trained on {what}: {training}, in {minutes:.1f} minutes.", **options
    )
    if args.push_to_hub:
        with tempfile.TemporaryDirectory() as folder:
            licenses = {"license": args.hub_license, "data_license": args.data_license}
            prepare_folder(args.output_dir, folder, args.hub_model_id, **licenses)
            upload_pipeline(folder, args.hub_model_id)
