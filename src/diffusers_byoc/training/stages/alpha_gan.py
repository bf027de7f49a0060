"""α-GAN: Algorithm 1 of Rosca et al. (2017), or its Wasserstein form with gradient penalties (Kwon et al. 2019)."""

from dataclasses import dataclass

from torch import nn

from ...baselines import AlphaGAN, BaselinePipeline
from ...baselines.alpha_gan import critic_loss, discriminator_loss, ratio_loss, reconstruction_loss
from ...baselines.w_gan import gradient_penalty
from ...data import Cells
from ..adversarial import draw_latents, draw_shares, frozen, log_generated, save_gan
from ..batches import augment, remaining_batches
from ..optimizers import make_optimizer
from ..settings import StageSettings
from ..stage import Stage


@dataclass(frozen=True, kw_only=True)
class AlphaGANSettings(StageSettings):
    """Settings of α-GAN's training, beside those of any stage.

    Args:
        adversarial_loss: of both discriminators: "original" or "wgan_gp".
        reconstruction_weight: λ of the reconstruction (λ1 of Kwon et al.).
        gradient_penalty_weight: of each gradient penalty (λ2 of Kwon et al.).
    """

    learning_rate: float = 2e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 0.0
    adversarial_loss: str = "wgan_gp"
    reconstruction_weight: float = 10.0
    gradient_penalty_weight: float = 10.0


def train_alpha_gan(stage: Stage, model: AlphaGAN, cells: Cells) -> BaselinePipeline:
    """Train `model` on `cells`.

    Args:
        stage: entered, with `AlphaGANSettings`.
        model: untrained.
        cells: to train on.

    Returns:
        The pipeline, also saved to OUTPUT_DIR.

    Raises:
        ValueError: for another `adversarial_loss`, or a batch of one cell, which batch norm makes nothing of.
    """
    settings, accelerator = stage.settings, stage.accelerator
    if settings.adversarial_loss not in ("original", "wgan_gp"):
        raise ValueError(
            f"Expected adversarial_loss 'original' or 'wgan_gp', got {settings.adversarial_loss!r}. Choose one."
        )
    if settings.train_batch_size < 2:
        raise ValueError("Expected a train_batch_size of at least 2, for batch norm of codes, got 1. Raise it.")
    has_penalty = settings.adversarial_loss == "wgan_gp"
    loss_of = critic_loss if has_penalty else discriminator_loss

    # 1. networks and optimizers; one optimizer for encoder and generator, which share their loss
    encoder, generator = model.encoder, model.generator
    discriminator, code_discriminator = model.discriminator, model.code_discriminator
    autoencoder = nn.ModuleList([encoder, generator])
    optimizers, lr_schedulers = zip(
        *(
            make_optimizer(settings, network.parameters(), settings.max_train_steps)
            for network in (autoencoder, discriminator, code_discriminator)
        ),
        strict=True,
    )
    model, *optimizers = stage.prepare_adversaries(model, *optimizers)
    stage.resume(*lr_schedulers)

    # 2. train
    model.train()
    for _, batch in stage.steps(remaining_batches(cells, settings, stage.first_step)):
        volumes = augment(batch["volumes"].to(accelerator.device), settings, stage.micro_step)
        (latents,) = draw_latents(stage, model)
        with accelerator.accumulate(model):
            # encoder and generator
            with frozen(discriminator, code_discriminator), accelerator.autocast():
                codes = encoder(volumes)
                reconstruction, fake = generator(codes), generator(latents)
                loss_reconstruction = reconstruction_loss(reconstruction, volumes)
                loss_generator = ratio_loss(discriminator(reconstruction)) + ratio_loss(discriminator(fake))
                loss_codes = ratio_loss(code_discriminator(codes))
            loss = settings.reconstruction_weight * loss_reconstruction + loss_generator + loss_codes
            stage.apply(loss, autoencoder, optimizers[0], lr_schedulers[0], "autoencoder's loss")
            codes, reconstruction, fake = codes.detach(), reconstruction.detach(), fake.detach()

            # discriminator
            with accelerator.autocast():
                loss = loss_of(discriminator(volumes), discriminator(reconstruction), discriminator(fake))
            losses = {"loss/discriminator": loss}
            if has_penalty:
                penalty = gradient_penalty(discriminator, volumes, fake, draw_shares(stage, "penalty"))
                shares = draw_shares(stage, "penalty of reconstructions")
                penalty = penalty + gradient_penalty(discriminator, volumes, reconstruction, shares)
                loss = loss + settings.gradient_penalty_weight * penalty
                losses["loss/gradient_penalty"] = penalty
            stage.apply(loss, discriminator, optimizers[1], lr_schedulers[1], "discriminator's loss")

            # code discriminator
            with accelerator.autocast():
                loss = loss_of(code_discriminator(latents), code_discriminator(codes))
            losses["loss/code_discriminator"] = loss
            if has_penalty:
                shares = draw_shares(stage, "penalty of codes")
                penalty = gradient_penalty(code_discriminator, latents, codes, shares)
                loss = loss + settings.gradient_penalty_weight * penalty
            stage.apply(loss, code_discriminator, optimizers[2], lr_schedulers[2], "code discriminator's loss")
        if stage.is_accumulating:
            continue

        # end of a step
        losses |= {"loss/reconstruction": loss_reconstruction, "loss/generator": loss_generator}
        logs = stage.log(losses | {"loss/codes": loss_codes}, {"lr": lr_schedulers[0].get_last_lr()[0]})
        stage.progress.set_postfix(l1=f"{logs['loss/reconstruction']:.4f}")
        if stage.is_validating and accelerator.is_main_process:
            log_generated(stage, model, cells=volumes, reconstructed=reconstruction)

    # 3. save
    return save_gan(stage, model, cells)
