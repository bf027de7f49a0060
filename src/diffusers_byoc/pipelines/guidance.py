"""diffusers' guiders on the U-Net: what they need to know of it, and a step of them."""

from collections.abc import Callable, Mapping

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
    guider: BaseGuidance, unet: DualChannelUNet3D, ask: Callable[..., Tensor], given: Mapping[str, Tensor]
) -> Tensor:
    """One prediction, from as many of the U-Net's as the guider wants.

    Args:
        guider: its state is that of the step.
        unet: where it leaves layers out.
        ask: the U-Net's prediction (B, M*n, d, h, w) under the conditions of its arguments.
        given: the conditions; without them is what a guider calls unconditional.
    """
    batches = guider.prepare_inputs({name: (condition, None) for name, condition in given.items()})
    for batch in batches:
        guider.prepare_models(unet)
        batch.noise_pred = ask(**{name: getattr(batch, name) for name in given})
        guider.cleanup_models(unet)
    return guider(batches).pred
