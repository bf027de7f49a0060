"""The paper's losses, as pure functions."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from .autoguidance import Autoguidance


# A power of two, which changes no digit. The gradient of a mean over the voxels of a batch is below fp16's smallest
# number, and so zero where autocast computes in it; so much larger it is not, and its sums stay far below the largest.
_FP16_SCALE = 2.0**12


def reconstruction_loss(reconstruction: Tensor, volumes: Tensor) -> Tensor:
    """Mean squared error, the same weight for every channel. Both (B, M, D, H, W); returns a scalar (BYOC eq. 6)."""
    return F.mse_loss(reconstruction.float(), volumes.float())


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator, a scalar.

    Source: BYOC, eq. 8, with the sign of the second term as in its source (Esser et al. 2021): eq. 8 prints
    ReLU(1 - D(x̂)), which would reward calling generated volumes real.
    """
    return (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()) / 2


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """The generator's side of the hinge game, -E[D(x̂)], a scalar; eq. 8 leaves it out."""
    return -fake_logits.float().mean()


def adversarial_surrogate(reconstruction: Tensor, discriminator: nn.Module) -> tuple[Tensor, Tensor]:
    """A stand-in for `adversarial_loss` that has the same gradient, and the discriminator's logits.

    The loss must be differentiated twice, for the adaptive weight and for the autoencoder's step. Instead of going
    back through the discriminator twice, its gradient g with respect to the reconstruction x̂ is computed once, here,
    and held fixed: the scalar sum(g x̂) has the gradient g, whoever differentiates it.

    Args:
        reconstruction: (B, M, D, H, W) x̂, with the autoencoder's graph.
        discriminator: gives a logit for every patch of it.

    Returns:
        The scalar, whose value means nothing, and the logits; their graph holds the discriminator and not the
        autoencoder, as `discriminator_loss` wants it.
    """
    fake = reconstruction.detach().requires_grad_()
    fake_logits = discriminator(fake.view_as(fake))  # hooks of FLOP counters and the like take no leaf
    # the gradient of the sum, divided in float32: fp16, where autocast computes in it, would lose that of the mean
    grad = torch.autograd.grad(-fake_logits.float().sum(), fake, retain_graph=True)[0]
    return (reconstruction.float() * (grad.float() / fake_logits.numel())).sum(), fake_logits


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Weight that gives the adversarial loss as large a gradient at `last_layer` as the reconstruction loss has.

    The gradients are those of the mean over all processes, so every process finds the weight of the whole batch.

    Args:
        reconstruction: scalar loss.
        adversarial: scalar loss.
        last_layer: weight of the decoder's last convolution.

    Returns:
        Scalar in [0, 1e4], without gradient.

    Source: Esser et al. 2021, eq. 7.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        scaled = loss * _FP16_SCALE
        grad = torch.autograd.grad(scaled, last_layer, retain_graph=True)[0].float().contiguous() / _FP16_SCALE
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        norms.append(grad.norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4)


def diffusion_loss(
    unet: nn.Module,
    scheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    class_labels: Tensor | None = None,
    loss_type: str = "l1",
    snr_gamma: float | None = None,
    conditions: Tensor | None = None,
    autoguidance: Autoguidance | None = None,
) -> Tensor:
    """Error of the predicted noise (or v, or sample, by the scheduler's `prediction_type`), a scalar.

    Args:
        unet: the denoiser.
        scheduler: a diffusers scheduler with `add_noise`.
        latents: (B, M*n, d, h, w) normalised.
        noise: (B, M*n, d, h, w) standard normal.
        timesteps: (B,) int64; or (B, M), of `draw_channel_timesteps`. What is clean has no error.
        class_labels: of the U-Net: (B,) int64, or weights of the classes, or None.
        loss_type: "l1" (Table 3) or "l2".
        snr_gamma: weigh every cell by `min_snr_weights` of its timestep; None weighs all alike.
        conditions: of the U-Net, (B, P), or None.
        autoguidance: moves the target away from what a weaker U-Net predicts; None leaves it.

    Raises:
        ValueError: for another `loss_type` or `prediction_type`.

    Source: BYOC, eq. 9 and 13, Table 3.
    """
    noisy_latents = add_noise(scheduler, latents, noise, timesteps)
    given = {"class_labels": class_labels, "conditions": conditions}
    given = {name: condition for name, condition in given.items() if condition is not None}
    prediction = unet(noisy_latents, timesteps, **given, return_dict=False)[0].float()
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        of_times = timesteps.clamp(min=0).flatten()
        target = scheduler.get_velocity(_parts(latents, timesteps), _parts(noise, timesteps), of_times)
        target = target.view_as(latents)
    elif prediction_type == "sample":
        target = latents
    else:
        raise ValueError(
            f"Expected prediction_type 'epsilon', 'v_prediction' or 'sample', got {prediction_type!r}. Choose one."
        )
    if autoguidance is not None:
        target = target + autoguidance.correction(noisy_latents, timesteps, len(scheduler), **given)
    if loss_type not in ("l1", "l2"):
        raise ValueError(f"Expected loss_type 'l1' or 'l2', got {loss_type!r}. Choose one.")
    error = (F.l1_loss if loss_type == "l1" else F.mse_loss)(prediction, target, reduction="none")
    weights = (timesteps.flatten() >= 0).float()
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps.clamp(min=0).flatten())
        weights = weights * min_snr_weights(snr, prediction_type, snr_gamma)
    return (_parts(error, timesteps).flatten(1).mean(1) * weights).mean()


