"""The denoiser of MedicalDiffusion (Khader et al. 2023): a U-Net of planes that look along the depth by attention.

Its design is that of the video diffusion model (Ho et al. 2022, section 3), with the depth in the place of the time.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..models.checked_loading import CheckedModelMixin
from ..models.normalization import InstanceNorm, to_fast_memory_format


@dataclass
class MedicalDiffusionUNet3DOutput(BaseOutput):
    """`sample` (B, n, d, h, w): the predicted noise."""

    sample: Tensor


class RelativePositionBias(nn.Module):
    """A learnt number for each head and distance along the depth: near distances one by one, far ones in groups.

    Args:
        heads: of the attention.
        num_buckets: learnt numbers a head; half of them for each direction.
        max_distance: from here on all distances share the last number.

    Source: Raffel et al. 2020 (T5), section 2.1.
    """

    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 32):
        super().__init__()
        self.max_distance = max_distance
        self.embedding = nn.Embedding(num_buckets, heads)

    def forward(self, depth: int) -> Tensor:
        """(heads, depth, depth): of query i (axis 1) and key j (axis 2), to be added to their score."""
        places = torch.arange(depth, device=self.embedding.weight.device)
        offsets = places[:, None] - places  # how far the key lies before the query
        distances = offsets.abs()
        num_a_side = self.embedding.num_embeddings // 2
        num_exact = num_a_side // 2
        growth = (distances.clamp(min=1) / num_exact).log() / math.log(self.max_distance / num_exact)
        grouped = (num_exact + (growth * (num_a_side - num_exact)).long()).clamp(max=num_a_side - 1)
        buckets = torch.where(distances < num_exact, distances, grouped) + num_a_side * (offsets < 0)
        return self.embedding(buckets).permute(2, 0, 1)


class SpatialLinearAttention(nn.Module):
    """Pre-normalised residual attention within each depth plane, linear in the number of its voxels.

    The queries are normalised over their features and the keys over the plane, so that keys and values are multiplied
    first: a small matrix per head, whatever the plane's size.

    Args:
        num_features: C.
        heads: of the attention.
        head_dim: features per head.

    Source: Shen et al. 2021 (efficient attention), with softmax normalisation.
    """

    def __init__(self, num_features: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(num_features, bias=False)
        self.to_qkv = nn.Linear(num_features, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, num_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same."""
        voxels = hidden_states.permute(0, 2, 3, 4, 1)  # (B, D, H, W, C)
        projections = self.to_qkv(self.norm(voxels)).flatten(2, 3).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(2, 3) for x in projections)
        query = query.softmax(-1) * query.shape[-1] ** -0.5  # (B, D, heads, H*W, head_dim)
        context = key.softmax(-2).transpose(-1, -2) @ value  # (B, D, heads, head_dim, head_dim)
        update = self.to_out((query @ context).transpose(2, 3).flatten(3))  # (B, D, H*W, C)
        return (voxels + update.view_as(voxels)).permute(0, 4, 1, 2, 3)


class SoftmaxAttention(nn.Module):
    """Pre-normalised residual self-attention over `axes` of `(B, C, D, H, W)`.

    Args:
        num_features: C.
        heads: of the attention.
        head_dim: features per head, even.
        axes: "spatial" attends over (H, W) within each plane; "depth" over D at each (H, W), with queries and keys
            rotated by their place (Su et al. 2021, section 3.4.2) and a bias that is given.
    """

    def __init__(self, num_features: int, heads: int, head_dim: int, axes: str):
        super().__init__()
        self.heads, self.axes = heads, axes
        self.norm = nn.LayerNorm(num_features, bias=False)
        self.to_qkv = nn.Linear(num_features, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, num_features, bias=False)

    def forward(self, hidden_states: Tensor, position_bias: Tensor | None = None) -> Tensor:
        """(B, C, D, H, W) to the same; `position_bias` (heads, D, D) is for the depth."""
        is_depth = self.axes == "depth"
        voxels = hidden_states.permute(0, 2, 3, 4, 1)  # (B, D, H, W, C)
        sequences = voxels.permute(0, 2, 3, 1, 4) if is_depth else voxels.flatten(2, 3)  # (B, ..., tokens, C)
        tokens = self.norm(sequences).flatten(0, -3)  # (sequences, tokens, C)
        projections = self.to_qkv(tokens).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projections)
        if is_depth:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            rotation = get_1d_rotary_pos_embed(query.shape[-1], places, use_real=True)
            query, key = apply_rotary_emb(query, rotation), apply_rotary_emb(key, rotation)
            position_bias = position_bias.to(query.dtype)
        update = F.scaled_dot_product_attention(query, key, value, attn_mask=position_bias)
        update = self.to_out(update.transpose(1, 2).flatten(2)).view(sequences.shape)
        update = update.permute(0, 3, 1, 2, 4) if is_depth else update.view(voxels.shape)
        return (voxels + update).permute(0, 4, 1, 2, 3)


