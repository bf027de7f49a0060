"""One job, run: its commands in this process, and what is noted of them."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import nn

from ...evaluation import has_classes
from ...publishing.card import RUN_RECORD
from ...training.checkpoints import checkpoint_step, list_checkpoints, read_record
from ...training.hardware import processor_seconds
from .. import evaluate, train, train_baseline
from ..evaluate_run import load_pipeline
from .plan import Command, Job


MAINS = {"byoc-train": train.main, "byoc-train-baseline": train_baseline.main, "byoc-evaluate": evaluate.main}


def run_commands(job: Job, commands: Sequence[tuple[Command, Mapping[str, Any]]]) -> dict[str, Any]:
    """Run a job's commands with their further arguments.

    Returns:
        Of a training "effort", of an evaluation "speed", of a "tune" job its "score", None if there is none, as its
        training left the finite numbers.
    """
    found = {}
    for command, more in commands:
        try:
            MAINS[command.name](command.argv(**more))
        except FloatingPointError as error:
            if job.kind != "tune":
                raise
            return found | {"score": None, "reason": str(error)}
        if command.name == "byoc-evaluate":
            metrics = json.loads((Path(more["output_dir"]) / "metrics.json").read_text(encoding="utf-8"))
            if job.criterion is None:
                found["speed"] = measure_speed(command, more)
            else:
                found["score"] = metrics["summary"]["generated"][job.criterion]["mean"]
        else:
            found["effort"] = training_effort(Path(more["output_dir"]))
    return found


def training_effort(run: Path) -> dict[str, dict[str, float]]:
    """Of each stage of a run, in their order: "steps", "samples" of all processes, "seconds", "learning_rate"."""
    effort = {}
    for stage in json.loads((run / RUN_RECORD).read_text(encoding="utf-8")):
        last = list_checkpoints(run / stage)[-1]
        record, steps = read_record(last), checkpoint_step(last)
        samples = steps * record["train_batch_size"] * record["gradient_accumulation_steps"]
        effort[stage] = {"steps": steps, "samples": samples} | {
            name: record[name] for name in ("seconds", "learning_rate")
        }
    return effort


def measure_speed(command: Command, more: Mapping[str, Any]) -> dict[str, Any]:
    """What generating costs: "parameters", "seconds_per_cell" of the faster of two batches, and "device".

    On a CPU seconds are of this process, by thread, whatever else the machine does.
    """
    args = command.parse(**more)
    device = PartialState().device
    pipeline = load_pipeline(args, device)
    batch_size, seconds = min(args.batch_size, args.num_samples), math.inf
    arguments = {"class_labels": 0} if has_classes(pipeline) else {}
    if args.num_inference_steps is not None:
        arguments["num_inference_steps"] = args.num_inference_steps
    now = processor_seconds if device.type == "cpu" else time.perf_counter
    for seed in range(2):
        started = now()
        pipeline(batch_size, generator=torch.Generator().manual_seed(seed), **arguments)  # ends on the CPU
        seconds = min(seconds, now() - started)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU, {torch.get_num_threads()} thread(s)"
    speed = {"parameters": count_parameters(pipeline), "seconds_per_cell": seconds / batch_size}
    return speed | {"batch_size": batch_size, "device": name}


def count_parameters(pipeline: DiffusionPipeline) -> int:
    """Of all networks of a pipeline, of a GAN of its generator alone."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(
        parameter.numel() for network in networks for parameter in getattr(network, "generator", network).parameters()
    )
