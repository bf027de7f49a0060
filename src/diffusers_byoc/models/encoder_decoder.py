"""The convolutional halves of the multichannel VQGAN (BYOC section 3.1, Figure 2): encoder and decoder."""

import math

import torch
from diffusers.models.activations import get_activation
from torch import Tensor, nn

from .convolution import Conv3d, DoublingConv3d, HalvingConv3d
from .normalization import InstanceNorm, VoxelNorm


class ResidualBlock(nn.Module):
    """norm, act, conv, norm, act, conv, plus the input. `(B, C, D, H, W)` to the same."""

    def __init__(self, num_features: int, norm_num_groups: int | None, act_fn: str):
        super().__init__()
        self.norm1 = _norm(num_features, norm_num_groups)
        self.conv1 = Conv3d(num_features, num_features, 3, padding=1)
        self.norm2 = _norm(num_features, norm_num_groups)
        self.conv2 = Conv3d(num_features, num_features, 3, padding=1)
        self.nonlinearity = get_activation(act_fn)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = self.conv1(self.nonlinearity(self.norm1(hidden_states)))
        residual = self.conv2(self.nonlinearity(self.norm2(residual)))
        return hidden_states + residual


class Encoder3D(nn.Module):
    """One biological channel `(B, 1, D, H, W)` to latents `(B, n, d, h, w)`.

    The first convolution halves the grid at once, so no layer works at the full resolution: on a 64³ volume such a
    layer costs more time and memory than all the others together.
    """

    def __init__(self, latent_channels, block_out_channels, layers_per_block, norm_num_groups, act_fn):
        super().__init__()
        widths = block_out_channels
        self.conv_in = HalvingConv3d(1, widths[0]) if len(widths) > 1 else Conv3d(1, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, num_layers in enumerate(layers_per_block, 1):
            width_in, width = widths[level - 1], widths[level]
            block = [ResidualBlock(width, norm_num_groups, act_fn) for _ in range(num_layers)]
            if level > 1:
                block.insert(0, HalvingConv3d(width_in, width))
            elif width_in != width:
                block.insert(0, Conv3d(width_in, width, 3, padding=1))
            self.down_blocks.append(nn.Sequential(*block))
        self.norm_out = _norm(widths[-1], norm_num_groups)
        self.nonlinearity = get_activation(act_fn)
        self.conv_out = Conv3d(widths[-1], latent_channels, 1)
        self.gradient_checkpointing = False

    def forward(self, sample: Tensor) -> Tensor:
        # 1. in
        hidden_states = self.nonlinearity(self.conv_in(sample))
        # 2. down
        for block in self.down_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        # 3. out
        return self.conv_out(self.nonlinearity(self.norm_out(hidden_states)))


class Decoder3D(nn.Module):
    """All channels' quantised latents `(B, M*n, d, h, w)` to all channels' volumes `(B, M, D, H, W)` (eq. 5)."""

    def __init__(self, num_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups, act_fn):
        super().__init__()
        widths = block_out_channels
        self.conv_in = Conv3d(latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for level, num_layers in reversed(list(enumerate(layers_per_block, 1))):
            width, width_out = widths[level], widths[level - 1]
            block = [ResidualBlock(width, norm_num_groups, act_fn) for _ in range(num_layers)]
            if level > 1:
                block.append(DoublingConv3d(width, width_out))
            elif width != width_out:
                block.append(Conv3d(width, width_out, 3, padding=1))
            self.up_blocks.append(nn.Sequential(*block))
        self.norm_out = _norm(widths[0], norm_num_groups)
        self.nonlinearity = get_activation(act_fn)
        last_conv = DoublingConv3d if len(widths) > 1 else lambda *features: Conv3d(*features, 3, padding=1)
        self.conv_out = last_conv(widths[0], num_channels)
        self.gradient_checkpointing = False

    def forward(self, latents: Tensor) -> Tensor:
        # 1. in
        hidden_states = self.conv_in(latents)
        # 2. up
        for block in self.up_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        # 3. out
        return self.conv_out(self.nonlinearity(self.norm_out(hidden_states)))


def initialize_convolution(module: nn.Module) -> None:
    # PyTorch's default shrinks the signal threefold at each convolution, below the size of its biases, and the decoder
    # then learns the average cell without its latents: ten times the error after 75 steps of the demo.
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)
    # A doubling convolution begins as linear interpolation of mixed features; a random one draws a chequered pattern
    # into every volume, which takes long to unlearn.
    elif isinstance(module, nn.ConvTranspose3d):
        in_features, out_features = module.weight.shape[:2]
        mixing = torch.randn(in_features, out_features) / math.sqrt(in_features)
        line = torch.tensor([0.25, 0.75, 0.75, 0.25])
        kernel = line[:, None, None] * line[:, None] * line
        with torch.no_grad():
            module.weight.copy_(mixing[:, :, None, None, None] * kernel)
        nn.init.zeros_(module.bias)


def _norm(num_features: int, norm_num_groups: int | None) -> nn.Module:
    return VoxelNorm(num_features) if norm_num_groups is None else InstanceNorm(num_features, norm_num_groups)
