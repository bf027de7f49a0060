"""What the stages of the GANs share: noise, networks that stand still, pictures, and the pipeline at the end."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..baselines import BaselinePipeline, GANModel
from ..data import Cells
from ..randomness import process_share
from .stage import Stage


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Losses go through these networks and leave no gradient in them."""
    for network in networks:
        network.requires_grad_(False)
    try:
        yield
    finally:
        for network in networks:
            network.requires_grad_(True)


def draw_latents(stage: Stage, model: GANModel, count: int = 1) -> tuple[Tensor, ...]:
    """`count` times the noise (B, latent_dim) of this process's batch: drawn for all processes, then shared out."""
    accelerator, batch_size = stage.accelerator, stage.settings.train_batch_size
    shape = (count, batch_size * accelerator.num_processes, *model.latent_shape)
    drawn = torch.randn(shape, generator=stage.generator("latents"))
    return tuple(
        process_share(latents, accelerator.process_index, accelerator.num_processes).to(accelerator.device)
        for latents in drawn
    )


def draw_shares(stage: Stage, purpose: str) -> Tensor:
    """Numbers (B,) in [0, 1) for this process's batch: where a gradient penalty is taken."""
    accelerator = stage.accelerator
    drawn = torch.rand(stage.settings.train_batch_size * accelerator.num_processes, generator=stage.generator(purpose))
    return process_share(drawn, accelerator.process_index, accelerator.num_processes).to(accelerator.device)


@torch.no_grad()
def log_generated(stage: Stage, model: GANModel, **rows: Tensor) -> None:
    """Show four volumes of the same noise every time, as a pipeline would make them, below `rows` (B, M, D, H, W)."""
    generator = torch.Generator().manual_seed(stage.settings.seed)
    latents = torch.randn(4, *model.latent_shape, generator=generator).to(stage.accelerator.device)
    was_training = model.training
    with stage.accelerator.autocast():
        volumes = model.eval().generator(latents)
    model.train(was_training)
    stage.log_volumes(rows | {"generated": volumes}, model.config.channel_names)


def save_gan(stage: Stage, model: GANModel, cells: Cells) -> BaselinePipeline:
    """The pipeline of a trained model, also saved to OUTPUT_DIR."""
    model = stage.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    processor_config = dict(cells.processor.config) | {"voxel_size_um": cells.voxel_size_um}
    pipeline = BaselinePipeline(model, volume_processor_config=processor_config)
    if stage.accelerator.is_main_process:
        pipeline.save_pretrained(stage.output_dir)
    return pipeline
