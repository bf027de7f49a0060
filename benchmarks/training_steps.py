"""Whole models at the demo's and the paper's sizes: the default path against what plain PyTorch modules would do.

    python benchmarks/training_steps.py

"plain" is the same network in the contiguous memory format and float32, with PyTorch's own convolutions on every grid
and its fused attention; "compiled" is the default after `.compile()`, as `--compile` of the training script does it.
The share of the convolution peak is the convolutions' arithmetic over the time, against the best speed that one 3x3x3
convolution of 64 features on 16³ reaches in the same run and dtype, forward and backward.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch
from timing import best_ms, convolution_peak
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffusers_byoc.models.unet as unet_module
import diffusers_byoc.models.vqvae as vqvae_module
from diffusers_byoc import DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.models.convolution import Conv3d, DoublingConv3d, HalvingConv3d


UNETS = {"demo": ((32, 64, 128), (0, 1, 1)), "paper": ((64, 128, 256, 512), 2)}
AUTOENCODERS = {"demo": ((32, 32, 64), (0, 2)), "paper": ((64, 64, 128), (0, 2))}


def step_ms(model: nn.Module, dtype: torch.dtype, *inputs: Tensor) -> float:
    """Milliseconds of forward and backward under autocast to `dtype`."""

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model(*inputs, return_dict=False)[0].float().square().mean()
        loss.backward()

    return best_ms(step, repetitions=4)


def main() -> None:
    peak = convolution_peak(torch.bfloat16, "cpu", backward=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; convolution peak {peak:.0f} GFLOP/s\n")
    columns = ("parameters, M", "plain, ms", "default, ms", "ratio", "of the convolution peak", "compiled, ms")
    print(f"| training step | {' | '.join(columns)} |\n{'| --- ' * 7}|")
    timesteps = torch.randint(0, 1000, (8,))
    latents, volumes = torch.randn(8, 32, 16, 16, 16), torch.randn(2, 2, 64, 64, 64)
    cases = [
        (f"U-Net, {name}, batch 8", unet_module, (latents, timesteps), DualChannelUNet3D, widths, layers)
        for name, (widths, layers) in UNETS.items()
    ] + [
        (f"autoencoder, {name}, batch 2", vqvae_module, (volumes,), MultiCodebookVQModel, widths, layers)
        for name, (widths, layers) in AUTOENCODERS.items()
    ]
    for name, module, inputs, model_class, widths, layers in cases:
        model = model_class(block_out_channels=widths, layers_per_block=layers)
        with FlopCounterMode(display=False) as counter:
            model(*inputs, return_dict=False)[0].sum().backward()
        ours = step_ms(model, torch.bfloat16, *inputs)
        with ExitStack() as choices:
            choices.enter_context(patch.object(module, "to_fast_memory_format", lambda tensor: tensor))
            for ours_class, plain_class in (
                (Conv3d, nn.Conv3d),
                (HalvingConv3d, nn.Conv3d),
                (DoublingConv3d, nn.ConvTranspose3d),
            ):
                choices.enter_context(patch.object(ours_class, "forward", plain_class.forward))
            if model_class is DualChannelUNet3D:
                model.set_attention_backend("native")
            plain = step_ms(model, torch.float32, *inputs)
        if model_class is DualChannelUNet3D:
            model.reset_attention_backend()
        model.compile()
        compiled = step_ms(model, torch.bfloat16, *inputs)
        share = counter.get_total_flops() / 1e6 / ours / peak
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        numbers = f"{plain:.0f} | {ours:.0f} | {plain / ours:.1f} | {share:.0%} | {compiled:.0f}"
        print(f"| {name} | {parameters:.1f} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
