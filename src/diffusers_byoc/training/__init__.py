from .checkpoints import CheckpointError, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .hardware import fair_num_threads, fastest_precision, is_cpu_training, keep_freed_memory
from .interruptions import Termination, follow_launcher, ignore_termination
from .latents import CachedLatents, cache_latents, encode_batches, latent_statistics
from .losses import (
    adaptive_weight,
    adversarial_loss,
    adversarial_surrogate,
    diffusion_loss,
    discriminator_loss,
    draw_channel_timesteps,
    drop_conditions,
    min_snr_weights,
    reconstruction_loss,
)
from .settings import StageSettings
from .stage import Stage
from .validation import validate_autoencoder, validate_diffusion


__all__ = [
    "CachedLatents",
    "CheckpointError",
    "Stage",
    "StageSettings",
    "Termination",
    "adaptive_weight",
    "adversarial_loss",
    "adversarial_surrogate",
    "cache_latents",
    "diffusion_loss",
    "discriminator_loss",
    "draw_channel_timesteps",
    "drop_conditions",
    "encode_batches",
    "fair_num_threads",
    "fastest_precision",
    "find_checkpoint",
    "follow_launcher",
    "ignore_termination",
    "is_cpu_training",
    "keep_freed_memory",
    "latent_statistics",
    "list_checkpoints",
    "load_checkpoint",
    "min_snr_weights",
    "reconstruction_loss",
    "save_checkpoint",
    "validate_autoencoder",
    "validate_diffusion",
]
