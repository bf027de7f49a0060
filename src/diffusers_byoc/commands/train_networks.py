"""What a training is made of, from its arguments: stages, their settings, networks."""

import argparse

from diffusers import DDPMScheduler

from ..models import DualChannelUNet3D, MultiCodebookVQModel, TextureUNet3D
from ..training import StageSettings
from ..training.stages.autoencoder import AutoencoderSettings
from ..training.stages.diffusion import DiffusionSettings
from ..training.stages.distillation import DistillationSettings
from ..training.stages.texture import TextureSettings
from .train_arguments import STAGES
from .training_runs import make_settings


SETTINGS = {
    "autoencoder": AutoencoderSettings,
    "texture": TextureSettings,
    "diffusion": DiffusionSettings,
    "distillation": DistillationSettings,
}


def stages_of(args: argparse.Namespace) -> list[str]:
    """The stages to run, in their order."""
    stages = [stage for stage in STAGES if args.stage == stage or (args.stage == "all" and stage != "distillation")]
    return [stage for stage in stages if stage != "texture" or args.with_texture]


def settings_of(args: argparse.Namespace, stage: str) -> StageSettings:
    """Each field from the argument of its name; `STAGE_NAME` wins."""
    return make_settings(SETTINGS[stage], args, stage)


def make_autoencoder(args: argparse.Namespace) -> MultiCodebookVQModel:
    return MultiCodebookVQModel(sample_size=args.sample_size, **args.vqvae)


def make_texture_unet(args: argparse.Namespace, vqvae: MultiCodebookVQModel) -> TextureUNet3D:
    return TextureUNet3D(num_channels=vqvae.config.num_channels, **args.texture_unet)


def make_unet(
    args: argparse.Namespace, vqvae: MultiCodebookVQModel, num_classes: int, num_features: int = 0
) -> DualChannelUNet3D:
    return DualChannelUNet3D(
        num_channels=vqvae.config.num_channels,
        latent_channels=vqvae.config.latent_channels,
        sample_size=args.sample_size // vqvae.downsampling_factor,
        num_class_embeds=num_classes if args.class_conditional else None,
        class_embed_type="projection" if num_features else None,
        projection_class_embeddings_input_dim=num_features or None,
        channel_timesteps_prob=args.channel_timesteps_prob,
        conditioning_dropout_prob=args.conditioning_dropout_prob if args.class_conditional or num_features else 0.0,
        **args.unet,
    )


def make_noise_scheduler(args: argparse.Namespace) -> DDPMScheduler:
    # Nothing keeps the latents inside the codebook's range (the log says how many leave it): no clipping to it.
    schedule = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "leading"}
    return DDPMScheduler(**(schedule | args.scheduler))
