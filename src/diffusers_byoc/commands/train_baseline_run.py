"""A run of a baseline's training: its model from arguments, its stages, the report and the upload."""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from safetensors import SafetensorError

from ..baselines import (
    HAGAN,
    WGAN,
    AlphaGAN,
    BaselinePipeline,
    GANModel,
    MedicalDiffusionDiscriminator,
    MedicalDiffusionUNet3D,
    MedicalDiffusionVQModel,
)
from ..training import Stage, StageSettings
from ..training.optimizers import optimizer_class
from ..training.settings import configuration
from ..training.stage import uses_deepspeed
from ..training.stages.alpha_gan import AlphaGANSettings, train_alpha_gan
from ..training.stages.ha_gan import HAGANSettings, train_ha_gan
from ..training.stages.medical_diffusion import (
    MedicalDiffusionAutoencoderSettings,
    MedicalDiffusionSettings,
    train_medical_autoencoder,
    train_medical_diffusion,
)
from ..training.stages.w_gan import WGANSettings, train_w_gan
from ..whole_files import lock_folder
from .command_line import one_line_errors
from .train_baseline_arguments import networks_of
from .training_runs import (
    check_machine,
    check_resumable,
    data_inputs,
    finish_run,
    make_settings,
    prepare_upload,
    read_training_cells,
    start_processes,
    write_record,
)


# the model of each baseline that is a GAN, its settings, and what trains it
GANS = {
    "ha_gan": (HAGAN, HAGANSettings, train_ha_gan),
    "w_gan": (WGAN, WGANSettings, train_w_gan),
    "alpha_gan": (AlphaGAN, AlphaGANSettings, train_alpha_gan),
}
# each stage of a run, and its settings
STAGES = {baseline: {baseline: settings_class} for baseline, (_, settings_class, _) in GANS.items()} | {
    "medical_diffusion": {"autoencoder": MedicalDiffusionAutoencoderSettings, "diffusion": MedicalDiffusionSettings}
}


def train(args: argparse.Namespace) -> None:
    """Train as `train_baseline_arguments.parse_args` understood the command line; mistakes end in one line."""
    state = start_processes()
    with one_line_errors(ValueError, OSError, ImportError):
        check_machine(args, state.device)
        if uses_deepspeed():
            raise ValueError(f"Expected DDP, got DeepSpeed, for the several optimizers of {args.baseline}. Use DDP.")
        settings = settings_of(args)
        optimizer_class(next(iter(settings.values())))
        with torch.device("meta"):  # no memory, no random numbers
            inputs = stage_inputs(args)
        check_stages_resumable(args, state.num_processes, inputs)
    with one_line_errors(ValueError, OSError, SafetensorError, ImportError):
        with lock_folder(args.output_dir) if state.is_main_process else nullcontext():
            run(args, state, inputs)
    state.destroy_process_group()


def run(args: argparse.Namespace, state: PartialState, inputs: dict[str, dict]) -> None:
    """The stages, the report and the upload; `inputs` decide each stage beside its settings."""
    started = time.perf_counter()
    output_dir, settings = Path(args.output_dir), settings_of(args)
    channel_names = next(iter(inputs.values()))["model.channel_names"]
    resumes = args.resume_from_checkpoint is not None
    cells, held_out_cells, data = read_training_cells(args, state, channel_names, resumes)
    inputs = {stage: inputs[stage] | {"data": data} for stage in settings}
    check_stages_resumable(args, state.num_processes, inputs)
    prepare_upload(args, state)
    if state.is_main_process:
        write_record(args, list(settings), networks_of(args.baseline), data, cells, state.num_processes)

    steps = {}
    if args.baseline == "medical_diffusion":
        with Stage(output_dir, "autoencoder", settings["autoencoder"], inputs["autoencoder"]) as stage:
            discriminator = make_discriminator(args)
            vqvae = train_medical_autoencoder(stage, make_model(args), discriminator, cells)
        steps["autoencoder"] = stage.step
        with Stage(output_dir, "diffusion", settings["diffusion"], inputs["diffusion"]) as stage:
            train_medical_diffusion(stage, make_unet(args, vqvae), make_noise_scheduler(args), vqvae, cells)
        steps["diffusion"] = stage.step
    else:
        with Stage(output_dir, args.baseline, settings[args.baseline], inputs[args.baseline]) as stage:
            GANS[args.baseline][2](stage, make_model(args), cells)
        steps[args.baseline] = stage.step
    if state.is_main_process:
        pipeline = BaselinePipeline.from_pretrained(output_dir).to(state.device)  # what a user will load
        parts = [f"{steps[name]} steps of {name} (learning rate {settings[name].learning_rate})" for name in steps]
        finish_run(args, pipeline, cells, f"{', '.join(parts)}, seed {args.seed}", started)


# ---------------------------------------------------------------------- networks and settings from arguments


def settings_of(args: argparse.Namespace) -> dict[str, StageSettings]:
    """Of every stage, in their order."""
    return {stage: make_settings(settings, args, stage) for stage, settings in STAGES[args.baseline].items()}


def make_model(args: argparse.Namespace) -> GANModel | MedicalDiffusionVQModel:
    models = {baseline: model for baseline, (model, *_) in GANS.items()} | {
        "medical_diffusion": MedicalDiffusionVQModel
    }
    return models[args.baseline](sample_size=args.sample_size, **args.model)


def make_discriminator(args: argparse.Namespace) -> MedicalDiffusionDiscriminator:
    return MedicalDiffusionDiscriminator(**{"num_channels": args.model.get("num_channels", 2)} | args.discriminator)


def make_unet(args: argparse.Namespace, vqvae: MedicalDiffusionVQModel) -> MedicalDiffusionUNet3D:
    latent_channels, sample_size = vqvae.latent_shape[:2]
    return MedicalDiffusionUNet3D(latent_channels, sample_size, **args.unet)


def make_noise_scheduler(args: argparse.Namespace) -> DDPMScheduler:
    # as in the authors' code, predicted latents are clipped to the codebook's range; but its last beta is 0.9999
    return DDPMScheduler(**({"beta_schedule": "squaredcos_cap_v2", "clip_sample": True} | args.scheduler))


def stage_inputs(args: argparse.Namespace) -> dict[str, dict]:
    """What decides each stage beside its settings: how cells are prepared, how its networks are configured."""
    model = make_model(args)
    inputs = dict.fromkeys(STAGES[args.baseline], data_inputs(args) | configuration("model", model.config))
    if args.baseline == "medical_diffusion":
        inputs["autoencoder"] = inputs["autoencoder"] | configuration("discriminator", make_discriminator(args).config)
        networks = configuration("unet", make_unet(args, model).config)
        inputs["diffusion"] = (
            inputs["diffusion"] | networks | configuration("scheduler", make_noise_scheduler(args).config)
        )
    return inputs


def check_stages_resumable(args: argparse.Namespace, num_processes: int, inputs: dict[str, dict]) -> None:
    """`check_resumable`, for every stage."""
    for stage, settings in settings_of(args).items():
        check_resumable(Path(args.output_dir) / stage, settings, num_processes, inputs[stage])
