from .checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from .latents import encode_batches, latent_statistics
from .losses import adaptive_weight, adversarial_loss, diffusion_loss, discriminator_loss, reconstruction_loss
from .processes import check_finite, fair_num_threads, fastest_precision, is_cpu_training, mean_losses
from .randomness import StepBatches, batch_indices, process_share, step_generator


__all__ = [
    "StepBatches",
    "adaptive_weight",
    "adversarial_loss",
    "batch_indices",
    "check_finite",
    "diffusion_loss",
    "discriminator_loss",
    "encode_batches",
    "fair_num_threads",
    "fastest_precision",
    "is_cpu_training",
    "latent_statistics",
    "list_checkpoints",
    "load_checkpoint",
    "mean_losses",
    "process_share",
    "reconstruction_loss",
    "save_checkpoint",
    "step_generator",
]
