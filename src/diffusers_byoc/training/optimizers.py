"""Optimizer and learning-rate schedule of a network."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..optional import optional
from .settings import StageSettings


def optimizer_class(settings: StageSettings) -> Callable[..., torch.optim.Optimizer]:
    """The class that `optimizer` and `use_8bit_adam` name, with its betas.

    Raises:
        ImportError: if it needs bitsandbytes, which is not installed.
    """
    optimizers = optional("bitsandbytes", "8bit").optim if settings.use_8bit_adam else None
    if settings.optimizer == "rmsprop":
        return optimizers.RMSprop8bit if optimizers else torch.optim.RMSprop
    betas = (settings.adam_beta1, settings.adam_beta2)
    if optimizers:
        return partial({"adam": optimizers.Adam8bit, "adamw": optimizers.AdamW8bit}[settings.optimizer], betas=betas)
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return partial(plain, betas=betas, fused=True)


def make_optimizer(
    settings: StageSettings, parameters: Iterable[nn.Parameter], num_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Optimizer of `parameters`, and its schedule over `num_steps` steps."""
    optimizer = optimizer_class(settings)(
        [parameter for parameter in parameters if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.adam_weight_decay,
    )
    return optimizer, get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=num_steps
    )
