"""Channels that a call is given: encoded, seen clean by the U-Net while it denoises the others, and returned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..volumes import UNIT_RANGE_TOLERANCE


CLEAN = -1  # the timestep after the last; the paper's t = 0


@dataclass(frozen=True)
class GivenChannels:
    """Latents of the channels that are given, and how the U-Net sees them.

    Args:
        latents: (B, M*n, d, h, w) float32, normalised; what is not given has no meaning.
        noise: (B, M*n, d, h, w) standard normal, seen in place of them where guidance leaves them out.
        is_given: (M,) bool.
        last_timestep: where all is noise.
        timestep: of the given channels, `CLEAN` or `last_timestep`.
    """

    latents: Tensor
    noise: Tensor
    is_given: Tensor
    last_timestep: int
    timestep: int = CLEAN

    @property
    def is_denoised(self) -> Tensor:
        """(M*n,) bool, the features of the other channels."""
        return ~self.is_given.repeat_interleave(self.latents.shape[1] // len(self.is_given))

    def left_out(self) -> "GivenChannels":
        """The same, seen as nothing but noise."""
        return replace(self, latents=self.noise, timestep=self.last_timestep)

    def place(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The U-Net's input: `sample` (B, M*n, d, h, w) with the given channels, and its timesteps (B, M)."""
        timesteps = torch.where(self.is_given, self.timestep, timestep.to(self.is_given.device))
        return self.join(sample[:, self.is_denoised]), timesteps.expand(len(sample), -1)

    def join(self, others: Tensor) -> Tensor:
        """The given channels' latents with those of the others (B, (M - number given)*n, d, h, w)."""
        latents = self.latents.clone()
        latents[:, self.is_denoised] = others
        return latents


