"""Progressive distillation (Salimans & Ho 2022): one step of the student goes as far as several of its teacher."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .losses import add_noise


def distillation_loss(
    unet: nn.Module,
    teacher: nn.Module,
    scheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    stride: int,
    num_substeps: int,
    class_labels: Tensor | None = None,
    conditions: Tensor | None = None,
    channel_timesteps: Tensor | None = None,
) -> Tensor:
    """Squared error of one DDIM step over `stride` timesteps, against `num_substeps` of the teacher, a scalar.

    Both start from the same noisy latents. The error is that of the prediction: of v, which weighs the error of the
    clean latents by SNR + 1, or of the clean latents themselves.

    Args:
        unet: the student.
        teacher: predicts what the student predicts.
        scheduler: a diffusers scheduler with `add_noise` and `alphas_cumprod`; its `prediction_type` is
            "v_prediction" or "sample".
        latents: (B, M*n, d, h, w) normalised.
        noise: (B, M*n, d, h, w) standard normal.
        timesteps: (B,) int64, from ``stride - 1``; one that is `stride` above -1 ends without noise.
        stride: timesteps of the student's step.
        num_substeps: of the teacher, at least 1.
        class_labels, conditions: of both U-Nets, see `diffusion_loss`.
        channel_timesteps: (B, M) of `draw_channel_timesteps`; a channel that is not at its sample's timestep stays
            where it is, in both, and has no error. None: all channels are.

    Raises:
        ValueError: for another `prediction_type`.

    Source: Salimans & Ho 2022, algorithm 2 (of two substeps), appendix G for the target.
    """
    check_prediction_type(scheduler)
    at, is_denoised = timesteps, torch.ones_like(timesteps, dtype=torch.bool)[:, None]
    if channel_timesteps is not None:
        at, is_denoised = channel_timesteps, channel_timesteps == timesteps[:, None]  # (B, M)
    goes = is_denoised.repeat_interleave(latents.shape[1] // is_denoised.shape[1], 1)[:, :, None, None, None]
    noisy_latents = add_noise(scheduler, latents, noise, at)
    given = {"class_labels": class_labels, "conditions": conditions}
    given = {name: condition for name, condition in given.items() if condition is not None}
    with torch.no_grad():
        reached = noisy_latents
        stops = [timesteps - stride * substep // num_substeps for substep in range(num_substeps + 1)]
        for start, stop in pairwise(stops):
            at_start = start if channel_timesteps is None else torch.where(is_denoised, start[:, None], at)
            prediction = teacher(reached, at_start, **given, return_dict=False)[0].float()
            stepped = ddim_step(scheduler, prediction, start, stop, reached)
            reached = torch.where(goes, stepped, reached)

    # the clean latents whose DDIM step over the whole stride ends where the teacher's steps do
    alpha, sigma = noise_level(scheduler, timesteps)
    end_alpha, end_sigma = noise_level(scheduler, timesteps - stride)
    ratio = end_sigma / sigma
    target = (reached - ratio * noisy_latents) / (end_alpha - ratio * alpha)
    if scheduler.config.prediction_type == "v_prediction":
        target = (alpha * noisy_latents - target) / sigma
    prediction = unet(noisy_latents, at, **given, return_dict=False)[0].float()
    return (goes * (prediction - target).square()).mean()


def ddim_step(scheduler, prediction: Tensor, start: Tensor, stop: Tensor, latents: Tensor) -> Tensor:
    """Latents (B, M*n, d, h, w) at the timesteps `stop` (B,), from those at `start`, without new noise.

    Source: Song et al. 2021, eq. 12, with a sigma of 0.
    """
    alpha, sigma = noise_level(scheduler, start)
    end_alpha, end_sigma = noise_level(scheduler, stop)
    clean = clean_latents(scheduler, prediction, start, latents)
    return end_alpha * clean + end_sigma * (latents - alpha * clean) / sigma


def clean_latents(scheduler, prediction: Tensor, timesteps: Tensor, latents: Tensor) -> Tensor:
    """What (B, M*n, d, h, w) `latents` at `timesteps` (B,) are without noise, if the U-Net's `prediction` is right."""
    if scheduler.config.prediction_type == "sample":
        return prediction
    alpha, sigma = noise_level(scheduler, timesteps)
    return alpha * latents - sigma * prediction


def check_prediction_type(scheduler) -> None:
    """Raise `ValueError` for a U-Net that predicts noise: it says nothing about clean latents where none is left."""
    if scheduler.config.prediction_type not in ("v_prediction", "sample"):
        raise ValueError(
            "Expected prediction_type 'v_prediction' or 'sample' for few steps, got"
            f" {scheduler.config.prediction_type!r}. Train the diffusion with one of these."
        )


def noise_level(scheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the clean latents and the standard deviation of the noise, (B, 1, 1, 1, 1) each.

    Timestep -1 is after the last step: 1 and 0.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)  # where `add_noise` has put it already
    levels = torch.cat([alphas_cumprod, alphas_cumprod.new_ones(1)])  # [-1] is the last
    level = levels[timesteps][:, None, None, None, None]
    return level.sqrt(), (1 - level).sqrt()