class PlanarResidualBlock(nn.Module):
    """Twice a 1×3×3 convolution, norm and SiLU, plus the (projected) input; the time scales and shifts the first norm.

    Args:
        in_features: of the input.
        out_features: of the output.
        time_dim: features of the time embedding; None takes no time.
        norm_num_groups: of the group norm.
    """

    def __init__(self, in_features: int, out_features: int, time_dim: int | None, norm_num_groups: int):
        super().__init__()
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, 2 * out_features)
        self.conv1 = nn.Conv3d(in_features, out_features, (1, 3, 3), padding=(0, 1, 1))
        self.norm1 = InstanceNorm(out_features, norm_num_groups)
        self.conv2 = nn.Conv3d(out_features, out_features, (1, 3, 3), padding=(0, 1, 1))
        self.norm2 = InstanceNorm(out_features, norm_num_groups)
        self.conv_shortcut = nn.Conv3d(in_features, out_features, 1) if in_features != out_features else nn.Identity()

    def forward(self, hidden_states: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        scale = shift = None
        if self.time_emb_proj is not None:
            scale, shift = self.time_emb_proj(F.silu(time_embedding)).chunk(2, dim=1)  # (B, C) each
        residual = F.silu(self.norm1(self.conv1(hidden_states), scale, shift))
        residual = F.silu(self.norm2(self.conv2(residual)))
        return self.conv_shortcut(hidden_states) + residual


class PlanarBlock(nn.Module):
    """What there is at one resolution: two residual blocks, attention within the planes, attention along the depth."""

    def __init__(self, in_features, out_features, time_dim, norm_num_groups, heads, head_dim):
        super().__init__()
        self.resnets = nn.ModuleList(
            PlanarResidualBlock(features, out_features, time_dim, norm_num_groups)
            for features in (in_features, out_features)
        )
        self.spatial_attention = SpatialLinearAttention(out_features, heads, head_dim)
        self.depth_attention = SoftmaxAttention(out_features, heads, head_dim, "depth")

    def forward(self, hidden_states: Tensor, time_embedding: Tensor, position_bias: Tensor) -> Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, time_embedding)
        return self.depth_attention(self.spatial_attention(hidden_states), position_bias)


class PlanarMidBlock(nn.Module):
    """At the coarsest planes: full attention within them and along the depth, between two residual blocks."""

    def __init__(self, num_features, time_dim, norm_num_groups, heads, head_dim):
        super().__init__()
        self.resnets = nn.ModuleList(
            PlanarResidualBlock(num_features, num_features, time_dim, norm_num_groups) for _ in range(2)
        )
        self.spatial_attention = SoftmaxAttention(num_features, heads, head_dim, "spatial")
        self.depth_attention = SoftmaxAttention(num_features, heads, head_dim, "depth")

    def forward(self, hidden_states: Tensor, time_embedding: Tensor, position_bias: Tensor) -> Tensor:
        hidden_states = self.resnets[0](hidden_states, time_embedding)
        hidden_states = self.depth_attention(self.spatial_attention(hidden_states), position_bias)
        return self.resnets[1](hidden_states, time_embedding)


