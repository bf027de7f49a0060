"""Losses on cells that are not trained on; the same cells, noise and timesteps every time, shared by the processes."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..models import MultiCodebookVQModel
from ..models.quantizer import usage_and_perplexity
from ..randomness import step_generator
from .latents import CachedLatents
from .losses import diffusion_loss, reconstruction_loss


_NUM_TIMESTEPS = 4  # a cell


@torch.no_grad()
def validate_autoencoder(
    accelerator: Accelerator, vqvae: MultiCodebookVQModel, cells: Dataset, max_cells: int
) -> dict[str, float]:
    """How the first `max_cells` of `cells` pass the autoencoder.

    Args:
        accelerator: gives autocast and the processes.
        vqvae: unwrapped.
        cells: items ``{"volumes": (M, D, H, W)}`` in [-1, 1].
        max_cells: how many of them.

    Returns:
        `validation/reconstruction`, the mean squared error; for each codebook NAME `validation/usage/NAME`, the share
        of the codes that these cells use, and `validation/perplexity/NAME`.
    """
    was_training = vqvae.training
    vqvae.eval()
    rows = range(accelerator.process_index, min(len(cells), max_cells), accelerator.num_processes)
    total = torch.zeros(2, device=accelerator.device)
    num_codes = vqvae.config.num_vq_embeddings
    counts = torch.zeros(len(vqvae.codebooks), num_codes, device=accelerator.device)
    for batch in DataLoader(Subset(cells, rows), batch_size=4):
        volumes = batch["volumes"].to(accelerator.device)
        with accelerator.autocast():
            # autocast cannot rebuild a dataclass
            reconstruction, _, _, indices = vqvae(volumes, return_dict=False)
        for number, codes in zip(vqvae.codebook_numbers, indices.unbind(1), strict=True):
            counts[number] += torch.bincount(codes.flatten(), minlength=num_codes)
        total += len(volumes) * torch.stack([reconstruction_loss(reconstruction, volumes), torch.ones_like(total[0])])
    vqvae.train(was_training)
    losses = {"validation/reconstruction": _mean(accelerator, total)}
    counts = accelerator.reduce(counts, reduction="sum")
    for name, count in zip(vqvae.codebook_names, counts, strict=True):
        usage, perplexity = usage_and_perplexity(count)
        losses |= {f"validation/usage/{name}": usage.item(), f"validation/perplexity/{name}": perplexity.item()}
    return losses


@torch.no_grad()
def validate_diffusion(
    accelerator: Accelerator,
    unet: nn.Module,
    scheduler,
    vqvae: MultiCodebookVQModel,
    latents: CachedLatents,
    class_labels: Sequence[int] | None,
    seed: int,
    loss_type: str = "l1",
    snr_gamma: float | None = None,
    conditions: Tensor | None = None,
) -> dict[str, float]:
    """`validation/diffusion`: the training loss of every cell at four timesteps, evenly apart.

    Args:
        accelerator: gives autocast and the processes.
        unet: unwrapped, with the weights to judge.
        scheduler: adds the noise.
        vqvae: normalises the latents.
        latents: of the cells held out.
        class_labels: of the same cells; None for an unconditional model.
        seed: of the noise.
        loss_type: see `diffusion_loss`.
        snr_gamma: see `diffusion_loss`.
        conditions: (N, P) of the same cells, as the U-Net takes them; None for a model without.
    """
    was_training = unet.training
    unet.eval()
    num_steps = len(scheduler)
    middles = (torch.arange(_NUM_TIMESTEPS) * 2 + 1) * num_steps // (2 * _NUM_TIMESTEPS)
    timesteps = middles.to(accelerator.device)
    total = torch.zeros(2, device=accelerator.device)
    for row in range(accelerator.process_index, len(latents), accelerator.num_processes):
        clean = vqvae.normalize_latents(latents[[row]].to(accelerator.device)).expand(_NUM_TIMESTEPS, -1, -1, -1, -1)
        noise = torch.randn(clean.shape, generator=step_generator(seed, row, "validation")).to(accelerator.device)
        labels = None
        if class_labels is not None:
            labels = torch.full((_NUM_TIMESTEPS,), class_labels[row], device=accelerator.device)
        vectors = None
        if conditions is not None:
            vectors = conditions[row].to(accelerator.device).expand(_NUM_TIMESTEPS, -1)
        with accelerator.autocast():
            loss = diffusion_loss(unet, scheduler, clean, noise, timesteps, labels, loss_type, snr_gamma, vectors)
        total += torch.stack([loss, torch.ones_like(loss)])
    unet.train(was_training)
    return {"validation/diffusion": _mean(accelerator, total)}


def _mean(accelerator: Accelerator, total: Tensor) -> float:
    loss, count = accelerator.reduce(total, reduction="sum").tolist()
    return loss / count
