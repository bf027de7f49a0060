"""HA-GAN (Sun et al. 2022): discriminator, generator and two encoders in turn, on slices and on low resolution."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ...baselines import HAGAN, BaselinePipeline
from ...baselines.ha_gan import (
    DOWNSCALING,
    discriminator_loss,
    feature_encoder_loss,
    generator_loss,
    reconstruction_loss,
)
from ...data import Cells
from ..adversarial import draw_latents, frozen, log_generated, save_gan
from ..batches import augment, remaining_batches
from ..optimizers import make_optimizer
from ..settings import StageSettings
from ..stage import Stage


@dataclass(frozen=True, kw_only=True)
class HAGANSettings(StageSettings):
    """Settings of HA-GAN's training, beside those of any stage.

    Args:
        learning_rate: of the generator and the encoders.
        discriminator_learning_rate: of the discriminator.
    """

    learning_rate: float = 1e-4
    discriminator_learning_rate: float = 4e-4
    adam_beta1: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 0.0


def train_ha_gan(stage: Stage, model: HAGAN, cells: Cells) -> BaselinePipeline:
    """Train `model` on `cells`.

    Args:
        stage: entered, with `HAGANSettings`.
        model: untrained.
        cells: to train on.

    Returns:
        The pipeline, also saved to OUTPUT_DIR.
    """
    settings, accelerator = stage.settings, stage.accelerator

    # 1. networks and optimizers
    generator, discriminator = model.generator, model.discriminator
    encoder, feature_encoder = model.encoder, model.feature_encoder
    max_steps = settings.max_train_steps
    for_discriminator = replace(settings, learning_rate=settings.discriminator_learning_rate)
    optimizers, lr_schedulers = zip(
        make_optimizer(for_discriminator, discriminator.parameters(), max_steps),
        make_optimizer(settings, generator.parameters(), max_steps),
        make_optimizer(settings, encoder.parameters(), max_steps),
        make_optimizer(settings, feature_encoder.parameters(), max_steps),
        strict=True,
    )
    model, *optimizers = stage.prepare_adversaries(model, *optimizers)
    stage.resume(*lr_schedulers)

    # 2. train
    def generate(latents, place):
        """Slices and the low-resolution volume, of the same features."""
        features = generator.make_features(latents)
        return generator.high(model.select_features(features, place)), generator.low(features)

    model.train()
    for _, batch in stage.steps(remaining_batches(cells, settings, stage.first_step)):
        volumes = augment(batch["volumes"].to(accelerator.device), settings, stage.micro_step)
        latents, other_latents = draw_latents(stage, model, 2)
        place = int(torch.randint(model.num_positions, (), generator=stage.generator("slices")))
        position = place / (model.num_positions - 1)
        slices, low = model.select(volumes, place), F.interpolate(volumes, scale_factor=1 / DOWNSCALING)
        with accelerator.accumulate(model):
            # discriminators D^H, D^L
            with accelerator.autocast():
                with torch.no_grad():
                    fake_slices, fake_low = generate(latents, place)
                real_logits = discriminator(slices, low, position)
                loss_discriminator = discriminator_loss(
                    real_logits, discriminator(fake_slices.to(slices.dtype), fake_low.to(low.dtype), position)
                )
            stage.apply(loss_discriminator, discriminator, optimizers[0], lr_schedulers[0], "discriminator's loss")

            # generators G^A, G^H, G^L
            with frozen(discriminator), accelerator.autocast():
                loss_generator = generator_loss(discriminator(*generate(other_latents, place), position))
            stage.apply(loss_generator, generator, optimizers[1], lr_schedulers[1], "generator's loss")

            # encoder E^H
            with frozen(generator), accelerator.autocast():
                loss_encoder = reconstruction_loss(generator.high(encoder(slices)), slices)
            stage.apply(loss_encoder, encoder, optimizers[2], lr_schedulers[2], "encoder's loss")

            # encoder E^G
            with frozen(generator), accelerator.autocast():
                with torch.no_grad():
                    features = model.encode_features(volumes)
                recovered_slices, recovered_low = generate(feature_encoder(features), place)
                loss_features = feature_encoder_loss(recovered_slices, slices, recovered_low, low)
            stage.apply(loss_features, feature_encoder, optimizers[3], lr_schedulers[3], "feature encoder's loss")
        if stage.is_accumulating:
            continue

        # end of a step
        losses = {"loss/discriminator": loss_discriminator, "loss/generator": loss_generator}
        losses |= {"loss/encoder": loss_encoder, "loss/feature_encoder": loss_features}
        logs = stage.log(losses, {"lr": lr_schedulers[1].get_last_lr()[0]})
        stage.progress.set_postfix(d=f"{logs['loss/discriminator']:.3f}", g=f"{logs['loss/generator']:.3f}")
        if stage.is_validating and accelerator.is_main_process:
            log_generated(stage, model, cells=volumes)

    # 3. save
    return save_gan(stage, model, cells)
