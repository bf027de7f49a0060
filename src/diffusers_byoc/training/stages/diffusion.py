"""Stage two (BYOC, section 3.2, eq. 9-13): joint diffusion of all channels' latents, unquantised."""

from dataclasses import dataclass

import diffusers
import torch
from accelerate.logging import get_logger
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import Subset

from ...data import Cells
from ...models import DualChannelUNet3D, MultiCodebookVQModel, TextureUNet3D
from ...models.fingerprint import fingerprint_weights
from ...pipelines import BYOCPipeline
from ...pipelines.conditions import measure_conditions, standardize_conditions, typical_conditions
from ...pipelines.schedulers import make_texture_scheduler
from ...randomness import process_share
from ..autoguidance import Autoguidance
from ..batches import cells_to_encode_once, latent_batches, sample_cells
from ..latents import cache_latents, latent_statistics, measure_latents
from ..lora import add_adapter, save_adapter
from ..losses import diffusion_loss, draw_channel_timesteps, drop_conditions
from ..optimizers import make_optimizer
from ..settings import StageSettings
from ..stage import Stage
from ..validation import validate_diffusion


logger = get_logger(__name__, log_level="INFO")


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(StageSettings):
    """Settings of the diffusion's training, beside those of any stage.

    Args:
        class_conditional: give the labels to the U-Net.
        train_lora: train an adapter of the U-Net in its place.
        rank: of the adapter.
        num_augmented_copies: augmentations of every cell, whose latents are encoded once; None to draw another in
            every epoch and to encode it on the way.
        loss_type, snr_gamma: see `diffusion_loss`.
        use_ema: the model is a moving average of the trained weights.
        ema_decay, use_ema_warmup, ema_inv_gamma, ema_power: see diffusers' `EMAModel`.
        inference_scheduler: the saved pipeline's, "DDPMScheduler" or "DDIMScheduler".
        num_inference_steps: the saved pipeline's default.
        num_texture_steps: likewise, where there is a texture network.
    """

    class_conditional: bool = False
    train_lora: bool = False
    rank: int | None = None
    num_augmented_copies: int | None = None
    loss_type: str = "l1"
    snr_gamma: float | None = None
    use_ema: bool = True
    ema_decay: float = 0.995
    use_ema_warmup: bool = False
    ema_inv_gamma: float = 1.0
    ema_power: float = 2 / 3
    inference_scheduler: str = "DDPMScheduler"
    num_inference_steps: int = 1000
    num_texture_steps: int = 8


