"""Training an adapter of the U-Net in place of the U-Net (Hu et al. 2022): a new drug from few cells."""

from pathlib import Path

from ..models import DualChannelUNet3D
from ..optional import optional
from ..pipelines import BYOCPipeline


# Attention, what the time and the class do to each block, and each block's second convolution: under 1 MB at rank 8.
TARGET_MODULES = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("time_embedding.linear_1", "time_embedding.linear_2", "time_emb_proj"),
    "conv2",
]


def add_adapter(unet: DualChannelUNet3D, rank: int) -> None:
    """Freeze `unet` and add an adapter that is trained in its place; before the first step it changes nothing.

    Args:
        unet: trained.
        rank: of the product B A that is added to each weight.

    Raises:
        ImportError: if peft is not installed.

    Source: Hu et al. 2022, eq. 3, with alpha = r.
    """
    config = optional("peft", "lora").LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGET_MODULES)
    unet.requires_grad_(False)
    unet.add_adapter(config)


def save_adapter(unet: DualChannelUNet3D, folder: Path) -> None:
    """Write the adapter of `unet` for `BYOCPipeline.load_lora_weights`."""
    tensors = optional("peft", "lora").get_peft_model_state_dict(unet, adapter_name="default")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    BYOCPipeline.save_lora_weights(folder, tensors, unet.peft_config["default"].to_dict())