class MedicalDiffusionUNet3D(CheckedModelMixin, ConfigMixin):
    """3D U-Net of MedicalDiffusion over the latents of one autoencoder.

    All convolutions are within the depth planes, and H and W alone are halved; the planes know of each other by the
    attention along the depth.

    Args:
        latent_channels: n, features of the latents (8).
        sample_size: edge d = h = w of the latent grid that the model is made for. Others work, if H and W can be
            halved `len(block_out_channels) - 1` times.
        block_out_channels: features at each resolution, finest first (32 times 1, 2, 4, 8: the code takes the latent
            grid's edge for the first).
        norm_num_groups: groups of the group norm.
        num_attention_heads: of every attention.
        attention_head_dim: features per head, even.

    Raises:
        ValueError: for a `sample_size` that cannot be halved so often.

    Source: Khader et al. 2023, Methods; Ho et al. 2022 (video diffusion models), section 3.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PlanarBlock", "PlanarMidBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "position_bias"]
    _supports_group_offloading = True

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        sample_size: int = 32,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 256),
        norm_num_groups: int = 8,
        num_attention_heads: int = 8,
        attention_head_dim: int = 32,
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        self.downsampling_factor = 2 ** (len(widths) - 1)
        self._check_plane((sample_size, sample_size), "sample_size")
        heads = num_attention_heads, attention_head_dim

        # 1. time, and place along the depth
        time_dim = 4 * widths[0]
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim, act_fn="gelu")
        self.position_bias = RelativePositionBias(num_attention_heads)

        # 2. in
        self.conv_in = nn.Conv3d(latent_channels, widths[0], (1, 7, 7), padding=(0, 3, 3))
        self.depth_attention_in = SoftmaxAttention(widths[0], *heads, "depth")

        # 3. down
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down_blocks.append(PlanarBlock(widths[max(0, level - 1)], width, time_dim, norm_num_groups, *heads))
            if level < len(widths) - 1:
                self.downsamplers.append(nn.Conv3d(width, width, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)))

        # 4. middle
        self.mid_block = PlanarMidBlock(widths[-1], time_dim, norm_num_groups, *heads)

        # 5. up
        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            width_out = widths[max(0, level - 1)]
            self.up_blocks.append(PlanarBlock(2 * width, width_out, time_dim, norm_num_groups, *heads))
            if level > 0:
                self.upsamplers.append(
                    nn.ConvTranspose3d(width_out, width_out, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
                )

        # 6. out
        self.resnet_out = PlanarResidualBlock(2 * widths[0], widths[0], None, norm_num_groups)
        self.conv_out = nn.Conv3d(widths[0], latent_channels, 1)

        self.gradient_checkpointing = False

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of the noise of one volume, (n, d, h, w)."""
        return (self.config.latent_channels, *(self.config.sample_size,) * 3)

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, return_dict: bool = True
    ) -> MedicalDiffusionUNet3DOutput | tuple[Tensor]:
        """Predict the noise in `sample`.

        Args:
            sample: (B, n, d, h, w) noisy normalised latents.
            timestep: one for all samples, or (B,).
            return_dict: return the dataclass, or a plain tuple.

        Returns:
            `sample` (B, n, d, h, w).

        Raises:
            ValueError: for a sample of another shape.
        """
        if sample.ndim != 5 or sample.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"Expected a sample (B, {self.config.latent_channels}, d, h, w), got {tuple(sample.shape)}. Pass"
                " normalised latents."
            )
        self._check_plane(sample.shape[3:], "plane of latents")

        # 1. time, and place along the depth
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], device=sample.device)
        timesteps = timestep.reshape(-1).to(sample.device).expand(len(sample))
        time_embedding = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))  # (B, time_dim)
        position_bias = self.position_bias(sample.shape[2])  # (heads, d, d)

        # 2. in
        first = self.conv_in(to_fast_memory_format(sample))
        hidden_states = self.depth_attention_in(first, position_bias)

        # 3. down
        skips = []
        for level, block in enumerate(self.down_blocks):
            if level > 0:
                hidden_states = self.downsamplers[level - 1](hidden_states)
            hidden_states = self._run(block, hidden_states, time_embedding, position_bias)
            skips.append(hidden_states)

        # 4. middle
        hidden_states = self._run(self.mid_block, hidden_states, time_embedding, position_bias)

        # 5. up
        for index, block in enumerate(self.up_blocks):
            if index > 0:
                hidden_states = self.upsamplers[index - 1](hidden_states)
            hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
            hidden_states = self._run(block, hidden_states, time_embedding, position_bias)

        # 6. out
        sample = self.conv_out(self.resnet_out(torch.cat([hidden_states, first], dim=1)))
        return MedicalDiffusionUNet3DOutput(sample=sample) if return_dict else (sample,)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _check_plane(self, sizes, name: str) -> None:
        if any(size % self.downsampling_factor for size in sizes):
            raise ValueError(
                f"Expected a {name} divisible by {self.downsampling_factor} along H and W (block_out_channels has "
                f"{len(self.config.block_out_channels)} resolutions), got {tuple(sizes)}. Choose another size, or "
                "fewer entries in block_out_channels."
            )