def train_diffusion(
    stage: Stage,
    unet: DualChannelUNet3D,
    noise_scheduler: DDPMScheduler,
    vqvae: MultiCodebookVQModel,
    cells: Cells,
    held_out_cells: Cells | None = None,
    texture_unet: TextureUNet3D | None = None,
    conditions: list[dict] | None = None,
    autoguidance: Autoguidance | None = None,
) -> BYOCPipeline:
    """Train `unet` on the latents of `cells`, and on their conditions where it takes some.

    The `conditioning_dropout_prob` of `unet` is the share that sees none, see `drop_conditions`; its
    `channel_timesteps_prob` that whose channels are at timesteps of their own, see `draw_channel_timesteps`.

    Args:
        stage: entered, with `DiffusionSettings`.
        unet: untrained; trained for an adapter.
        noise_scheduler: adds the noise.
        vqvae: trained; it stays as it is, but for the statistics of its latents, if it has none yet.
        cells: to train on.
        held_out_cells: for the validation losses; None for none.
        texture_unet: trained, or None; a part of the pipeline that has nothing to do here.
        conditions: of the pipeline that `unet` comes from, whose scale it knows; None measures those of `cells`.
        autoguidance: of `unet` as it is before this training, by a weaker one; None for none. The validation losses
            know nothing of it, and rise with its scale.

    Returns:
        The pipeline, also saved to OUTPUT_DIR; of an adapter only itself is saved.
    """
    settings, accelerator = stage.settings, stage.accelerator
    num_classes, share = unet.config.num_class_embeds, unet.config.conditioning_dropout_prob
    num_channels, channel_share = unet.config.num_channels, unet.config.channel_timesteps_prob
    if unet.config.class_embed_type is None:
        conditions = None
    elif conditions is None:
        conditions = measure_conditions(cells.conditions)

    # 1. optimizer, moving average
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if settings.train_lora:
        add_adapter(unet, settings.rank)
    if settings.compile:
        unet.compile()
    optimizer, lr_scheduler = make_optimizer(settings, unet.parameters(), settings.max_train_steps)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    states, ema = [lr_scheduler], None
    if settings.use_ema:
        warmup = {"inv_gamma": settings.ema_inv_gamma, "power": settings.ema_power}
        ema = EMAModel(
            unet.parameters(), settings.ema_decay, use_ema_warmup=settings.use_ema_warmup, foreach=True, **warmup
        )
        states.append(ema)
    inputs = {"autoencoder": fingerprint_weights(vqvae)}
    if autoguidance:
        autoguidance.to(accelerator.device)
        inputs["weak_weights"] = fingerprint_weights(autoguidance.weak_unet)
    stage.resume(*states, inputs=inputs)
    if ema:
        ema.to(accelerator.device)  # a restored one lies on the CPU

    # 2. data: latents encoded once, or once for each augmented copy, and read from the disk; but batch by batch, and
    # only some beforehand, where augmentation gives each epoch others, or a stream may outgrow the disk
    vqvae.to(accelerator.device).requires_grad_(False).eval()
    kept = cells_to_encode_once(cells, settings, settings.num_augmented_copies)
    known = sample_cells(cells, 256, settings.seed) if kept is None else kept
    folder, workers = stage.output_dir / "latents", settings.dataloader_num_workers
    latents = cache_latents(vqvae, known, folder / "train", accelerator, num_workers=workers)
    measure_latents(vqvae, latents)
    statistics = latent_statistics(vqvae, latents.chunks())
    accelerator.log(statistics, step=0)
    logger.info(f"latents, normalised: {', '.join(f'{name} {value:.3f}' for name, value in statistics.items())}")
    if held_out_cells is not None:
        validation_cells = held_out_cells.indexable(settings.num_validation_cells, settings.seed)
        rows = range(min(len(validation_cells), settings.num_validation_cells))
        held_out_latents = cache_latents(vqvae, Subset(validation_cells, rows), folder / "held_out", accelerator)
        held_out_labels = held_out_vectors = None
        if settings.class_conditional:
            held_out_labels = [int(validation_cells[row]["class_labels"]) for row in rows]
        if conditions:
            held_out = [validation_cells[row]["conditions"] for row in rows]
            stacked = {name: torch.stack([each[name] for each in held_out]).numpy() for name in held_out[0]}
            held_out_vectors = standardize_conditions(conditions, stacked)
    latents = None if kept is None else latents
    batches = latent_batches(accelerator, settings, cells, vqvae, latents, stage.first_step, conditions)

    # 3. train
    unet.train()
    global_batch_size = settings.train_batch_size * accelerator.num_processes
    for step, (clean, class_labels, vectors) in stage.steps(batches):
        class_labels = class_labels if settings.class_conditional else None
        # drawn for all processes, then shared out, so that their number does not change the run
        generator = stage.generator("diffusion")
        noise = torch.randn(global_batch_size, *clean.shape[1:], generator=generator)
        timesteps = torch.randint(len(noise_scheduler), (global_batch_size,), generator=generator)
        chances = torch.rand(global_batch_size, generator=generator)
        if channel_share:
            channel_chances = torch.rand(global_batch_size, num_channels + 2, generator=generator)
            timesteps = draw_channel_timesteps(timesteps, channel_chances, channel_share, len(noise_scheduler) - 1)
        noise, timesteps, chances = (
            process_share(x, accelerator.process_index, accelerator.num_processes).to(accelerator.device)
            for x in (noise, timesteps, chances)
        )
        if share:
            class_labels, vectors = drop_conditions(class_labels, vectors, num_classes, chances, share)

        with accelerator.accumulate(unet):
            weighting = (settings.loss_type, settings.snr_gamma)
            with accelerator.autocast():
                given = (class_labels, *weighting, vectors, autoguidance)
                loss = diffusion_loss(unet, noise_scheduler, clean, noise, timesteps, *given)
            stage.apply(loss, unet, optimizer, lr_scheduler)
        if stage.is_accumulating:
            continue

        # end of a step
        if ema:
            ema.step(unet.parameters())
        logs = stage.log({"loss/diffusion": loss}, {"lr": lr_scheduler.get_last_lr()[0]})
        stage.progress.set_postfix(loss=f"{logs['loss/diffusion']:.4f}")
        if stage.is_validating:
            bare_unet = accelerator.unwrap_model(unet)
            if ema:
                ema.store(unet.parameters())
                ema.copy_to(unet.parameters())
            if held_out_cells is not None:
                options = (held_out_latents, held_out_labels, settings.seed, *weighting, held_out_vectors)
                accelerator.log(validate_diffusion(accelerator, bare_unet, noise_scheduler, vqvae, *options), step)
            if accelerator.is_main_process:
                pipeline = make_pipeline(settings, cells, vqvae, bare_unet, noise_scheduler, texture_unet, conditions)
                pipeline.set_progress_bar_config(disable=True)
                with accelerator.autocast():
                    samples = pipeline(
                        4,
                        class_labels=cells.labels[0] if settings.class_conditional else None,
                        conditions=typical_conditions(conditions),
                        output_type="pt",
                        num_inference_steps=min(20, len(noise_scheduler)),
                        generator=torch.Generator().manual_seed(settings.seed),
                    ).volumes
                stage.log_volumes({"generated": samples * 2 - 1}, vqvae.config.channel_names)
            if ema:
                ema.restore(unet.parameters())
            unet.train()

    # 4. the moving average is the model
    if ema:
        ema.copy_to(unet.parameters())
    unet = accelerator.unwrap_model(unet, keep_fp32_wrapper=False).eval()
    pipeline = make_pipeline(settings, cells, vqvae, unet, noise_scheduler, texture_unet, conditions)
    if accelerator.is_main_process and settings.train_lora:
        save_adapter(unet, stage.output_dir)
    elif accelerator.is_main_process:
        pipeline.save_pretrained(stage.output_dir)
    return pipeline


def make_pipeline(
    settings: DiffusionSettings,
    cells: Cells,
    vqvae: MultiCodebookVQModel,
    unet: DualChannelUNet3D,
    noise_scheduler: DDPMScheduler,
    texture_unet: TextureUNet3D | None = None,
    conditions: list[dict] | None = None,
) -> BYOCPipeline:
    """The pipeline of these networks, with the defaults that the settings name."""
    scheduler_class = getattr(diffusers, settings.inference_scheduler)
    label2id = {name: index for index, name in enumerate(cells.class_names)} if settings.class_conditional else None
    return BYOCPipeline(
        vqvae,
        unet,
        scheduler_class.from_config(noise_scheduler.config),
        texture_unet,
        texture_unet and make_texture_scheduler(),
        default_num_inference_steps=settings.num_inference_steps,
        default_num_texture_steps=settings.num_texture_steps,
        label2id=label2id,
        conditions=conditions,
        volume_processor_config=dict(cells.processor.config) | {"voxel_size_um": cells.voxel_size_um},
    )