def add_noise(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents, each channel at its own timestep where there are several.

    Args:
        scheduler: a diffusers scheduler with `add_noise`.
        latents: (B, M*n, d, h, w) normalised.
        noise: (B, M*n, d, h, w) standard normal.
        timesteps: (B,) int64, or (B, M); -1 adds nothing.

    Source: BYOC, eq. 9 and 12.
    """
    parts = _parts(latents, timesteps)
    noisy = scheduler.add_noise(parts, _parts(noise, timesteps), timesteps.clamp(min=0).flatten())
    return torch.where((timesteps < 0).view(-1, 1, 1, 1, 1), parts, noisy).view_as(latents)


def _parts(latents: Tensor, timesteps: Tensor) -> Tensor:
    """(B, M*n, d, h, w) as what has one timestep each: (B*M, n, d, h, w), or as it is."""
    return latents.reshape(timesteps.numel(), -1, *latents.shape[2:])


def draw_channel_timesteps(timesteps: Tensor, chances: Tensor, share: float, last_timestep: int) -> Tensor:
    """A timestep for each channel: the same for all in most samples, as the paper has it, apart in a share of them.

    What is asked of a channel when sampling is that it is given, that it is left out, or that it is denoised with
    the others. So in a sample of the share one channel has the sample's timestep, and each other one is clean with
    probability 1/2, nothing but noise with 1/4, and at the same timestep with 1/4.

    Args:
        timesteps: (B,) int64 in [0, last_timestep], of the samples.
        chances: (B, M + 2) uniform in [0, 1).
        share: `channel_timesteps_prob` of the U-Net.
        last_timestep: of the scheduler, where all is noise.

    Returns:
        (B, M) int64; -1 is clean.

    Source: after Bao et al. 2023 (UniDiffuser), section 3.2, who draw independent timesteps.
    """
    num_channels = chances.shape[1] - 2
    timesteps = timesteps[:, None].expand(-1, num_channels)
    chance = chances[:, 2:]
    apart = timesteps.masked_fill(chance < 0.75, last_timestep).masked_fill(chance < 0.5, -1)
    is_denoised = F.one_hot((chances[:, 1] * num_channels).long(), num_channels).bool()
    is_apart = chances[:, :1] < share
    return torch.where(is_apart & ~is_denoised, apart, timesteps)


def flow_matching_loss(
    texture_unet: nn.Module, texture: Tensor, reconstruction: Tensor, noise: Tensor, times: Tensor
) -> Tensor:
    """Squared error of the velocity from texture to noise along a straight line, a scalar.

    Args:
        texture_unet: predicts it.
        texture: (B, M, D, H, W) in the network's units.
        reconstruction: (B, M, D, H, W) what it belongs to.
        noise: (B, M, D, H, W) standard normal.
        times: (B,) in [0, 1], how far on the way from texture to noise.

    Source: Lipman et al. 2023, eq. 23.
    """
    share = times[:, None, None, None, None]
    noisy = (1 - share) * texture + share * noise
    velocity = texture_unet(noisy, 1000 * times, reconstruction, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - texture)


def drop_conditions(
    class_labels: Tensor | None, conditions: Tensor | None, num_classes: int | None, chances: Tensor, share: float
) -> tuple[Tensor | None, Tensor | None]:
    """Leave a share of a batch without conditions, as classifier-free guidance needs it (Ho & Salimans 2022).

    With both kinds, so many samples lack both, and as many again each of the two alone, so that either may be left
    out when sampling.

    Args:
        class_labels: (B,) int64, or None.
        conditions: (B, P), or None.
        num_classes: how many; None without.
        chances: (B,) uniform in [0, 1).
        share: `conditioning_dropout_prob` of the U-Net.

    Returns:
        (B, num_classes) weights of the classes, 0 where dropped, and conditions with NaN where dropped; None for None.
    """
    has_both = class_labels is not None and conditions is not None
    if class_labels is not None:
        is_kept = chances >= (2 * share if has_both else share)
        class_labels = F.one_hot(class_labels, num_classes) * is_kept[:, None].float()
    if conditions is not None:
        is_dropped = chances < share
        if has_both:
            is_dropped |= (2 * share <= chances) & (chances < 3 * share)
        conditions = conditions.masked_fill(is_dropped[:, None], torch.nan)
    return class_labels, conditions


def min_snr_weights(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Weights (B,) that give the error of the clean sample the weight min(SNR, gamma) at every timestep.

    Args:
        snr: (B,) signal-to-noise ratios.
        prediction_type: what the network predicts. An error of the noise is sqrt(SNR) times that of the sample, one
            of v is sqrt(SNR + 1) times that; the weights of the squares are divided by it.
        gamma: above 0; the paper advises 5.

    Source: Hang et al. 2023, section 3.4 (epsilon, sample) and appendix (v).
    """
    scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return snr.clamp(max=gamma) / scale
