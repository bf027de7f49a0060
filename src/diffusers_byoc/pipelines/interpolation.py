"""From one cell, drug or dose to another: spherical through the noise, linear through the conditions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .class_labels import prepare_class_labels, read_class_labels, whole_number
from .conditions import read_conditions


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
        ValueError: for other numbers of generators, another shape, or noise and its opposite.
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
        noise = torch.cat([randn_tensor((1, *shape), each, each.device, torch.float32).cpu() for each in generators])
    else:
        raise ValueError(f"Expected one generator, or one for each end, got {len(generators)}. Give one or two.")
    is_moving = not torch.equal(noise[0], noise[-1])
    if is_moving and torch.allclose(noise[0], -noise[-1], atol=1e-3):
        raise ValueError(
            "Expected noise with one way from end to end, got its opposite, to which all great circles lead. Take"
            " other noise for one end."
        )
    source = generators[0]
    device = "cpu" if source is None else source.device
    seed = int(torch.randint(2**62, (), generator=source, device=device))
    return noise.expand(2, *shape), is_moving, seed


def path_batches(
    pipeline,
    num_frames: int,
    batch_size: int,
    class_labels: Any,
    conditions: Mapping[str, Any] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
) -> Iterator[dict[str, Any]]:
    """Arguments of the pipeline's calls that make the frames of a path, `batch_size` at a time.

    Args:
        pipeline: a `BYOCPipeline`.
        num_frames, batch_size, class_labels, conditions, generator, latents: of `BYOCPipeline.interpolate`.

    Raises:
        ValueError: for arguments that fit neither each other nor the model, or if both ends are the same.
    """
    # 1. both ends
    if whole_number(num_frames) < 2 or whole_number(batch_size) < 1:
        raise ValueError(
            f"Expected num_frames of at least 2 and batch_size of at least 1, got {num_frames!r} and"
            f" {batch_size!r}. Raise them."
        )
    config = pipeline.unet.config
    shape = (config.num_channels * config.latent_channels, *(config.sample_size,) * 3)
    noise, is_moving, seed = draw_ends(shape, generator, latents)
    weights, values = prepare_class_labels(pipeline, read_class_labels(class_labels), 2, "cpu"), {}
    if weights is not None:
        if not weights.is_floating_point():
            weights = F.one_hot(weights, config.num_class_embeds).float()
        is_moving |= bool((weights[0] != weights[1]).any())
    if conditions is not None and pipeline.config.conditions:
        values = read_conditions(pipeline.config.conditions, conditions, 2)
        is_moving |= any((value[0] != value[1]).any() for value in values.values())
    if not is_moving:
        raise ValueError(
            "Expected two ends that differ, got the same noise, class and conditions at both. Give two generators,"
            " two class_labels, or two values of a condition."
        )

    # 2. the way between them
    shares = torch.linspace(0, 1, num_frames)
    path = {"latents": spherical_path(*noise, shares)}
    if weights is not None:
        path["class_labels"] = torch.lerp(weights[0], weights[1], shares[:, None])
    steps = shares.double().numpy()[:, None]
    numbers = {  # a rounding error may not lie beyond the ends
        name: (start + steps * (end - start)).clip(np.minimum(start, end), np.maximum(start, end))
        for name, (start, end) in values.items()
    }

    # 3. frames
    for first in range(0, num_frames, batch_size):
        batch = slice(first, min(first + batch_size, num_frames))
        yield {name: way[batch] for name, way in path.items()} | {
            "num_samples": batch.stop - batch.start,
            "conditions": {name: way[batch] for name, way in numbers.items()} if values else conditions,
            "generator": [torch.Generator().manual_seed(seed) for _ in range(batch.start, batch.stop)],
        }
