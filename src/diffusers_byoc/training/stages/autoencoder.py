"""Stage one (BYOC, section 3.1, eq. 6-8): the autoencoder with a codebook for every channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...data import Cells
from ...models import MultiCodebookVQModel, PatchDiscriminator3D
from ...randomness import process_share
from ..batches import augment, remaining_batches
from ..crops import crop_cells
from ..losses import (
    adaptive_weight,
    adversarial_loss,
    adversarial_surrogate,
    discriminator_loss,
    reconstruction_loss,
)
from ..optimizers import make_optimizer
from ..settings import StageSettings
from ..stage import Stage
from ..validation import validate_autoencoder


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(StageSettings):
    """Settings of the autoencoder's training, beside those of any stage.

    Args:
        discriminator_start: step at which the discriminator joins.
        discriminator_weight: of the adversarial gradient against reconstruction's.
        crop_size: edge of crops around the cell to train on, voxels; None trains on whole volumes, which are mostly
            background.
        latent_noise: the greatest deviation of noise on the latents that the decoder sees, in units of their own in
            the cells of this process's batch; each cell's is drawn below it, evenly.
    """

    learning_rate: float = 3e-4
    discriminator_start: int = 10_000
    discriminator_weight: float = 0.1
    crop_size: int | None = None
    latent_noise: float = 0.0


def train_autoencoder(
    stage: Stage,
    vqvae: MultiCodebookVQModel,
    cells: Cells,
    held_out_cells: Cells | None = None,
) -> MultiCodebookVQModel:
    """Train `vqvae` on `cells`.

    Args:
        stage: entered, with `AutoencoderSettings`.
        vqvae: untrained.
        cells: to train on.
        held_out_cells: for the validation losses; None for none.

    Returns:
        The trained autoencoder, also saved to OUTPUT_DIR/vqvae.
    """
    settings, accelerator = stage.settings, stage.accelerator

    # 1. networks and optimizers
    vqvae.set_latent_statistics(None, None)  # of what its encoders are not any more
    discriminator = PatchDiscriminator3D(vqvae.config.num_channels)
    if settings.gradient_checkpointing:
        vqvae.enable_gradient_checkpointing()
    if settings.compile:  # in place: the names of the weights stay as they are
        torch._functorch.config.donated_buffer = False  # the adaptive weight goes through the graph a second time
        vqvae.compile()
        discriminator.compile()
    max_steps = settings.max_train_steps
    optimizer, lr_scheduler = make_optimizer(settings, vqvae.parameters(), max_steps)
    discriminator_optimizer, discriminator_lr_scheduler = make_optimizer(
        settings, discriminator.parameters(), max_steps - settings.discriminator_start
    )
    vqvae, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        vqvae, discriminator, optimizer, discriminator_optimizer
    )
    stage.resume(lr_scheduler, discriminator_lr_scheduler)
    bare_vqvae = accelerator.unwrap_model(vqvae)

    # 2. data: the batches that this process has left
    batches = remaining_batches(cells, settings, stage.first_step)
    if held_out_cells is not None:
        validation_cells = held_out_cells.indexable(settings.num_validation_cells, settings.seed)

    # 3. train
    vqvae.train()
    for step, batch in stage.steps(batches):
        volumes = augment(batch["volumes"].to(accelerator.device), settings, stage.micro_step)
        if settings.crop_size is not None:
            places = torch.rand(len(volumes) * accelerator.num_processes, generator=stage.generator("crops"))
            places = process_share(places, accelerator.process_index, accelerator.num_processes)
            volumes = crop_cells(volumes, settings.crop_size, places)
        if stage.micro_step == 0:
            with torch.no_grad(), accelerator.autocast():
                latents = bare_vqvae.encode(volumes).latents
            bare_vqvae.initialize_codebooks(latents, stage.generator("codes"))

        # autoencoder: reconstruction, commitment, and from some step on the adversary
        with accelerator.accumulate(vqvae, discriminator):
            noise = draw_latent_noise(stage, bare_vqvae, volumes) if settings.latent_noise > 0 else None
            reconstruction, commit_loss, latents, indices = vqvae(volumes, return_dict=False, latent_noise=noise)
            loss_reconstruction = reconstruction_loss(reconstruction, volumes)
            loss = loss_reconstruction + commit_loss
            losses = {"loss/reconstruction": loss_reconstruction, "loss/commitment": commit_loss}
            if step > settings.discriminator_start:
                adversarial, fake_logits = adversarial_surrogate(reconstruction, discriminator)
                weight = adaptive_weight(loss_reconstruction, adversarial, bare_vqvae.decoder.conv_out.weight)
                loss = loss + settings.discriminator_weight * weight * adversarial
                losses["loss/adversarial"] = adversarial_loss(fake_logits)
            stage.apply(loss, vqvae, optimizer, lr_scheduler)

            # discriminator
            if step > settings.discriminator_start:
                loss = discriminator_loss(discriminator(volumes), fake_logits)
                stage.apply(
                    loss, discriminator, discriminator_optimizer, discriminator_lr_scheduler, "discriminator's loss"
                )
                losses["loss/discriminator"] = loss

        # codebooks: moving averages and revival
        codebook_logs = bare_vqvae.update_codebooks(latents, indices, stage.generator("revival"))
        if stage.is_accumulating:
            continue

        # end of a step
        logs = stage.log(losses, codebook_logs | {"lr": lr_scheduler.get_last_lr()[0]})
        usages = "/".join(f"{value:.0%}" for name, value in logs.items() if name.startswith("usage"))
        stage.progress.set_postfix(mse=f"{logs['loss/reconstruction']:.4f}", codes=usages)
        if stage.is_validating:
            if held_out_cells is not None:
                num_cells = settings.num_validation_cells
                accelerator.log(validate_autoencoder(accelerator, bare_vqvae, validation_cells, num_cells), step)
            if accelerator.is_main_process:
                rows = {"cells": volumes, "reconstructed": reconstruction.detach()}
                stage.log_volumes(rows, bare_vqvae.config.channel_names)

    # 4. save
    vqvae = accelerator.unwrap_model(vqvae, keep_fp32_wrapper=False).eval()
    if accelerator.is_main_process:
        vqvae.save_pretrained(stage.output_dir / "vqvae")
    return vqvae


def draw_latent_noise(stage: Stage, vqvae: MultiCodebookVQModel, volumes: Tensor) -> Tensor:
    """(B, M*n, d, h, w) for the latents of `volumes`: this process's share of what is drawn for all."""
    config, accelerator = vqvae.config, stage.accelerator
    grid = (size // vqvae.downsampling_factor for size in volumes.shape[2:])
    shape = (len(volumes) * accelerator.num_processes, config.num_channels * config.latent_channels, *grid)
    generator = stage.generator("latent noise")
    deviations = stage.settings.latent_noise * torch.rand(shape[0], 1, 1, 1, 1, generator=generator)
    noise = deviations * torch.randn(shape, generator=generator)
    return process_share(noise, accelerator.process_index, accelerator.num_processes).to(accelerator.device)
