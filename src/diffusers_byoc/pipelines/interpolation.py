"""From one cell, drug or dose to another: spherical through the noise, linear through the conditions."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


def spherical_path(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Noise on the great circle from `start` to `end`, which keeps the length that noise has.

    Args:
        start: (C, d, h, w) standard normal.
        end: likewise.
        shares: (N,) of the way, in [0, 1].

    Returns:
        (N, C, d, h, w).
    """
    cosine = torch.dot(start.flatten(), end.flatten()) / (start.norm() * end.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    shares = shares.to(start).view(-1, 1, 1, 1, 1)
    if angle < 1e-4:  # the same noise
        return torch.lerp(start[None], end[None], shares)
    return (torch.sin((1 - shares) * angle) * start + torch.sin(shares * angle) * end) / torch.sin(angle)


def draw_ends(
    shape: Sequence[int], generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
) -> tuple[Tensor, bool, int]:
    """The noise at both ends of a path.

    Args:
        shape: (C, d, h, w).
        generator: two, one for each end; one, for the noise that all frames share; None for two noises of no seed.
        latents: (2, C, d, h, w), or (1, C, d, h, w) for all frames, instead.

    Returns:
        (2, C, d, h, w) float32 on the CPU; whether the ends differ; and a seed for what else the frames draw.

    Raises:
        ValueError: for other numbers of generators or another shape.
    """
    generators = generator if isinstance(generator, list) else [generator]
    if latents is not None:
        if len(generators) > 1 or latents.shape[1:] != torch.Size(shape) or len(latents) not in (1, 2):
            raise ValueError(
                f"Expected latents (1 or 2, {', '.join(map(str, shape))}) and at most one generator, got"
                f" {tuple(latents.shape)} and {len(generators)}. Give the noise at both ends, or of all frames."
            )
        noise = latents.float().cpu()
    elif generator is None:
        noise = torch.randn(2, *shape)
    elif len(generators) in (1, 2):
        noise = torch.cat([randn_tensor((1, *shape), generator=each, dtype=torch.float32) for each in generators])
    else:
        raise ValueError(f"Expected one generator, or one for each end, got {len(generators)}. Give one or two.")
    source = generators[0]
    device = "cpu" if source is None else source.device
    seed = int(torch.randint(2**62, (), generator=source, device=device))
    return noise.expand(2, *shape), len(noise) == 2, seed
