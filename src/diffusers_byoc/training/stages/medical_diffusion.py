"""MedicalDiffusion (Khader et al. 2023): its VQGAN, then its diffusion of the VQGAN's latents."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

from ...baselines import (
    BaselinePipeline,
    MedicalDiffusionDiscriminator,
    MedicalDiffusionUNet3D,
    MedicalDiffusionVQModel,
)
from ...baselines.medical_diffusion_discriminator import (
    feature_matching_loss,
    load_perceptual_network,
    perceptual_loss,
    select_slices,
)
from ...data import Cells
from ...models.fingerprint import fingerprint_weights
from ...randomness import process_share
from ..adversarial import draw_shares, frozen
from ..batches import augment, cells_to_encode_once, latent_batches, remaining_batches
from ..latents import cache_latents
from ..losses import adversarial_loss, discriminator_loss
from ..optimizers import make_optimizer
from ..settings import StageSettings
from ..stage import Stage


@dataclass(frozen=True, kw_only=True)
class MedicalDiffusionAutoencoderSettings(StageSettings):
    """Settings of the VQGAN's training, beside those of any stage; as in the authors' command, where not said.

    Args:
        learning_rate: theirs is 3e-4, which their script scales by a quarter of the batch and an eighth of the GPUs.
        discriminator_start: step at which the discriminators join.
        l1_weight: of the mean absolute error.
        slice_weight, volume_weight: of the two adversarial losses.
        feature_matching_weight: of what the discriminators see in their layers.
        perceptual_weight: of LPIPS on one slice of each volume; theirs is 4. 0, the default, needs no network that
            must be downloaded.
    """

    learning_rate: float = 3e-4 / 16
    adam_beta1: float = 0.5
    adam_beta2: float = 0.9
    discriminator_start: int = 10_000
    l1_weight: float = 4.0
    slice_weight: float = 1.0
    volume_weight: float = 1.0
    feature_matching_weight: float = 4.0
    perceptual_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MedicalDiffusionSettings(StageSettings):
    """Settings of the diffusion's training, beside those of any stage.

    Args:
        ema_decay: of the moving average of the weights, which is the model.
        ema_update_every: steps from one update to the next.
        ema_start: step before which the average is a copy.
        num_augmented_copies: of every cell, encoded once, with `augmentation`; None to encode every batch anew.
        num_inference_steps: the saved pipeline's default.
    """

    learning_rate: float = 1e-4
    adam_beta2: float = 0.999
    max_grad_norm: float = 0.0
    gradient_accumulation_steps: int = 2
    ema_decay: float = 0.995
    ema_update_every: int = 10
    ema_start: int = 2000
    num_augmented_copies: int | None = None
    num_inference_steps: int = 1000


def train_medical_autoencoder(
    stage: Stage, vqvae: MedicalDiffusionVQModel, discriminator: MedicalDiffusionDiscriminator, cells: Cells
) -> MedicalDiffusionVQModel:
    """Train `vqvae` on `cells`.

    The authors' code passes each batch through the autoencoder a second time for the discriminators; here they judge
    the reconstructions of the first time.

    Args:
        stage: entered, with `MedicalDiffusionAutoencoderSettings`.
        vqvae: untrained.
        discriminator: untrained.
        cells: to train on.

    Returns:
        The trained autoencoder, also saved to OUTPUT_DIR/model.

    Raises:
        ImportError: if there shall be a perceptual loss, and the package lpips is not installed.
        ValueError: likewise, if its network cannot be downloaded.
    """
    settings, accelerator = stage.settings, stage.accelerator

    # 1. networks and optimizers
    perceptual_network = load_perceptual_network(accelerator.device) if settings.perceptual_weight else None
    max_steps = settings.max_train_steps
    optimizer, lr_scheduler = make_optimizer(settings, vqvae.parameters(), max_steps)
    discriminator_optimizer, discriminator_lr_scheduler = make_optimizer(
        settings, discriminator.parameters(), max_steps - settings.discriminator_start
    )
    vqvae, optimizer = stage.prepare_adversaries(vqvae, optimizer)
    discriminator, discriminator_optimizer = stage.prepare_adversaries(discriminator, discriminator_optimizer)
    stage.resume(lr_scheduler, discriminator_lr_scheduler)

    # 2. train
    vqvae.train()
    discriminator.train()
    for step, batch in stage.steps(remaining_batches(cells, settings, stage.first_step)):
        volumes = augment(batch["volumes"].to(accelerator.device), settings, stage.micro_step)
        if stage.micro_step == 0:
            with torch.no_grad(), accelerator.autocast():
                latents = vqvae.encode(volumes).latents
            vqvae.initialize_codebook(latents, stage.generator("codes"))

        # autoencoder: error, commitment, and from some step on the adversaries
        with accelerator.accumulate(vqvae, discriminator):
            with accelerator.autocast():
                reconstruction, commit_loss, latents, indices = vqvae(volumes, return_dict=False)
            l1 = F.l1_loss(reconstruction.float(), volumes)
            loss = settings.l1_weight * l1 + commit_loss
            losses = {"loss/l1": l1, "loss/commitment": commit_loss}
            places = draw_shares(stage, "slices")
            real = select_slices(volumes, places), volumes
            fake = select_slices(reconstruction, places), reconstruction
            if perceptual_network is not None:
                losses["loss/perceptual"] = perceptual_loss(perceptual_network, fake[0].float(), real[0])
                loss = loss + settings.perceptual_weight * losses["loss/perceptual"]
            if step > settings.discriminator_start:
                with frozen(discriminator), accelerator.autocast():
                    slice_features, volume_features = discriminator(*fake)
                    with torch.no_grad():
                        real_slice_features, real_volume_features = discriminator(*real)
                adversarial = settings.slice_weight * adversarial_loss(slice_features[-1])
                adversarial = adversarial + settings.volume_weight * adversarial_loss(volume_features[-1])
                matching = feature_matching_loss(slice_features, real_slice_features)
                matching = matching + feature_matching_loss(volume_features, real_volume_features)
                losses |= {"loss/adversarial": adversarial, "loss/feature_matching": matching}
                loss = loss + adversarial + settings.feature_matching_weight * matching
            stage.apply(loss, vqvae, optimizer, lr_scheduler)

            # discriminators
            if step > settings.discriminator_start:
                with accelerator.autocast():
                    real_slice_features, real_volume_features = discriminator(*real)
                    slice_features, volume_features = discriminator(*(x.detach() for x in fake))
                loss = settings.slice_weight * discriminator_loss(real_slice_features[-1], slice_features[-1])
                loss = loss + settings.volume_weight * discriminator_loss(
                    real_volume_features[-1], volume_features[-1]
                )
                stage.apply(
                    loss, discriminator, discriminator_optimizer, discriminator_lr_scheduler, "discriminators' loss"
                )
                losses["loss/discriminators"] = loss

        # codebook: moving average and restarts
        codebook_logs = vqvae.update_codebook(latents, indices, stage.generator("restarts"))
        if stage.is_accumulating:
            continue

        # end of a step
        logs = stage.log(losses, codebook_logs | {"lr": lr_scheduler.get_last_lr()[0]})
        stage.progress.set_postfix(l1=f"{logs['loss/l1']:.4f}", codes=f"{logs['usage']:.0%}")
        if stage.is_validating and accelerator.is_main_process:
            rows = {"cells": volumes, "reconstructed": reconstruction.detach()}
            stage.log_volumes(rows, vqvae.config.channel_names)

    # 3. save
    vqvae = accelerator.unwrap_model(vqvae, keep_fp32_wrapper=False).eval()
    if accelerator.is_main_process:
        vqvae.save_pretrained(stage.output_dir / "model")
    return vqvae


def train_medical_diffusion(
    stage: Stage,
    unet: MedicalDiffusionUNet3D,
    noise_scheduler: DDPMScheduler,
    vqvae: MedicalDiffusionVQModel,
    cells: Cells,
) -> BaselinePipeline:
    """Train `unet` on the latents of `cells`, by L1 on the noise.

    Args:
        stage: entered, with `MedicalDiffusionSettings`.
        unet: untrained.
        noise_scheduler: adds the noise; the pipeline's too.
        vqvae: trained; it stays as it is.
        cells: to train on.

    Returns:
        The pipeline, also saved to OUTPUT_DIR.

    Source: Ho et al. 2020, Algorithm 1; Khader et al. 2023, Methods.
    """
    settings, accelerator = stage.settings, stage.accelerator

    # 1. optimizer, moving average
    optimizer, lr_scheduler = make_optimizer(settings, unet.parameters(), settings.max_train_steps)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    # no warm-up: the decay itself, as soon as it is an average
    update_after = settings.ema_start // settings.ema_update_every - 1
    decay = settings.ema_decay
    ema = EMAModel(unet.parameters(), decay, min_decay=decay, update_after_step=update_after, foreach=True)
    stage.resume(lr_scheduler, ema, inputs={"autoencoder": fingerprint_weights(vqvae)})
    ema.to(accelerator.device)  # a restored one lies on the CPU
    vqvae.to(accelerator.device).requires_grad_(False).eval()

    # 2. data: latents encoded once, and read from the disk, unless augmentation gives each epoch others
    latents, kept = None, cells_to_encode_once(cells, settings, settings.num_augmented_copies)
    if kept is not None:
        folder, workers = stage.output_dir / "latents", settings.dataloader_num_workers
        latents = cache_latents(vqvae, kept, folder, accelerator, num_workers=workers)
    batches = latent_batches(accelerator, settings, cells, vqvae, latents, stage.first_step)

    # 3. train
    unet.train()
    global_batch_size = settings.train_batch_size * accelerator.num_processes
    for step, (clean, *_) in stage.steps(batches):
        # drawn for all processes, then shared out, so that their number does not change the run
        generator = stage.generator("diffusion")
        noise = torch.randn(global_batch_size, *clean.shape[1:], generator=generator)
        timesteps = torch.randint(len(noise_scheduler), (global_batch_size,), generator=generator)
        noise, timesteps = (
            process_share(x, accelerator.process_index, accelerator.num_processes).to(accelerator.device)
            for x in (noise, timesteps)
        )
        with accelerator.accumulate(unet):
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            loss = F.l1_loss(unet(noisy, timesteps, return_dict=False)[0].float(), noise)
            stage.apply(loss, unet, optimizer, lr_scheduler)
        if stage.is_accumulating:
            continue

        # end of a step
        if (step - 1) % settings.ema_update_every == 0:
            ema.step(unet.parameters())
        logs = stage.log({"loss/diffusion": loss}, {"lr": lr_scheduler.get_last_lr()[0]})
        stage.progress.set_postfix(loss=f"{logs['loss/diffusion']:.4f}")
        if stage.is_validating and accelerator.is_main_process:
            bare_unet = accelerator.unwrap_model(unet)
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            pipeline = _make_pipeline(settings, cells, vqvae, bare_unet.eval(), noise_scheduler)
            pipeline.set_progress_bar_config(disable=True)
            few = min(20, len(noise_scheduler))
            with accelerator.autocast():
                samples = pipeline(4, few, torch.Generator().manual_seed(settings.seed), output_type="pt").volumes
            stage.log_volumes({"generated": samples * 2 - 1}, vqvae.config.channel_names)
            ema.restore(unet.parameters())
            unet.train()

    # 4. the moving average is the model
    ema.copy_to(unet.parameters())
    unet = accelerator.unwrap_model(unet, keep_fp32_wrapper=False).eval()
    pipeline = _make_pipeline(settings, cells, vqvae, unet, noise_scheduler)
    if accelerator.is_main_process:
        pipeline.save_pretrained(stage.output_dir)
    return pipeline


def _make_pipeline(settings, cells, vqvae, unet, noise_scheduler) -> BaselinePipeline:
    return BaselinePipeline(
        vqvae,
        unet,
        DDPMScheduler.from_config(noise_scheduler.config),
        default_num_inference_steps=settings.num_inference_steps,
        volume_processor_config=dict(cells.processor.config) | {"voxel_size_um": cells.voxel_size_um},
    )
