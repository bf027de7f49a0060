"""Stage two trains on latents: encode the data set once, and say how the latents lie in the codebooks' ranges."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..models import MultiCodebookVQModel


@torch.no_grad()
def encode_batches(vqvae: MultiCodebookVQModel, batches: Iterable[Tensor]) -> Tensor:
    """Unquantised latents (N, M*n, d, h, w), float32 on the CPU, of batches of volumes (B, M, D, H, W) in [-1, 1]."""
    vqvae.eval()
    return torch.cat([vqvae.encode(volumes.to(vqvae.device)).latents.float().cpu() for volumes in batches])


@torch.no_grad()
def latent_statistics(vqvae: MultiCodebookVQModel, latents: Tensor) -> dict[str, float]:
    """How `latents` (N, M*n, d, h, w), unquantised, look to the diffusion.

    Returns:
        For each channel NAME: `latent_std/NAME`, the standard deviation after `normalize_latents` (far below 1 means
        that the noise schedule's signal-to-noise ratios are shifted), and `latent_outside/NAME`, the share of numbers
        outside [-1, 1] (which clipping a predicted sample would distort).
    """
    statistics = {}
    normalized = torch.cat([vqvae.normalize_latents(chunk.to(vqvae.device)).cpu() for chunk in latents.split(64)])
    for name, channel in zip(
        vqvae.config.channel_names, normalized.split(vqvae.config.latent_channels, dim=1), strict=True
    ):
        statistics[f"latent_std/{name}"] = channel.std().item()
        statistics[f"latent_outside/{name}"] = (channel.abs() > 1).float().mean().item()
    return statistics
