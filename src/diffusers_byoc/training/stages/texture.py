"""The stage between the paper's two: what the autoencoder's codes cannot carry, learnt by flow matching on crops."""

from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel

from ...data import Cells
from ...models import MultiCodebookVQModel, TextureUNet3D
from ...models.fingerprint import fingerprint_weights
from ...pipelines.schedulers import make_texture_scheduler
from ...pipelines.texture import add_texture, is_connected
from ...randomness import process_share
from ..batches import augment, remaining_batches
from ..crops import crop_cells
from ..losses import flow_matching_loss
from ..optimizers import make_optimizer
from ..settings import StageSettings
from ..stage import Stage


MOST_APART = 0.02  # share of the training cells that may be of several pieces where generated cells shall be of one


@dataclass(frozen=True, kw_only=True)
class TextureSettings(StageSettings):
    """Settings of the texture's training, beside those of any stage.

    Args:
        crop_size: edge of the crops around the cell, voxels; a multiple of the autoencoder's and of the network's
            downsampling, of the latter alone with `decode_whole_cells`.
        decode_whole_cells: cut the crops out of decoded cells, which takes longer, where otherwise each is decoded
            alone and at its border the autoencoder knows less than it will.
        ema_decay: of the moving average of the weights, which is the model; it begins lower, (1 + step) / (10 + step).
    """

    learning_rate: float = 1e-3
    crop_size: int = 40
    decode_whole_cells: bool = False
    ema_decay: float = 0.999


def train_texture(
    stage: Stage,
    texture_unet: TextureUNet3D,
    vqvae: MultiCodebookVQModel,
    cells: Cells,
    held_out_cells: Cells | None = None,
) -> TextureUNet3D:
    """Train `texture_unet` on what `vqvae` loses of `cells`.

    Args:
        stage: entered, with `TextureSettings`.
        texture_unet: untrained.
        vqvae: trained; it stays as it is.
        cells: to train on.
        held_out_cells: for the pictures; None takes training cells.

    Returns:
        The trained network, also saved to OUTPUT_DIR/texture_unet.
    """
    settings, accelerator = stage.settings, stage.accelerator
    device = accelerator.device
    vqvae.to(device).requires_grad_(False).eval()

    # 1. network, optimizer, moving average
    set_texture_scale(texture_unet, vqvae, cells.indexable(32, settings.seed), device)
    many = cells.indexable(256, settings.seed)
    is_apart = [not is_connected(many[index]["volumes"]) for index in range(min(len(many), 256))]
    texture_unet.register_to_config(connected_cells=sum(is_apart) <= MOST_APART * len(is_apart))
    if settings.gradient_checkpointing:
        texture_unet.enable_gradient_checkpointing()
    if settings.compile:
        texture_unet.compile()
    optimizer, lr_scheduler = make_optimizer(settings, texture_unet.parameters(), settings.max_train_steps)
    texture_unet, optimizer = accelerator.prepare(texture_unet, optimizer)
    ema = EMAModel(texture_unet.parameters(), settings.ema_decay, foreach=True)
    stage.resume(lr_scheduler, ema, inputs={"autoencoder": fingerprint_weights(vqvae)})
    ema.to(device)
    bare_texture_unet = accelerator.unwrap_model(texture_unet)

    # 2. data
    batches = remaining_batches(cells, settings, stage.first_step)
    shown = (held_out_cells or cells).indexable(4, settings.seed)

    # 3. train
    texture_unet.train()
    global_batch_size = settings.train_batch_size * accelerator.num_processes
    for _, batch in stage.steps(batches):
        volumes = augment(batch["volumes"].to(device), settings, stage.micro_step)
        # drawn for all processes, then shared out, so that their number does not change the run
        generator = stage.generator("texture")
        places = torch.rand(global_batch_size, generator=generator)
        # towards the middle of the way, where the most is to be decided
        times = torch.randn(global_batch_size, generator=generator).sigmoid()
        noise = torch.randn(global_batch_size, volumes.shape[1], *(settings.crop_size,) * 3, generator=generator)
        places, times, noise = (
            process_share(x, accelerator.process_index, accelerator.num_processes).to(device)
            for x in (places, times, noise)
        )
        if not settings.decode_whole_cells:
            volumes = crop_cells(volumes, settings.crop_size, places)
        with torch.no_grad(), accelerator.autocast():
            reconstruction = vqvae.decode(vqvae.encode(volumes).latents).sample.float()
        if settings.decode_whole_cells:
            volumes, reconstruction = crop_cells(volumes, settings.crop_size, places, reconstruction)

        with accelerator.accumulate(texture_unet):
            texture = bare_texture_unet.texture(volumes, reconstruction)
            with accelerator.autocast():
                loss = flow_matching_loss(texture_unet, texture, reconstruction, noise, times)
            stage.apply(loss, texture_unet, optimizer, lr_scheduler)
        if stage.is_accumulating:
            continue

        # end of a step
        ema.step(texture_unet.parameters())
        logs = stage.log({"loss/texture": loss}, {"lr": lr_scheduler.get_last_lr()[0]})
        stage.progress.set_postfix(loss=f"{logs['loss/texture']:.4f}")
        if stage.is_validating and accelerator.is_main_process:
            ema.store(texture_unet.parameters())
            ema.copy_to(texture_unet.parameters())
            stage.log_volumes(show_texture(bare_texture_unet, vqvae, shown, device), vqvae.config.channel_names)
            ema.restore(texture_unet.parameters())
            texture_unet.train()

    # 4. the moving average is the model
    ema.copy_to(texture_unet.parameters())
    texture_unet = accelerator.unwrap_model(texture_unet, keep_fp32_wrapper=False).eval()
    if accelerator.is_main_process:
        texture_unet.save_pretrained(stage.output_dir / "texture_unet")
    return texture_unet


@torch.no_grad()
def set_texture_scale(texture_unet: TextureUNet3D, vqvae: MultiCodebookVQModel, cells, device) -> None:
    """Measure `texture_scale`, how far cells are from decoded cells where there is a cell, on up to 32 `cells`."""
    differences = []
    for index in range(min(len(cells), 32)):
        volumes = cells[index]["volumes"][None].to(device)
        decoded = vqvae.decode(vqvae.encode(volumes).latents).sample.float()
        differences.append((volumes - decoded)[volumes > -1])
    texture_unet.register_to_config(texture_scale=float(torch.cat(differences).square().mean().sqrt()))


@torch.no_grad()
def show_texture(texture_unet: TextureUNet3D, vqvae: MultiCodebookVQModel, cells, device) -> dict[str, torch.Tensor]:
    """Up to four cells, decoded, and with texture: rows of a picture."""
    texture_unet.eval()
    volumes = torch.stack([cells[index]["volumes"] for index in range(min(len(cells), 4))]).to(device)
    decoded = vqvae.decode(vqvae.encode(volumes).latents).sample
    generator = torch.Generator().manual_seed(0)
    textured = add_texture(texture_unet, make_texture_scheduler(), decoded, 8, generator)
    return {"cells": volumes, "decoded": decoded, "with texture": textured}
