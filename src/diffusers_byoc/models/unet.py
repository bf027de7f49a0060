"""The DualChannelUNet (BYOC section 3.2, Table 3): one trunk that denoises all channels' latents jointly."""

from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.activations import get_activation
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .attention import AxialAttention
from .checked_loading import CheckedModelMixin
from .convolution import Conv3d
from .normalization import InstanceNorm, to_fast_memory_format


@dataclass
class DualChannelUNet3DOutput(BaseOutput):
    """`sample` (B, M*n, d, h, w): the predicted noise (or v, or sample, as the scheduler was configured)."""

    sample: Tensor


class TimeResidualBlock(nn.Module):
    """norm, act, conv; norm scaled and shifted by the time embedding, act, conv; plus the (projected) input."""

    def __init__(self, in_features: int, out_features: int, time_dim: int, norm_num_groups: int | None, act_fn: str):
        super().__init__()
        self.norm1 = InstanceNorm(in_features, norm_num_groups)
        self.conv1 = Conv3d(in_features, out_features, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * out_features)
        self.norm2 = InstanceNorm(out_features, norm_num_groups)
        self.conv2 = Conv3d(out_features, out_features, 3, padding=1)
        self.conv_shortcut = Conv3d(in_features, out_features, 1) if in_features != out_features else nn.Identity()
        self.nonlinearity = get_activation(act_fn)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor) -> Tensor:
        scale, shift = self.time_emb_proj(time_embedding).chunk(2, dim=1)  # (B, C) each
        residual = self.conv1(self.nonlinearity(self.norm1(hidden_states)))
        residual = self.conv2(self.nonlinearity(self.norm2(residual, scale, shift)))
        return self.conv_shortcut(hidden_states) + residual


class UNetBlock(nn.Module):
    """A residual block; if `head_dim` is given, then attention within the depth planes and along the depth."""

    def __init__(self, in_features, out_features, time_dim, norm_num_groups, act_fn, head_dim: int | None):
        super().__init__()
        self.resnet = TimeResidualBlock(in_features, out_features, time_dim, norm_num_groups, act_fn)
        axes = () if head_dim is None else ("spatial", "depth")
        self.attentions = nn.ModuleList(AxialAttention(out_features, head_dim, a) for a in axes)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor) -> Tensor:
        hidden_states = self.resnet(hidden_states, time_embedding)
        for attention in self.attentions:
            hidden_states = attention(hidden_states)
        return hidden_states


