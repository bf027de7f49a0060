"""W-GAN: Algorithm 1 of Arjovsky et al. (2017), or that of Gulrajani et al. (2017) with a gradient penalty."""

from dataclasses import dataclass

import torch

from ...baselines import WGAN, BaselinePipeline
from ...baselines.w_gan import clip_weights, critic_loss, generator_loss, gradient_penalty
from ...data import Cells
from ..adversarial import draw_latents, draw_shares, frozen, log_generated, save_gan
from ..batches import augment, remaining_batches
from ..optimizers import make_optimizer
from ..settings import StageSettings
from ..stage import Stage


@dataclass(frozen=True, kw_only=True)
class WGANSettings(StageSettings):
    """Settings of W-GAN's training, beside those of any stage. A step is one of the critic.

    Args:
        num_critic_steps: n_critic, for each step of the generator.
        lipschitz: how the critic is kept from growing steep: "gradient_penalty" or "clipping".
        gradient_penalty_weight: λ of the penalty.
        clip_limit: c of the clipping.
    """

    learning_rate: float = 1e-4
    adam_beta1: float = 0.0
    adam_beta2: float = 0.9
    max_grad_norm: float = 0.0
    num_critic_steps: int = 5
    lipschitz: str = "gradient_penalty"
    gradient_penalty_weight: float = 10.0
    clip_limit: float = 0.01


def train_w_gan(stage: Stage, model: WGAN, cells: Cells) -> BaselinePipeline:
    """Train `model` on `cells`.

    Args:
        stage: entered, with `WGANSettings`.
        model: untrained.
        cells: to train on.

    Returns:
        The pipeline, also saved to OUTPUT_DIR.

    Raises:
        ValueError: for another `lipschitz`.
    """
    settings, accelerator = stage.settings, stage.accelerator
    if settings.lipschitz not in ("gradient_penalty", "clipping"):
        raise ValueError(
            f"Expected lipschitz 'gradient_penalty' or 'clipping', got {settings.lipschitz!r}. Choose one."
        )

    # 1. networks and optimizers
    generator, critic = model.generator, model.critic
    optimizer, lr_scheduler = make_optimizer(
        settings, generator.parameters(), settings.max_train_steps // settings.num_critic_steps
    )
    critic_optimizer, critic_lr_scheduler = make_optimizer(settings, critic.parameters(), settings.max_train_steps)
    model, optimizer, critic_optimizer = stage.prepare_adversaries(model, optimizer, critic_optimizer)
    stage.resume(lr_scheduler, critic_lr_scheduler)

    # 2. train
    model.train()
    losses = {}
    for step, batch in stage.steps(remaining_batches(cells, settings, stage.first_step)):
        volumes = augment(batch["volumes"].to(accelerator.device), settings, stage.micro_step)
        latents, other_latents = draw_latents(stage, model, 2)
        with accelerator.accumulate(model):
            # critic
            with torch.no_grad(), accelerator.autocast():
                fake = generator(latents)
            with accelerator.autocast():
                distance = critic_loss(critic(volumes), critic(fake))
            losses = losses | {"loss/critic": distance}
            loss = distance
            if settings.lipschitz == "gradient_penalty":
                penalty = gradient_penalty(critic, volumes, fake, draw_shares(stage, "penalty"))
                loss = loss + settings.gradient_penalty_weight * penalty
                losses["loss/gradient_penalty"] = penalty
            stage.apply(loss, critic, critic_optimizer, critic_lr_scheduler, "critic's loss")
            if settings.lipschitz == "clipping" and accelerator.sync_gradients:
                clip_weights(critic, settings.clip_limit)

            # generator
            if step % settings.num_critic_steps == 0:
                with frozen(critic), accelerator.autocast():
                    loss = generator_loss(critic(generator(other_latents)))
                stage.apply(loss, generator, optimizer, lr_scheduler, "generator's loss")
                losses["loss/generator"] = loss
        if stage.is_accumulating:
            continue

        # end of a step
        logs = stage.log(losses, {"lr": critic_lr_scheduler.get_last_lr()[0]})
        losses = {}
        stage.progress.set_postfix(distance=f"{-logs['loss/critic']:.3f}")
        if stage.is_validating and accelerator.is_main_process:
            log_generated(stage, model, cells=volumes)

    # 3. save
    return save_gan(stage, model, cells)
