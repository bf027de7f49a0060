"""A run of training: the stages, what they resume with, and what comes after them."""

import argparse
import copy
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from safetensors import SafetensorError

from ..models import MultiCodebookVQModel, TextureUNet3D
from ..models.fingerprint import fingerprint_weights
from ..pipelines import BYOCPipeline
from ..pipelines.conditions import num_condition_features
from ..training import Stage, StageSettings
from ..training.autoguidance import Autoguidance
from ..training.checkpoints import find_checkpoint, read_record
from ..training.settings import configuration
from ..training.stages.autoencoder import train_autoencoder
from ..training.stages.diffusion import train_diffusion
from ..training.stages.distillation import train_distillation
from ..training.stages.texture import train_texture
from ..training.starting_weights import take_unet_weights
from ..whole_files import lock_folder
from .command_line import one_line_errors
from .train_arguments import NETWORKS, set_train_steps
from .train_checks import check_arguments
from .train_networks import (
    make_autoencoder,
    make_noise_scheduler,
    make_texture_unet,
    make_unet,
    settings_of,
    stages_of,
)
from .train_pretrained import (
    in_known_classes,
    keeps_unet,
    load_pretrained,
    load_weak_unet,
    measure_or_take_conditions,
    what_is_dropped,
)
from .training_runs import (
    check_resumable,
    data_inputs,
    finish_run,
    prepare_upload,
    read_training_cells,
    start_processes,
    write_record,
)


logger = get_logger(__name__, log_level="INFO")


def train(args: argparse.Namespace) -> None:
    """Train as `train_arguments.parse_args` understood the command line; mistakes end in one line."""
    state = start_processes()
    with one_line_errors(ValueError, OSError, ImportError):
        pretrained = load_pretrained(args) if args.pretrained else None
        vqvae = check_arguments(args, state.device, pretrained)
        check_stages_resumable(args, state.num_processes, dict.fromkeys(stages_of(args), run_inputs(args)))
    with one_line_errors(OSError, SafetensorError):  # a full disk, a folder in use, a checkpoint of another run
        with lock_folder(args.output_dir) if state.is_main_process else nullcontext():
            run(args, state, vqvae, pretrained)
    state.destroy_process_group()


def run(
    args: argparse.Namespace, state: PartialState, vqvae: MultiCodebookVQModel, pretrained: BYOCPipeline | None = None
) -> None:
    """The stages, the report and the upload."""
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    resumes = args.stage in ("texture", "diffusion") or args.resume_from_checkpoint is not None
    cells, held_out_cells, data = read_training_cells(args, state, vqvae.config.channel_names, resumes)
    set_train_steps(args, len(cells), state.num_processes)
    with one_line_errors(ValueError):
        if keeps_unet(args):
            cells, held_out_cells = (
                part and in_known_classes(args, pretrained, part) for part in (cells, held_out_cells)
            )
        conditions = measure_or_take_conditions(args, cells, pretrained)
        sizes = (len(cells.class_names), num_condition_features(conditions or ()))
        inputs = {stage: stage_inputs(args, stage, vqvae, *sizes) | {"data": data} for stage in stages_of(args)}
        weak_unet = load_weak_unet(args, vqvae, cells.class_names, conditions) if args.weak_unet else None
    check_stages_resumable(args, state.num_processes, inputs)
    prepare_upload(args, state)
    if pretrained and "diffusion" in stages_of(args) and not (args.reset_unet or keeps_unet(args)):
        for argument, what in what_is_dropped(args, pretrained).items():
            logger.info(f"The U-Net of {args.pretrained} was told {what}, this one will not be: {argument} keeps it.")
    if state.is_main_process:
        write_record(args, stages_of(args), NETWORKS, data, cells, state.num_processes)

    if "autoencoder" in stages_of(args):
        with Stage(output_dir, "autoencoder", settings_of(args, "autoencoder"), inputs["autoencoder"]) as stage:
            vqvae = pretrained.vqvae if pretrained else make_autoencoder(args)
            vqvae = train_autoencoder(stage, vqvae, cells, held_out_cells)
    if "texture" in stages_of(args):
        settings = settings_for_autoencoder(args, "texture", vqvae)
        with Stage(output_dir, "texture", settings, inputs["texture"]) as stage:
            texture_unet = (pretrained and pretrained.texture_unet) or make_texture_unet(args, vqvae)
            train_texture(stage, texture_unet, vqvae, cells, held_out_cells)
    if "diffusion" in stages_of(args):
        texture_unet = None
        if args.with_texture:
            trained_here = (output_dir / "texture_unet").is_dir()
            texture_unet = (
                TextureUNet3D.from_pretrained(output_dir / "texture_unet") if trained_here else pretrained.texture_unet
            )
        settings = settings_for_autoencoder(args, "diffusion", vqvae)
        with Stage(output_dir, "diffusion", settings, inputs["diffusion"]) as stage:
            unet = pretrained.unet if args.train_lora else make_unet(args, vqvae, *sizes)
            if pretrained and not args.train_lora and not args.reset_unet:
                take_unet_weights(unet, pretrained.unet, pretrained.config.label2id, cells.class_names)
            autoguidance = None
            if weak_unet:
                interval = (args.autoguidance_start, args.autoguidance_stop)
                autoguidance = Autoguidance(copy.deepcopy(unet), weak_unet, args.autoguidance_scale, *interval)
            train_diffusion(
                stage,
                unet,
                make_noise_scheduler(args),
                vqvae,
                cells,
                held_out_cells,
                texture_unet,
                conditions,
                autoguidance,
            )
        if state.is_main_process:
            pipeline = BYOCPipeline.from_pretrained(args.pretrained if args.train_lora else output_dir)
            if args.train_lora:
                pipeline.load_lora_weights(output_dir)
            pipeline.to(state.device)  # what a user will load
            finish_run(args, pipeline, cells, describe_training(args), started)
    if "distillation" in stages_of(args):
        settings = settings_of(args, "distillation")
        with Stage(output_dir, "distillation", settings, inputs["distillation"]) as stage:
            train_distillation(stage, pretrained, make_noise_scheduler(args), cells)
        if state.is_main_process:
            pipeline = BYOCPipeline.from_pretrained(output_dir).to(state.device)
            finish_run(args, pipeline, cells, describe_training(args), started)


