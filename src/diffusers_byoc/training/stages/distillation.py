"""The stage after the diffusion: a U-Net that needs few steps, from one that needs many."""

import copy
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import EMAModel

from ...data import Cells
from ...models import DualChannelUNet3D
from ...models.fingerprint import fingerprint_weights
from ...pipelines import BYOCPipeline
from ...pipelines.conditions import typical_conditions
from ...pipelines.schedulers import DISTILLED_SCHEDULERS
from ...randomness import process_share
from ..batches import cells_to_encode_once, latent_batches
from ..distillation import distillation_loss
from ..latents import cache_latents
from ..losses import draw_channel_timesteps, drop_conditions
from ..moment_matching import moment_matching_losses
from ..optimizers import make_optimizer
from ..settings import StageSettings
from ..stage import Stage


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(StageSettings):
    """Settings of the distillation, beside those of any stage.

    Args:
        distillation_method: "moment_matching" or "progressive".
        num_distilled_steps: denoising steps that the U-Net will need, and be for; a divisor of the timesteps.
        num_teacher_steps: of progressive distillation, those of its teacher, in all; rounded up to a multiple.
        num_augmented_copies: see `DiffusionSettings`.
        ema_decay: of the moving average of the weights, which is the model; it begins lower, (1 + step) / (10 + step).
    """

    learning_rate: float = 1e-4
    distillation_method: str = "moment_matching"
    num_distilled_steps: int = 4
    num_teacher_steps: int | None = None
    num_augmented_copies: int | None = None
    ema_decay: float = 0.999


