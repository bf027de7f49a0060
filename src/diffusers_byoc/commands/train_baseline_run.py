"""A run of a baseline's training: its model from arguments, its stage, the report and the upload."""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from ..baselines import HAGAN, WGAN, AlphaGAN, BaselinePipeline, GANModel
from ..training import Stage, StageSettings
from ..training.optimizers import optimizer_class
from ..training.settings import configuration
from ..training.stage import uses_deepspeed
from ..training.stages.alpha_gan import AlphaGANSettings, train_alpha_gan
from ..training.stages.ha_gan import HAGANSettings, train_ha_gan
from ..training.stages.w_gan import WGANSettings, train_w_gan
from ..whole_files import lock_folder
from .train_baseline_arguments import NETWORKS
from .training_runs import (
    check_machine,
    check_resumable,
    data_inputs,
    finish_run,
    make_settings,
    one_line_errors,
    prepare_upload,
    read_training_cells,
    start_processes,
    write_record,
)


# the model of each baseline, its settings, and what trains it
GANS = {
    "ha_gan": (HAGAN, HAGANSettings, train_ha_gan),
    "w_gan": (WGAN, WGANSettings, train_w_gan),
    "alpha_gan": (AlphaGAN, AlphaGANSettings, train_alpha_gan),
}


def train(args: argparse.Namespace) -> None:
    """Train as `train_baseline_arguments.parse_args` understood the command line; mistakes end in one line."""
    state = start_processes()
    with one_line_errors(ValueError, OSError, ImportError):
        check_machine(args, state.device)
        if uses_deepspeed():
            raise ValueError(f"Expected DDP, got DeepSpeed, for the several optimizers of {args.baseline}. Use DDP.")
        optimizer_class(settings_of(args))
        with torch.device("meta"):  # no memory, no random numbers
            model = make_model(args)
        inputs = data_inputs(args) | configuration("model", model.config)
        check_resumable(Path(args.output_dir) / args.baseline, settings_of(args), state.num_processes, inputs)
    with one_line_errors(ValueError, OSError, SafetensorError):
        with lock_folder(args.output_dir) if state.is_main_process else nullcontext():
            run(args, state, inputs)
    state.destroy_process_group()


def run(args: argparse.Namespace, state: PartialState, inputs: dict) -> None:
    """The stage, the report and the upload; `inputs` decide it beside its settings."""
    started = time.perf_counter()
    output_dir, settings = Path(args.output_dir), settings_of(args)
    channel_names = inputs["model.channel_names"]
    resumes = args.resume_from_checkpoint is not None
    cells, held_out_cells, data = read_training_cells(args, state, channel_names, resumes)
    inputs = inputs | {"data": data}
    check_resumable(output_dir / args.baseline, settings, state.num_processes, inputs)
    prepare_upload(args, state)
    if state.is_main_process:
        write_record(args, [args.baseline], NETWORKS, data, state.num_processes)

    with Stage(output_dir, args.baseline, settings, inputs) as stage:
        GANS[args.baseline][2](stage, make_model(args), cells)
    if state.is_main_process:
        pipeline = BaselinePipeline.from_pretrained(output_dir).to(state.device)  # what a user will load
        training = f"{stage.step} steps of {args.baseline} (learning rate {settings.learning_rate}), seed {args.seed}"
        finish_run(args, pipeline, cells, held_out_cells, training, started)


def settings_of(args: argparse.Namespace) -> StageSettings:
    return make_settings(GANS[args.baseline][1], args, args.baseline)


def make_model(args: argparse.Namespace) -> GANModel:
    return GANS[args.baseline][0](sample_size=args.sample_size, **args.model)