class Upsample(nn.Module):
    """Double D, H and W by repetition, then a 3×3×3 convolution."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.conv = Conv3d(in_features, out_features, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class DualChannelUNet3D(CheckedModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """3D U-Net over the paired latents of M biological channels.

    The channels' latents lie side by side along the feature axis, so every layer's output for one channel depends on
    the others (eq. 13). Spatial and depth-wise attention follow the last residual block of each resolution, down and
    up, and the first of the two in the middle, as in Khader et al. (2023).

    Half of the time goes into the finest resolution: `layers_per_block=(0, 2, 2, 2)` leaves one block there, on the
    way up, and no attention. Training learns more in the same time so (`docs/performance.md`).

    Args:
        num_channels: M, the biological channels (2: cell, nucleus).
        latent_channels: n, features per channel (Table 2: 16).
        sample_size: edge d = h = w of the latent grid the model is made for. Other sizes work if they can be
            halved `len(block_out_channels) - 1` times.
        block_out_channels: features at each resolution, finest first (Table 3: 64 times 1, 2, 4, 8).
        layers_per_block: residual blocks at each resolution on the way down, and as many on the way up. A sequence
            has one number for each resolution, finest first; 0 is none down, and one up without attention, which
            joins what came in to what comes back.
        norm_num_groups: groups of the group norm; `None` is instance normalisation (Table 3).
        attention_head_dim: features per attention head.
        num_class_embeds: number of classes (drugs) that can be given as `class_labels`; `None` for none.
        class_embed_type: "projection" for a vector (a dose, a time, an embedding) that can be given as `conditions`,
            with classes or without; `None` for none.
        projection_class_embeddings_input_dim: length of that vector.
        conditioning_dropout_prob: share of the samples that training gives no condition; above 0 conditions can be
            left out, and what is predicted without them guides what is predicted with them.
        channel_timesteps_prob: share of the samples whose channels training puts at timesteps of their own; above 0
            every channel has a timestep, and some can be given while the others are denoised.
        act_fn: activation, by diffusers' names.

    Raises:
        ValueError: for a `sample_size` that cannot be halved so often, or that reaches 1³ under instance norm, or for
            `layers_per_block` of another length than `block_out_channels`, or for conditions that contradict each
            other, or for timesteps of the channels where there is only one.

    Source: BYOC, section 3.2, eq. 13, Table 3.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UNetBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "class_embedding", "condition_embedding"]
    _supports_group_offloading = True

    @register_to_config
    def __init__(
        self,
        num_channels: int = 2,
        latent_channels: int = 16,
        sample_size: int = 16,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        layers_per_block: int | tuple[int, ...] = 2,
        norm_num_groups: int | None = None,
        attention_head_dim: int = 32,
        num_class_embeds: int | None = None,
        act_fn: str = "silu",
        class_embed_type: str | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        conditioning_dropout_prob: float = 0.0,
        channel_timesteps_prob: float = 0.0,
    ):
        super().__init__()
        self._check_conditions_of_config()
        widths = tuple(block_out_channels)
        self.downsampling_factor = 2 ** (len(widths) - 1)
        self._check_grid((sample_size,) * 3, "sample_size")
        if isinstance(layers_per_block, int):
            layers_per_block = (layers_per_block,) * len(widths)
        elif len(layers_per_block) != len(widths):
            raise ValueError(
                f"Expected {len(widths)} layers_per_block, one for each entry of block_out_channels, "
                f"got {len(layers_per_block)}: {layers_per_block}. Give one number for all, or one for each."
            )
        self._layers = tuple(layers_per_block)

        # 1. time and conditions
        time_dim = 4 * widths[0]
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        num_times = num_channels if channel_timesteps_prob > 0 else 1
        self.time_embedding = TimestepEmbedding(num_times * widths[0], time_dim, act_fn=act_fn)
        self.class_embedding = nn.Embedding(num_class_embeds, time_dim) if num_class_embeds is not None else None
        self.condition_embedding = None
        if class_embed_type == "projection":
            self.condition_embedding = TimestepEmbedding(
                projection_class_embeddings_input_dim, time_dim, act_fn=act_fn
            )
            nn.init.zeros_(self.condition_embedding.linear_2.weight)  # so that a trained U-Net can go on
            nn.init.zeros_(self.condition_embedding.linear_2.bias)

        # 2. in
        self.conv_in = Conv3d(num_channels * latent_channels, widths[0], 3, padding=1)

        # 3. down
        block_arguments = (time_dim, norm_num_groups, act_fn)
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, (width, num_layers) in enumerate(zip(widths, self._layers, strict=True)):
            for layer in range(num_layers):
                head_dim = attention_head_dim if layer == num_layers - 1 else None
                self.down_blocks.append(UNetBlock(width, width, *block_arguments, head_dim))
            if level < len(widths) - 1:
                self.downsamplers.append(Conv3d(width, widths[level + 1], 3, stride=2, padding=1))

        # 4. middle
        self.mid_blocks = nn.ModuleList(
            UNetBlock(widths[-1], widths[-1], *block_arguments, head_dim) for head_dim in (attention_head_dim, None)
        )

        # 5. up
        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, (width, num_layers) in reversed(list(enumerate(zip(widths, self._layers, strict=True)))):
            for layer in range(max(1, num_layers)):
                head_dim = attention_head_dim if layer == num_layers - 1 else None
                self.up_blocks.append(UNetBlock(2 * width, width, *block_arguments, head_dim))
            if level > 0:
                self.upsamplers.append(Upsample(width, widths[level - 1]))

        # 6. out
        self.norm_out = InstanceNorm(widths[0], norm_num_groups)
        self.nonlinearity = get_activation(act_fn)
        self.conv_out = Conv3d(widths[0], num_channels * latent_channels, 3, padding=1)
        self.input_gain = nn.Linear(time_dim, num_channels * latent_channels)

        self.gradient_checkpointing = False

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        conditions: Tensor | None = None,
    ) -> DualChannelUNet3DOutput | tuple[Tensor]:
        """Predict the noise in `sample`.

        Args:
            sample: (B, M*n, d, h, w) noisy normalised latents.
            timestep: one for all samples, or (B,); or (B, M), one for each channel, of a model with a
                `channel_timesteps_prob`. A channel at -1 is clean: diffusers counts from 0 what the paper counts
                from 1.
            class_labels: (B,) int64 in [0, num_class_embeds), or (B, num_class_embeds) weights of the classes, of
                which 0 for all is no class. Required of a model with classes, unless its `conditioning_dropout_prob`
                is above 0.
            return_dict: return the dataclass, or a plain tuple.
            conditions: (B, projection_class_embeddings_input_dim), each number about standard normal; a row with NaN
                is none. Required likewise.

        Returns:
            `sample` (B, M*n, d, h, w).

        Raises:
            ValueError: for a sample or timesteps of another shape, or conditions where there should be none (or the
                reverse).
        """
        self._check_sample(sample)

        # 1. time and conditions
        embedding = self.embed_conditions(sample, timestep, class_labels, conditions)

        # 2. in
        hidden_states = self.conv_in(to_fast_memory_format(sample))

        # 3. down
        skips, blocks = [], iter(self.down_blocks)
        for level, num_layers in enumerate(self._layers):
            if level > 0:
                hidden_states = self.downsamplers[level - 1](hidden_states)
            if num_layers == 0:
                skips.append(hidden_states)
            for block in islice(blocks, num_layers):
                hidden_states = self._run(block, hidden_states, embedding)
                skips.append(hidden_states)

        # 4. middle
        for block in self.mid_blocks:
            hidden_states = self._run(block, hidden_states, embedding)

        # 5. up
        blocks, upsamplers = iter(self.up_blocks), iter(self.upsamplers)
        for level, num_layers in reversed(list(enumerate(self._layers))):
            for block in islice(blocks, max(1, num_layers)):
                hidden_states = self._run(block, torch.cat([hidden_states, skips.pop()], dim=1), embedding)
            if level > 0:
                hidden_states = next(upsamplers)(hidden_states)

        # 6. out; the best linear guess of the noise is the input times a number that depends on the time alone, and a
        # trunk of instance norms should not have to carry the input through for it
        gain = self.input_gain(embedding)[:, :, None, None, None]
        sample = self.conv_out(self.nonlinearity(self.norm_out(hidden_states))) + gain * sample
        return DualChannelUNet3DOutput(sample=sample) if return_dict else (sample,)

    def embed_conditions(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> Tensor:
        """All that the prediction depends on beside the latents, as one vector a sample; every block takes it.

        Each condition is a summand, and one that is not given adds nothing: the place for a further kind.

        Args:
            sample: (B, M*n, d, h, w); says how many samples there are, where, and in what arithmetic.
            timestep, class_labels, conditions: as in `forward`.

        Returns:
            (B, 4 * block_out_channels[0]).

        Raises:
            ValueError: for timesteps of another shape, or conditions where there should be none, or the reverse.
        """
        timesteps = self._read_timesteps(sample, timestep)  # (B, M), or (B, 1)
        time_features = self.time_proj(timesteps.flatten()).to(sample.dtype)  # sines are computed in float32
        embedding = self.time_embedding(time_features.view(len(sample), -1))  # (B, time_dim)
        config = self.config
        self._check_given("class_labels", class_labels, config.num_class_embeds, "num_class_embeds")
        length = config.projection_class_embeddings_input_dim
        self._check_given("conditions", conditions, length, "projection_class_embeddings_input_dim")
        if class_labels is not None:
            if class_labels.is_floating_point():
                classes = torch.arange(config.num_class_embeds, device=sample.device)
                class_embedding = class_labels @ self.class_embedding(classes).to(class_labels.dtype)
            else:
                class_embedding = self.class_embedding(class_labels)
            embedding = embedding + class_embedding.to(embedding.dtype)
        if conditions is not None:
            is_given = conditions.isfinite().all(1, keepdim=True)
            condition_embedding = self.condition_embedding(conditions.nan_to_num().to(sample.dtype))
            embedding = embedding + condition_embedding * is_given
        return self.nonlinearity(embedding)

    def _read_timesteps(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """(B, M) for a model with a timestep for each channel, otherwise (B, 1)."""
        timesteps = torch.as_tensor(timestep, device=sample.device)
        num_times = self.config.num_channels if self.config.channel_timesteps_prob > 0 else 1
        if timesteps.ndim < 2:
            timesteps = timesteps.view(-1, 1)
        elif num_times == 1 or timesteps.shape[1:] != (num_times,):
            wanted = f"one for each sample, or (B, {num_times})" if num_times > 1 else "one for each sample"
            raise ValueError(
                f"Expected timesteps {wanted}, got {tuple(timesteps.shape)}. A timestep for each channel takes a model"
                " that was trained with a channel_timesteps_prob."
            )
        return timesteps.expand(len(sample), num_times)

    def _run(self, block: nn.Module, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden_states, embedding)
        return block(hidden_states, embedding)

    def _check_conditions_of_config(self) -> None:
        config = self.config
        length, kind = config.projection_class_embeddings_input_dim, config.class_embed_type
        if kind not in (None, "projection") or (kind is None) != (length is None):
            raise ValueError(
                "Expected class_embed_type None, or 'projection' with projection_class_embeddings_input_dim, got "
                f"{kind!r} with {length!r}. Give both, or none of them."
            )
        if not 0 <= config.channel_timesteps_prob <= 1 or (config.channel_timesteps_prob and config.num_channels < 2):
            raise ValueError(
                f"Expected a channel_timesteps_prob from 0 to 1, and 0 of one channel, got "
                f"{config.channel_timesteps_prob} for num_channels {config.num_channels}. Correct it."
            )
        num_kinds = (config.num_class_embeds is not None) + (length is not None)
        largest = (1.0, 1.0, 1 / 3)[num_kinds]
        if not 0 <= config.conditioning_dropout_prob <= largest:
            raise ValueError(
                f"Expected a conditioning_dropout_prob from 0 to {largest:.2g}, got "
                f"{config.conditioning_dropout_prob}. Correct it."
            )

    def _check_given(self, name: str, condition: Tensor | None, size: int | None, argument: str) -> None:
        can_lack = size is None or self.config.conditioning_dropout_prob > 0
        if (condition is not None and size is None) or (condition is None and not can_lack):
            wanted = f"no {name}" if size is None else name
            raise ValueError(
                f"Expected {wanted} for {argument}={size}, got {condition!r}. Pass {name} exactly to a model that was "
                f"built with {argument}; to leave them out, train with a conditioning_dropout_prob."
            )

    def _check_sample(self, sample: Tensor) -> None:
        num_features = self.config.num_channels * self.config.latent_channels
        if sample.ndim != 5 or sample.shape[1] != num_features:
            raise ValueError(
                f"Expected a sample (B, {num_features}, d, h, w) ({self.config.num_channels} channels of "
                f"{self.config.latent_channels} features), got {tuple(sample.shape)}. Pass normalised latents."
            )
        self._check_grid(sample.shape[2:], "latent grid")

    def _check_grid(self, sizes, name: str) -> None:
        factor = self.downsampling_factor
        if any(size % factor for size in sizes):
            raise ValueError(
                f"Expected a {name} divisible by {factor} (block_out_channels has "
                f"{len(self.config.block_out_channels)} resolutions), got {tuple(sizes)}. "
                "Choose another size, or fewer entries in block_out_channels."
            )
        if self.config.norm_num_groups is None and all(size == factor for size in sizes):
            raise ValueError(
                f"Expected a {name} larger than {factor}, got {tuple(sizes)}: the deepest features would be 1x1x1, "
                "and instance norm of a single voxel is zero. Remove an entry of block_out_channels, choose a larger "
                "size, or set norm_num_groups."
            )
