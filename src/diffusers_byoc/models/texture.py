"""What a code cannot carry: a small flow-matching network draws grain and camera noise into decoded volumes.

An autoencoder that minimises an error returns the mean of all cells that fit its codes: smooth. The network here
learns what is left, cell minus decoded cell, as a distribution (flow matching, Lipman et al. 2023; a regression and a
diffusion of its residual as in CorrDiff, Mardani et al. 2023), so that decoded cells plus a draw of it are distributed
as cells are. It works on voxels, not on latents, and sees a neighbourhood of some twenty voxels: it learns from small
crops around the cell, and draws cells of any size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .checked_loading import CheckedModelMixin
from .convolution import Conv3d
from .normalization import VoxelNorm, to_fast_memory_format


@dataclass
class TextureUNet3DOutput(BaseOutput):
    """`sample` (B, M, D, H, W): the velocity, noise minus texture."""

    sample: Tensor


class TextureBlock(nn.Module):
    """norm, act, conv; norm scaled and shifted by the time embedding, act, conv; plus the (projected) input.

    Every voxel is normalised alone, so that crops and whole cells are the same to it.
    """

    def __init__(self, in_features: int, out_features: int, time_dim: int, act_fn: str):
        super().__init__()
        self.norm1 = VoxelNorm(in_features)
        self.conv1 = Conv3d(in_features, out_features, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * out_features)
        self.norm2 = VoxelNorm(out_features)
        self.conv2 = Conv3d(out_features, out_features, 3, padding=1)
        self.conv_shortcut = Conv3d(in_features, out_features, 1) if in_features != out_features else nn.Identity()
        self.nonlinearity = get_activation(act_fn)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor) -> Tensor:
        residual = self.conv1(self.nonlinearity(self.norm1(hidden_states)))
        scale, shift = self.time_emb_proj(time_embedding)[:, :, None, None, None].chunk(2, dim=1)
        residual = self.conv2(self.nonlinearity(self.norm2(residual) * (1 + scale) + shift))
        return self.conv_shortcut(hidden_states) + residual


class TextureUNet3D(CheckedModelMixin, ConfigMixin):
    """U-Net for the texture of volumes of M biological channels, given the volumes without it.

    Voxels enter and leave in cubes of 2³, eight features a channel. What a cube does not share with its neighbour
    would show as a grid; the sampler therefore moves the cubes by a voxel from step to step (`add_texture`).

    Args:
        num_channels: M, the biological channels (2: cell, nucleus).
        block_out_channels: features at each resolution, finest (cubes of 2³ voxels) first.
        layers_per_block: residual blocks at each resolution: as many down as up, but the coarsest has them once.
        texture_scale: standard deviation of cell minus decoded cell, in the volumes' units ([-1, 1]); the network's
            unit of texture.
        background_margin: background, exactly -1, is learnt as -1 - background_margin: clipped, it is -1 again, though
            the network errs.
        voxel_gain: predict two numbers for every voxel, the velocity being ``shift + gain * sample``. Where texture is
            noise, as strong as the place is bright, the best velocity is the sample itself times such a gain; the
            trunk's norms lose the size of the sample, and with it some of the noise.
        connected_cells: all but a few of the cells trained on are of one connected piece: what is apart from a
            generated cell gets no texture, and is left out (`add_texture`).
        act_fn: activation, by diffusers' names.

    Raises:
        ValueError: for `layers_per_block` of another length than `block_out_channels`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TextureBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding"]
    _supports_group_offloading = True

    @register_to_config
    def __init__(
        self,
        num_channels: int = 2,
        block_out_channels: tuple[int, ...] = (40, 64),
        layers_per_block: tuple[int, ...] = (2, 3),
        texture_scale: float = 0.15,
        background_margin: float = 0.1,
        voxel_gain: bool = True,
        connected_cells: bool = False,
        act_fn: str = "silu",
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        if len(layers_per_block) != len(widths):
            raise ValueError(
                f"Expected {len(widths)} layers_per_block, one for each entry of block_out_channels, "
                f"got {len(layers_per_block)}: {layers_per_block}. Give one number for each."
            )
        self.downsampling_factor = 2 ** len(widths)

        # 1. time
        time_dim = 128
        self.time_proj = Timesteps(time_dim // 2, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_dim // 2, time_dim, act_fn=act_fn)

        # 2. in: noisy texture and volume, in cubes
        self.conv_in = Conv3d(2 * 8 * num_channels, widths[0], 3, padding=1)

        # 3. down, 4. middle
        def blocks(level: int, in_features: int) -> nn.ModuleList:
            features = [in_features] + [widths[level]] * layers_per_block[level]
            pairs = zip(features[:-1], features[1:], strict=True)
            return nn.ModuleList(TextureBlock(*pair, time_dim, act_fn) for pair in pairs)

        finer = range(len(widths) - 1)
        self.down_blocks = nn.ModuleList(blocks(level, widths[level]) for level in finer)
        self.downsamplers = nn.ModuleList(Conv3d(widths[k], widths[k + 1], 2, stride=2) for k in finer)
        self.mid_blocks = blocks(len(widths) - 1, widths[-1])

        # 5. up
        self.upsamplers = nn.ModuleList(Conv3d(widths[k + 1], widths[k], 3, padding=1) for k in reversed(finer))
        self.up_blocks = nn.ModuleList(blocks(level, 2 * widths[level]) for level in reversed(finer))

        # 6. out
        self.norm_out = VoxelNorm(widths[0])
        self.nonlinearity = get_activation(act_fn)
        self.conv_out = Conv3d(widths[0], (2 if voxel_gain else 1) * 8 * num_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

        self.gradient_checkpointing = False

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, reconstruction: Tensor, return_dict: bool = True
    ) -> TextureUNet3DOutput | tuple[Tensor]:
        """Predict the velocity of `sample`.

        Args:
            sample: (B, M, D, H, W) texture on its way from noise (timestep 1000) to texture (0), in the network's
                units.
            timestep: in [0, 1000], one for all samples, or (B,).
            reconstruction: (B, M, D, H, W) decoded volumes in [-1, 1].
            return_dict: return the dataclass, or a plain tuple.

        Returns:
            `sample` (B, M, D, H, W): noise minus texture.

        Raises:
            ValueError: for another number of channels, or axes that cannot be halved.
        """
        self._check(sample, reconstruction)

        # 1. time
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], device=sample.device)
        timesteps = timestep.reshape(-1).to(sample.device).expand(len(sample))
        embedding = self.nonlinearity(self.time_embedding(self.time_proj(timesteps).to(sample.dtype)))

        # 2. in
        cubes = to_cubes(torch.cat([sample, reconstruction.to(sample.dtype)], dim=1))  # (B, 2*8*M, D/2, H/2, W/2)
        hidden_states = self.conv_in(to_fast_memory_format(cubes))

        # 3. down
        skips = []
        for blocks, downsampler in zip(self.down_blocks, self.downsamplers, strict=True):
            hidden_states = self._run(blocks, hidden_states, embedding)
            skips.append(hidden_states)
            hidden_states = downsampler(hidden_states)

        # 4. middle
        hidden_states = self._run(self.mid_blocks, hidden_states, embedding)

        # 5. up
        for upsampler, blocks in zip(self.upsamplers, self.up_blocks, strict=True):
            hidden_states = F.interpolate(upsampler(hidden_states), scale_factor=2.0, mode="nearest")
            hidden_states = self._run(blocks, torch.cat([skips.pop(), hidden_states], dim=1), embedding)

        # 6. out
        velocity = from_cubes(self.conv_out(self.nonlinearity(self.norm_out(hidden_states))))
        if self.config.voxel_gain:
            shift, gain = velocity.chunk(2, dim=1)
            velocity = shift + gain * sample
        return TextureUNet3DOutput(sample=velocity) if return_dict else (velocity,)

    # ------------------------------------------------------------------ texture and volumes

    def texture(self, volumes: Tensor, reconstruction: Tensor) -> Tensor:
        """What `reconstruction` lacks of `volumes`, both (B, M, D, H, W) in [-1, 1], in the network's units."""
        background = -1 - self.config.background_margin
        return (torch.where(volumes <= -1, background, volumes) - reconstruction) / self.config.texture_scale

    def apply_texture(self, reconstruction: Tensor, texture: Tensor) -> Tensor:
        """The inverse of `texture`, in [-1, 1]."""
        return (reconstruction + self.config.texture_scale * texture).clamp(-1, 1)

    # ------------------------------------------------------------------ inside

    def _run(self, blocks: nn.ModuleList, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, embedding)
            else:
                hidden_states = block(hidden_states, embedding)
        return hidden_states

    def _check(self, sample: Tensor, reconstruction: Tensor) -> None:
        if sample.ndim != 5 or sample.shape[1] != self.config.num_channels or sample.shape != reconstruction.shape:
            raise ValueError(
                f"Expected sample and reconstruction (B, {self.config.num_channels}, D, H, W), got "
                f"{tuple(sample.shape)} and {tuple(reconstruction.shape)}. Pass decoded volumes, and noise like them."
            )
        if any(size % self.downsampling_factor for size in sample.shape[2:]):
            raise ValueError(
                f"Expected axes divisible by {self.downsampling_factor}, got {tuple(sample.shape[2:])}. "
                "Pad the volume with background, -1."
            )


def to_cubes(volumes: Tensor) -> Tensor:
    """(B, C, D, H, W) to (B, 8*C, D/2, H/2, W/2): the 2³ voxels of a cube side by side as features."""
    parts = volumes.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, D/2, 2, H/2, 2, W/2, 2)
    return parts.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def from_cubes(cubes: Tensor) -> Tensor:
    """The inverse of `to_cubes`."""
    parts = cubes.unflatten(1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, C, D/2, 2, H/2, 2, W/2, 2)
    return parts.flatten(6, 7).flatten(4, 5).flatten(2, 3)
