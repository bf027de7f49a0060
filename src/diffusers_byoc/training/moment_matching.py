"""Moment matching (Salimans et al. 2024): few ancestral steps, whose latents the teacher expects on average."""

import torch
from torch import Tensor, nn

from .distillation import check_prediction_type, clean_latents, noise_level
from .losses import add_noise


# of the signal-to-noise ratio in the weights: beyond it, details would count for more than the cell
_MAX_SNR = 5.0


def moment_matching_losses(
    unet: nn.Module,
    auxiliary_unet: nn.Module,
    teacher: nn.Module,
    scheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    stops: Tensor,
    step_noise: Tensor,
    class_labels: Tensor | None = None,
    conditions: Tensor | None = None,
    channel_timesteps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two scalars: what the student's gradient is that of, and the auxiliary network's squared error.

    The student makes clean latents of noisy ones, an ancestral step with them leads to `stops`. There the teacher
    says which clean latents such noisy ones have in the data, on average; the auxiliary network learns which the
    student made them of. Where the two differ, the student's latents are moved. Its loss is no error, and may be
    negative.

    Args:
        unet: the student.
        auxiliary_unet: begins as the teacher.
        teacher: a denoiser; predicts what both others predict.
        scheduler: a diffusers scheduler with `add_noise` and `alphas_cumprod`; its `prediction_type` is
            "v_prediction" or "sample".
        latents: (B, M*n, d, h, w) normalised.
        noise: (B, M*n, d, h, w) standard normal.
        timesteps: (B,) int64, at which the student's steps begin.
        stops: (B,) int64, at least 0 and below `timesteps`.
        step_noise: (B, M*n, d, h, w) standard normal, of the step.
        class_labels, conditions: of all three U-Nets, see `diffusion_loss`.
        channel_timesteps: (B, M) of `draw_channel_timesteps`; a channel that is not at its sample's timestep stays
            where it is, and is not moved. None: all channels are.

    Raises:
        ValueError: for another `prediction_type`.

    Source: Salimans et al. 2024 (moment matching), algorithm 2, both networks at every step.
    """
    check_prediction_type(scheduler)
    at, at_stops, is_denoised = timesteps, stops, torch.ones_like(timesteps, dtype=torch.bool)[:, None]
    if channel_timesteps is not None:
        at, is_denoised = channel_timesteps, channel_timesteps == timesteps[:, None]  # (B, M)
        at_stops = torch.where(is_denoised, stops[:, None], at)
    goes = is_denoised.repeat_interleave(latents.shape[1] // is_denoised.shape[1], 1)[:, :, None, None, None]
    given = {"class_labels": class_labels, "conditions": conditions}
    given = {name: condition for name, condition in given.items() if condition is not None}

    def denoise(network: nn.Module, noisy: Tensor, noisy_at: Tensor, levels: Tensor) -> Tensor:
        prediction = network(noisy, noisy_at, **given, return_dict=False)[0].float()
        return clean_latents(scheduler, prediction, levels, noisy)

    # 1. the student's step
    noisy = add_noise(scheduler, latents, noise, at)
    clean = denoise(unet, noisy, at, timesteps)
    stepped = ancestral_step(scheduler, clean.detach(), timesteps, stops, noisy, step_noise)
    stepped = torch.where(goes, stepped, noisy)

    # 2. what the data and the student have there, on average; weighed as errors of v are
    with torch.no_grad():
        of_data = denoise(teacher, stepped, at_stops, stops)
    of_student = denoise(auxiliary_unet, stepped, at_stops, stops)
    alpha, sigma = noise_level(scheduler, stops)
    weight = goes * ((alpha / sigma).square().clamp(max=_MAX_SNR) + 1)
    loss = (weight * clean * (of_student.detach() - of_data)).mean()
    auxiliary_loss = (of_student - clean.detach()).square() + (of_student - of_data).square()
    return loss, (weight * auxiliary_loss).mean()


def ancestral_step(scheduler, clean: Tensor, start: Tensor, stop: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Latents (B, M*n, d, h, w) at the timesteps `stop` (B,), from those at `start`, if the clean ones are `clean`.

    Source: Ho et al. 2020, eq. 6 and 7, over several timesteps.
    """
    alpha, sigma = noise_level(scheduler, start)
    end_alpha, end_sigma = noise_level(scheduler, stop)
    ratio = alpha / end_alpha
    variance = sigma.square() - (ratio * end_sigma).square()  # of the noise between the two
    mean = (ratio * end_sigma.square() * latents + end_alpha * variance * clean) / sigma.square()
    return mean + variance.clamp(min=0).sqrt() * end_sigma / sigma * noise
