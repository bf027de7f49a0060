"""Autoguidance (Karras et al. 2024), learnt once in place of computed at every step."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Autoguidance:
    """What a U-Net predicts, moved on in the direction away from what a weaker one predicts.

    A denoiser that has not learnt all of its data errs towards their mean: thin parts are lost, cells are alike. A
    weaker one errs the same way, only further, so their difference says where the truth lies. A U-Net that is trained
    on the data and this difference needs one evaluation a step, and no weaker one any more.

    Args:
        unet: trained; stays as it is.
        weak_unet: of the same latents, classes and conditions, less trained or smaller; stays as it is.
        scale: 1 changes nothing, 2 goes as far beyond `unet` as it is from `weak_unet`.
        start, stop: between which shares of the way from noise to cell, as of diffusers' guiders. The first steps
            decide how large a cell is: with a large scale, sizes vary too much.

    Source: Karras et al. 2024 (autoguidance), eq. 5; Kynkäänniemi et al. 2024 for the interval; after Meng et al. 2023
    (guidance, distilled).
    """

    unet: nn.Module
    weak_unet: nn.Module
    scale: float = 1.3
    start: float = 0.0
    stop: float = 1.0

    def to(self, device: torch.device) -> None:
        """Move both networks, which need no gradients."""
        for network in (self.unet, self.weak_unet):
            network.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def correction(
        self, noisy_latents: Tensor, timesteps: Tensor, num_train_timesteps: int, **given: Tensor
    ) -> Tensor:
        """What to add to the target of the prediction, (B, M*n, d, h, w), 0 outside of the interval.

        Args:
            noisy_latents: (B, M*n, d, h, w).
            timesteps: (B,) int64, or (B, M), one for each channel.
            num_train_timesteps: of the schedule.
            given: `class_labels` and `conditions`, of both networks.
        """
        strong, weak = (
            network(noisy_latents, timesteps, **given, return_dict=False)[0].float()
            for network in (self.unet, self.weak_unet)
        )
        first, end = (num_train_timesteps - round(share * num_train_timesteps) for share in (self.start, self.stop))
        is_guided = (timesteps < first) & (timesteps >= end)
        is_guided = is_guided.view(len(timesteps), -1)  # (B, 1) or (B, M)
        features = noisy_latents.shape[1] // is_guided.shape[1]
        is_guided = is_guided.repeat_interleave(features, 1)[:, :, None, None, None]
        return (self.scale - 1) * is_guided * (strong - weak)