def settings_for_autoencoder(args: argparse.Namespace, stage: str, vqvae: MultiCodebookVQModel) -> StageSettings:
    """`settings_of`; after another autoencoder was trained in the same run, the stage begins anew."""
    settings = settings_of(args, stage)
    if args.stage == "all" and is_of_another_autoencoder(settings, Path(args.output_dir) / stage, vqvae):
        logger.info(f"The autoencoder is not the one that the {stage} was trained on: the {stage} begins anew.")
        settings = replace(settings, resume_from_checkpoint=None)
    return settings


def run_inputs(args: argparse.Namespace) -> dict:
    """What decides every stage: the cells, and the pipeline that the run begins with."""
    names = ("pretrained", "lora_class", "reset_unet", "weak_unet")
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    if args.weak_unet:
        given |= {name: vars(args)[name] for name in ("autoguidance_scale", "autoguidance_start", "autoguidance_stop")}
    return data_inputs(args) | given


def stage_inputs(
    args: argparse.Namespace, stage: str, vqvae: MultiCodebookVQModel, num_classes: int, num_features: int
) -> dict:
    """What decides a stage beside its settings: how cells are prepared, how its networks are configured."""
    if stage == "autoencoder":
        return run_inputs(args) | configuration("vqvae", vqvae.config)
    if stage == "distillation":  # its checkpoints know the teacher's weights
        return run_inputs(args)
    if stage == "texture":
        with torch.device("meta"):
            texture_unet = make_texture_unet(args, vqvae)
        return run_inputs(args) | configuration("texture_unet", texture_unet.config)
    with torch.device("meta"):
        unet = make_unet(args, vqvae, num_classes, num_features)
    networks = configuration("unet", unet.config) | configuration("scheduler", make_noise_scheduler(args).config)
    scaling = {f"vqvae.{name}": vqvae.config[name] for name in ("latent_scaling", "latent_range")}
    return run_inputs(args) | networks | scaling


def check_stages_resumable(args: argparse.Namespace, num_processes: int, inputs: dict[str, dict]) -> None:
    """`check_resumable` for every stage of this run, with its `inputs`."""
    for stage in stages_of(args):
        check_resumable(Path(args.output_dir) / stage, settings_of(args, stage), num_processes, inputs[stage])


def is_of_another_autoencoder(settings: StageSettings, directory: Path, vqvae: MultiCodebookVQModel) -> bool:
    """Whether the checkpoint to resume was trained on the latents of other weights than `vqvae` has."""
    path = find_checkpoint(directory, settings.resume_from_checkpoint)
    fingerprint = fingerprint_weights(vqvae)
    return path is not None and read_record(path).get("autoencoder", fingerprint) != fingerprint


def describe_training(args: argparse.Namespace) -> str:
    """For the report and the card: what was done in this run."""
    parts = []
    for stage in stages_of(args):
        settings = settings_of(args, stage)
        time_limit = f" or {settings.max_train_minutes:g} minutes" if settings.max_train_minutes else ""
        steps = f"{settings.max_train_steps} steps{time_limit}"
        parts.append(f"{steps} of the {stage} (learning rate {settings.learning_rate})")
    if args.stage == "distillation":
        method = args.distillation_method.replace("_", " ")
        teacher = f"{args.num_teacher_steps} steps of {args.pretrained}" if args.num_teacher_steps else args.pretrained
        parts.append(f"from {teacher} to {args.num_distilled_steps} steps ({method})")
    if args.weak_unet:
        parts.append(f"autoguidance {args.autoguidance_scale:g} away from {args.weak_unet}")
    adapter = f"as an adapter of {args.pretrained}" if args.train_lora else ""
    adapter += f" from its class {args.lora_class}" if args.lora_class else ""
    return ", ".join(filter(None, [*parts, adapter, f"seed {args.seed}"]))
