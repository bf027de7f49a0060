"""Guidance: by a scale, or by diffusers' guiders; what they need to know of the U-Net, and a step of them."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
from diffusers import BaseGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from torch import Tensor

from ..models import DualChannelUNet3D
from ..models.attention import AxialAttnProcessor


def check_guider(guider: BaseGuidance, unet: DualChannelUNet3D) -> None:
    """Say to diffusers how our attention is skipped, and refuse what would have no effect.

    Raises:
        ValueError: for a guider that perturbs attention scores where attention is computed without diffusers' kernels.
    """
    skip = AttentionProcessorMetadata(skip_processor_output_fn=lambda attention, hidden_states: hidden_states)
    AttentionProcessorRegistry.register(AxialAttnProcessor, skip)
    configs = [x for value in vars(guider).values() for x in (value if isinstance(value, list) else [value])]
    perturbs = any(isinstance(config, LayerSkipConfig) and config.skip_attention_scores for config in configs)
    backends = {processor._attention_backend for processor in unet.attn_processors.values()}
    if perturbs and unet.device.type == "cpu" and None in backends:
        raise ValueError(
            f"Expected diffusers' attention for {type(guider).__name__}, which changes its scores, got the U-Net's own"
            ' for CPUs. Call pipe.unet.set_attention_backend("native").'
        )


def guide(
    guider: BaseGuidance,
    unet: DualChannelUNet3D,
    ask: Callable[..., Tensor],
    given: Mapping[str, Any],
    without: Mapping[str, Any],
) -> Tensor:
    """One prediction, from as many of the U-Net's as the guider wants.

    Args:
        guider: its state is that of the step.
        unet: where it leaves layers out.
        ask: the U-Net's prediction (B, M*n, d, h, w) under the conditions of its arguments.
        given: the conditions.
        without: of `leave_out`, what a guider calls unconditional.
    """
    batches = guider.prepare_inputs({name: (condition, without[name]) for name, condition in given.items()})
    for batch in batches:
        guider.prepare_models(unet)
        batch.noise_pred = ask(**{name: getattr(batch, name) for name in given})
        guider.cleanup_models(unet)
    return guider(batches).pred


def leave_out(given: Mapping[str, Any], unet: DualChannelUNet3D) -> dict[str, Any]:
    """What guidance moves away from: class and conditions, or else given channels, are left out.

    Args:
        given: `class_labels`, `conditions` and `given_channels` of a call, those it has.
        unet: says whether class and conditions can be left out.
    """
    dropped = {"class_labels", "conditions"} & set(given) if unet.config.conditioning_dropout_prob > 0 else set()
    without = dict(given) | dict.fromkeys(dropped)
    if not dropped and "given_channels" in given:
        without["given_channels"] = given["given_channels"].left_out()
    return without


def prepare_guidance_scale(
    pipeline, guidance_scale: float | None, is_conditional: bool, has_given_channels: bool = False
) -> float:
    """The scale of a call; 1 where nothing is to be guided, or the guider does it.

    Args:
        pipeline: a `BYOCPipeline`.
        guidance_scale: of the call.
        is_conditional: it has class or conditions.
        has_given_channels: it has channels to generate the others for.

    Raises:
        ValueError: for a scale beside a guider, one that is no number, or one that has nothing to guide.
    """
    guider, can_lack = pipeline.guider, pipeline.unet.config.conditioning_dropout_prob > 0
    if guider is not None:
        if guidance_scale is not None:
            raise ValueError(
                f"Expected guidance_scale or a guider, got {guidance_scale} and {type(guider).__name__}. Say"
                " pipe.guider = pipe.guider.new(guidance_scale=...), or pipe.guider = None."
            )
        if is_conditional and not can_lack and not has_given_channels:
            raise ValueError(
                f"Expected a model trained with a conditioning_dropout_prob for {type(guider).__name__}, got"
                " one that always had its conditions. Train it so, or say pipe.guider = None."
            )
        check_guider(guider, pipeline.unet)
        return 1.0
    if guidance_scale is None:
        return pipeline.config.default_guidance_scale if is_conditional and can_lack else 1.0
    if not isinstance(guidance_scale, Real) or not np.isfinite(guidance_scale):
        raise ValueError(f"Expected a finite guidance_scale, got {guidance_scale!r}. Correct it.")
    if guidance_scale != 1 and not (is_conditional and can_lack) and not has_given_channels:
        got = "neither class_labels nor conditions" if can_lack else "a model that cannot do without its conditions"
        raise ValueError(
            f"Expected conditions to guide with guidance_scale {guidance_scale}, and a model trained with a"
            f" conditioning_dropout_prob, got {got}. Leave guidance_scale out."
        )
    return guidance_scale