def train_distillation(
    stage: Stage, pretrained: BYOCPipeline, noise_scheduler: DDPMScheduler, cells: Cells
) -> BYOCPipeline:
    """Train a copy of the U-Net of `pretrained` to need few steps.

    By moment matching its ancestral steps lead to latents that the teacher expects; by progressive distillation it
    goes as far in one step as the teacher in several. Both see the same classes and conditions, and none for the share
    that the teacher was trained without them, and channels at timesteps of their own for its share of these: the
    student answers what its teacher does.

    Args:
        stage: entered, with `DistillationSettings`.
        pretrained: trained; its networks stay as they are.
        noise_scheduler: of the noise that its U-Net was trained for.
        cells: to train on, in the classes of `pretrained`, if it has classes.

    Returns:
        The pipeline, also saved to OUTPUT_DIR.
    """
    settings, accelerator = stage.settings, stage.accelerator
    vqvae, num_steps = pretrained.vqvae, settings.num_distilled_steps
    for network in (vqvae, pretrained.unet):
        network.to(accelerator.device).requires_grad_(False).eval()

    # 1. student, optimizer, moving average
    unet = copy.deepcopy(pretrained.unet).requires_grad_(True)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if settings.compile:
        unet.compile()
    optimizer, lr_scheduler = make_optimizer(settings, unet.parameters(), settings.max_train_steps)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    networks, schedules = [unet], [lr_scheduler]
    if matches_moments := settings.distillation_method == "moment_matching":
        auxiliary_unet = copy.deepcopy(pretrained.unet).requires_grad_(True).train()
        auxiliary_optimizer, auxiliary_lr_scheduler = make_optimizer(
            settings, auxiliary_unet.parameters(), settings.max_train_steps
        )
        auxiliary_unet, auxiliary_optimizer = accelerator.prepare(auxiliary_unet, auxiliary_optimizer)
        networks.append(auxiliary_unet)
        schedules.append(auxiliary_lr_scheduler)
    ema = EMAModel(unet.parameters(), settings.ema_decay, foreach=True)
    fingerprints = {"autoencoder": fingerprint_weights(vqvae), "teacher": fingerprint_weights(pretrained.unet)}
    stage.resume(*schedules, ema, inputs=fingerprints)
    ema.to(accelerator.device)

    # 2. data: latents encoded once where they stay the same
    latents, kept = None, cells_to_encode_once(cells, settings, settings.num_augmented_copies)
    if kept is not None:
        folder = stage.output_dir / "latents" / "train"
        latents = cache_latents(vqvae, kept, folder, accelerator, num_workers=settings.dataloader_num_workers)
    conditions = pretrained.config.conditions
    batches = latent_batches(accelerator, settings, cells, vqvae, latents, stage.first_step, conditions)
    num_classes = pretrained.unet.config.num_class_embeds
    share, channel_share = (
        pretrained.unet.config[name] for name in ("conditioning_dropout_prob", "channel_timesteps_prob")
    )

    def of_this_process(values: torch.Tensor) -> torch.Tensor:
        return process_share(values, accelerator.process_index, accelerator.num_processes).to(accelerator.device)

    # 3. train
    unet.train()
    global_batch_size = settings.train_batch_size * accelerator.num_processes
    stride = len(noise_scheduler) // num_steps
    for _, (clean, class_labels, vectors) in stage.steps(batches):
        class_labels = None if num_classes is None else class_labels
        # drawn for all processes, then shared out, so that their number does not change the run
        generator = stage.generator("distillation")
        noise = torch.randn(global_batch_size, *clean.shape[1:], generator=generator)
        timesteps = torch.randint(1, num_steps + 1, (global_batch_size,), generator=generator) * stride - 1
        chances = torch.rand(global_batch_size, generator=generator)
        channel_chances = torch.rand(global_batch_size, vqvae.config.num_channels + 2, generator=generator)
        noise, timesteps, chances, channel_chances = (
            of_this_process(x) for x in (noise, timesteps, chances, channel_chances)
        )
        channel_timesteps = None
        if channel_share:
            last_timestep = len(noise_scheduler) - 1
            channel_timesteps = draw_channel_timesteps(timesteps, channel_chances, channel_share, last_timestep)
        if share:
            class_labels, vectors = drop_conditions(class_labels, vectors, num_classes, chances, share)

        given = (class_labels, vectors, channel_timesteps)
        with accelerator.accumulate(*networks):
            if matches_moments:
                share_of_step = torch.rand(global_batch_size, generator=generator)
                step_noise = torch.randn(global_batch_size, *clean.shape[1:], generator=generator)
                share_of_step, step_noise = (of_this_process(x) for x in (share_of_step, step_noise))
                stops = (timesteps - 1 - (share_of_step * stride).long()).clamp(min=0)
                with accelerator.autocast():
                    steps = (timesteps, stops, step_noise, *given)
                    loss, auxiliary_loss = moment_matching_losses(
                        unet, auxiliary_unet, pretrained.unet, noise_scheduler, clean, noise, *steps
                    )
                stage.apply(loss, unet, optimizer, lr_scheduler)
                stage.apply(
                    auxiliary_loss, auxiliary_unet, auxiliary_optimizer, auxiliary_lr_scheduler, "auxiliary loss"
                )
                losses = {"loss/moment_matching": loss, "loss/auxiliary": auxiliary_loss}
            else:
                with accelerator.autocast():
                    steps = (timesteps, stride, -(-settings.num_teacher_steps // num_steps), *given)
                    loss = distillation_loss(unet, pretrained.unet, noise_scheduler, clean, noise, *steps)
                stage.apply(loss, unet, optimizer, lr_scheduler)
                losses = {"loss/distillation": loss}
        if stage.is_accumulating:
            continue

        # end of a step
        ema.step(unet.parameters())
        logs = stage.log(losses, {"lr": lr_scheduler.get_last_lr()[0]})
        stage.progress.set_postfix({name.removeprefix("loss/"): f"{logs[name]:.4f}" for name in losses})
        if stage.is_validating and accelerator.is_main_process:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            pipeline = make_distilled_pipeline(pretrained, accelerator.unwrap_model(unet), settings)
            pipeline.set_progress_bar_config(disable=True)
            with accelerator.autocast():
                samples = pipeline(
                    4,
                    class_labels=None if num_classes is None else cells.labels[0],
                    conditions=typical_conditions(conditions),
                    output_type="pt",
                    generator=torch.Generator().manual_seed(settings.seed),
                ).volumes
            stage.log_volumes({"generated": samples * 2 - 1}, vqvae.config.channel_names)
            ema.restore(unet.parameters())
            unet.train()

    # 4. the moving average is the model
    ema.copy_to(unet.parameters())
    unet = accelerator.unwrap_model(unet, keep_fp32_wrapper=False).eval()
    pipeline = make_distilled_pipeline(pretrained, unet, settings)
    if accelerator.is_main_process:
        pipeline.save_pretrained(stage.output_dir)
    return pipeline


def make_distilled_pipeline(
    pretrained: BYOCPipeline, unet: DualChannelUNet3D, settings: DistillationSettings
) -> BYOCPipeline:
    """`pretrained` with a U-Net that was distilled by `settings`, and the scheduler whose steps it then takes."""
    config = pretrained.config
    scheduler_class = {"moment_matching": DDPMScheduler, "progressive": DDIMScheduler}[settings.distillation_method]
    name = scheduler_class.__name__
    return BYOCPipeline(
        pretrained.vqvae,
        unet,
        scheduler_class.from_config(pretrained.scheduler.config, **DISTILLED_SCHEDULERS[name]),
        pretrained.texture_unet,
        pretrained.texture_scheduler,
        default_num_inference_steps=settings.num_distilled_steps,
        default_num_texture_steps=config.default_num_texture_steps,
        prediction_type=config.prediction_type,
        noise_schedule=config.noise_schedule,
        label2id=config.label2id,
        volume_processor_config=config.volume_processor_config,
        guider=pretrained.guider,
        default_guidance_scale=config.default_guidance_scale,
        conditions=config.conditions,
        num_distilled_steps=settings.num_distilled_steps,
        distilled_scheduler=name,
    )