def read_given_channels(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The volumes of a call's `given_channels`.

    Args:
        config: of the autoencoder.
        given: channel name -> (D, H, W) for all samples, or (B, D, H, W) for each, in [0, 1].

    Returns:
        name -> (1 or B, D, H, W) float32.

    Raises:
        ValueError: for other names, shapes, numbers of samples or intensities.
    """
    names, size = list(config["channel_names"]), config["sample_size"]
    if not isinstance(given, Mapping) or not given or set(given) - set(names):
        got = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"Expected given_channels {{name: volumes}} with names among {names}, got {got}. Give some.")
    volumes = {}
    for name, value in given.items():
        volume = torch.as_tensor(np.asarray(value) if not torch.is_tensor(value) else value).detach().float()
        volume = volume[None] if volume.ndim == 3 else volume
        if volume.ndim != 4 or tuple(volume.shape[1:]) != (size,) * 3 or not len(volume):
            raise ValueError(
                f"Expected volumes of {name} (B, {size}, {size}, {size}), one for each sample, or ({size}, {size},"
                f" {size}) for all, got {tuple(volume.shape)}. Bring crops to it by pipe.volume_processor."
            )
        low, high = volume.min().item(), volume.max().item()
        if not (low >= -UNIT_RANGE_TOLERANCE and high <= 1 + UNIT_RANGE_TOLERANCE):  # also catches NaN
            raise ValueError(
                f"Expected volumes of {name} in [0, 1], as the pipeline returns them, got [{low:g}, {high:g}]. Map"
                " those of pipe.volume_processor.preprocess with its postprocess."
            )
        volumes[name] = volume
    return volumes


def check_given_channels(
    pipeline,
    volumes: Mapping[str, Tensor],
    num_samples: int,
    num_steps: int,
    strength: float | None,
    keep_given: bool,
    output_type: str,
) -> None:
    """Refuse what contradicts each other, or the model.

    Args:
        pipeline: a `BYOCPipeline`.
        volumes: of `read_given_channels`; empty where nothing is given.
        num_samples, num_steps, strength, keep_given, output_type: of the call.

    Raises:
        ValueError: saying which.
    """
    names, given = list(pipeline.vqvae.config.channel_names), list(volumes)
    if wrong := sorted({len(volume) for volume in volumes.values()} - {1, num_samples}):
        raise ValueError(
            f"Expected one volume of {' and '.join(given)}, or one per sample ({num_samples}), got {wrong[0]}. Match"
            " their number."
        )
    if strength is not None:
        if set(given) != set(names):
            raise ValueError(
                f"Expected all channels in given_channels for strength, {names}, got {given}. Give all, or leave"
                " strength out."
            )
        if type(pipeline.scheduler).__name__ == "PNDMScheduler":  # counts its Runge-Kutta steps from the first call
            raise ValueError(
                "Expected a scheduler that can begin on the way for strength, got PNDMScheduler. Use"
                " DDIMScheduler.from_config(pipe.scheduler.config)."
            )
        if not 0 < strength <= 1 or round(strength * num_steps) < 1:
            raise ValueError(
                f"Expected a strength of at most 1 and at least one of {num_steps} steps, got {strength}. Raise it, or"
                " num_inference_steps."
            )
    elif given and set(given) == set(names):
        raise ValueError(
            f"Expected a channel to generate, or a strength to change all of them by, got all of {names} in"
            " given_channels. Leave one out, or say strength."
        )
    if keep_given and (strength is not None or not given or output_type == "latent"):
        got = f"strength {strength}, which changes them" if given else "none"
        got = got if strength is not None or not given else "output_type 'latent', where they are encoded"
        raise ValueError(f"Expected given_channels to keep for keep_given, got {got}. Leave keep_given out.")
    if given and strength is None and not pipeline.unet.config.channel_timesteps_prob:
        raise ValueError(
            f"Expected a model that was trained with a timestep for each channel to give it {given}, got one that has"
            " one for all. Train it with --channel_timesteps_prob (the weights of this one can begin it), or give all"
            " channels and a strength."
        )


def encode_given_channels(pipeline, volumes: Mapping[str, Tensor], num_samples: int, device: torch.device) -> Tensor:
    """Normalised latents (num_samples, M*n, d, h, w) float32 of `volumes`, of background in the other channels.

    Args:
        pipeline: a `BYOCPipeline`.
        volumes: of `read_given_channels`.
        num_samples: of the call.
        device: of the result.
    """
    vqvae = pipeline.vqvae
    size = vqvae.config.sample_size
    whole = torch.zeros(max(map(len, volumes.values())), vqvae.config.num_channels, size, size, size)
    for name, volume in volumes.items():
        whole[:, list(vqvae.config.channel_names).index(name)] = volume.clamp(0, 1)
    # each channel is encoded by itself: what the others hold has no effect
    latents = vqvae.encode((whole * 2 - 1).to(device, vqvae.dtype)).latents.float()
    return vqvae.normalize_latents(latents).expand(num_samples, -1, -1, -1, -1)


def return_given(pipeline, volumes: Mapping[str, Tensor], output: np.ndarray | Tensor) -> None:
    """Put the given volumes in their channels of `output` (num_samples, M, D, H, W), just as they came."""
    for name, volume in volumes.items():
        channel = list(pipeline.vqvae.config.channel_names).index(name)
        output[:, channel] = volume.to(output.device) if torch.is_tensor(output) else volume.cpu().numpy()


def begin(
    pipeline, volumes: Mapping[str, Tensor], noise: Tensor, num_steps: int, strength: float | None
) -> tuple[Tensor, Tensor, GivenChannels | None]:
    """Where denoising begins: in noise, with what is given beside it, or on the way (SDEdit, Meng et al. 2022).

    Args:
        pipeline: a `BYOCPipeline`; the timesteps of its scheduler are set.
        volumes: of `read_given_channels`, checked; empty where nothing is given.
        noise: (B, M*n, d, h, w) standard normal.
        num_steps: of the whole way.
        strength: share of it that is walked; None for all of it.

    Returns:
        The timesteps to walk; the latents (B, M*n, d, h, w) at the first of them, in the scheduler's units; and the
        channels that are given, None where there are none.
    """
    scheduler, latents = pipeline.scheduler, noise * pipeline.scheduler.init_noise_sigma
    if not volumes:
        return scheduler.timesteps, latents, None
    clean = encode_given_channels(pipeline, volumes, len(noise), noise.device)
    if strength is None:
        is_given = [name in volumes for name in pipeline.vqvae.config.channel_names]
        last_timestep = pipeline.config.noise_schedule["num_train_timesteps"] - 1
        given = GivenChannels(clean, noise, torch.tensor(is_given, device=noise.device), last_timestep)
        return scheduler.timesteps, given.join(latents[:, given.is_denoised]), given
    first = (num_steps - round(strength * num_steps)) * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps, scheduler.add_noise(clean, noise, timesteps[:1].expand(len(noise))), None
