from .checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from .latents import encode_batches, latent_statistics
from .losses import adaptive_weight, adversarial_loss, diffusion_loss, discriminator_loss, reconstruction_loss
from .randomness import StepBatches, batch_indices, process_share, step_generator


__all__ = [
    "StepBatches",
    "adaptive_weight",
    "adversarial_loss",
    "batch_indices",
    "diffusion_loss",
    "discriminator_loss",
    "encode_batches",
    "latent_statistics",
    "list_checkpoints",
    "load_checkpoint",
    "process_share",
    "reconstruction_loss",
    "save_checkpoint",
    "step_generator",
]
