"""The multichannel VQGAN (BYOC section 3.1, Figure 2): shared encoder, library of codebooks, joint decoder."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from .checked_loading import CheckedModelMixin
from .encoder_decoder import Decoder3D, Encoder3D, initialize_convolution
from .normalization import to_fast_memory_format
from .quantizer import Codebook, quantize_residually, quantize_rows, usage_and_perplexity
from .tiling import blend_tiles


@dataclass
class MultiCodebookEncoderOutput(BaseOutput):
    """`latents` (B, M*n, d, h, w): unquantised, one group of n features per biological channel."""

    latents: Tensor


@dataclass
class MultiCodebookQuantizerOutput(BaseOutput):
    """`latents` (B, M*n, d, h, w): each vector replaced by its closest code; `indices` of these codes, int64.

    `indices` (B, M*num_quantizers, d, h, w): the first of each channel, then the second of each, and so on.
    """

    latents: Tensor
    indices: Tensor


@dataclass
class MultiCodebookVQOutput(BaseOutput):
    """What training needs of one pass.

    Attributes:
        sample: (B, M, D, H, W) reconstruction in [-1, 1].
        commit_loss: scalar, eq. 7 (and its mirror image, where codes are learnt by gradient).
        latents: (B, M*n, d, h, w) unquantised.
        indices: (B, M*num_quantizers, d, h, w) int64 codes, the first of each channel, then the second of each, ...
    """

    sample: Tensor
    commit_loss: Tensor
    latents: Tensor
    indices: Tensor


def is_cell_place(squares: Tensor, means: Tensor) -> Tensor:
    """Whether there is a cell (..., bool), by the `squares` (..., M*n) of the latents' distance from background.

    There is one where the latents are further from it than on average, `means` (M*n,): a cell fills a few of a hundred
    places, and is some fifteen times the average.
    """
    return (squares / means.clamp(min=1e-12)).mean(-1) > 1


class MultiCodebookVQModel(CheckedModelMixin, AutoencoderMixin, ConfigMixin):
    """Vector-quantising autoencoder for volumes of M biological channels, with one codebook per channel.

    Each channel is encoded alone, by the same encoder (eq. 1), and quantised with its own codebook (eq. 3-4); one
    decoder sees all channels' codes and returns all channels (eq. 5).

    Args:
        num_channels: M, the biological channels (2: cell, nucleus).
        channel_names: their M names; "channel_0", ... where `None` and M is not 2.
        latent_channels: n, code length and features per channel of the latents (Table 2: 16).
        num_vq_embeddings: K, codes per codebook (Table 2: 1024).
        num_quantizers: codebooks per channel (the paper: 1). Each further one quantises what those before it leave of
            a vector, and the codes are summed (Zeghidour et al. 2021, section III-C).
        block_out_channels: features from the volume towards the latents; each entry after the first halves the grid,
            so three take 64³ to 16³. The first convolution halves at once: the first entry's features lie at half the
            resolution too, without residual blocks.
        layers_per_block: residual blocks at each halved resolution, one number for all or one for each, the largest
            grid first. A block at half the resolution costs twice as much as one of twice the features at a quarter.
        norm_num_groups: groups of a group norm; `None` normalises each voxel's features alone, which confines the
            difference that decoding in tiles makes to the tiles' borders.
        act_fn: activation, by diffusers' names.
        sample_size: edge D = H = W that the model is made for, in voxels. Other sizes divisible by the
            downsampling factor work.
        share_encoder: one encoder for all channels (as eq. 1 and 5 write it), or one each.
        share_codebook: one codebook for all channels (the ablation "unimodal", section 4.4) instead of one each.
        use_ema_codebook: codes follow a moving average (True) or gradients (False).
        ema_decay: of the codebooks' moving average.
        revival_threshold: codes used less than this fraction of an even share are replaced; 0 replaces none.
        kmeans_iterations: rounds of k-means that the first codes, vectors of the first batch, go through.
        commitment_cost: weight of the commitment term in `commit_loss` (Table 2: 0.25).
        latent_scaling: "codebook_range" maps [min, max] of each channel's first codebook to [-1, 1] (section 3.2),
            whatever the `num_quantizers`: sums of codes lie little outside of it, and the extremes of several
            codebooks never meet in one vector. "standardize" gives every latent feature zero mean and unit deviation
            over the whole grid, by `latents_mean` and `latents_std`. "cell" makes background zero and gives every
            feature unit root mean square where there is a cell, by `latents_std`.
        latent_range: whose range "codebook_range" takes for a channel: "per_channel", its own codebook's; "absolute",
            that of all codebooks together; or the name of a channel, its codebook's for all. The ablations of the
            paper (section 4.4, Figure 6); `docs/ablation.md` says how each is trained and sampled.
        latents_mean: M*n means of the training latents; `set_latent_statistics` records them after training.
        latents_std: M*n deviations, likewise.

    Attributes:
        codebooks: M*num_quantizers of them; the first of each channel, then the second of each, and so on. With
            `share_codebook` num_quantizers of them.

    Raises:
        ValueError: for sizes that cannot be halved, or counts that do not fit together.

    Source: BYOC, section 3.1, eq. 1-8, Table 2.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "Codebook"]
    _skip_layerwise_casting_patterns = ["norm", "codebooks"]
    _supports_group_offloading = True
    _group_offload_block_modules = ["decoder"]  # encode() and decode() are called without forward()

    @register_to_config
    def __init__(
        self,
        num_channels: int = 2,
        channel_names: tuple[str, ...] | None = None,
        latent_channels: int = 16,
        num_vq_embeddings: int = 1024,
        num_quantizers: int = 1,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int | tuple[int, ...] = 2,
        norm_num_groups: int | None = None,
        act_fn: str = "silu",
        sample_size: int = 64,
        share_encoder: bool = True,
        share_codebook: bool = False,
        use_ema_codebook: bool = True,
        ema_decay: float = 0.99,
        revival_threshold: float = 0.03,
        kmeans_iterations: int = 0,
        commitment_cost: float = 0.25,
        latent_scaling: str = "codebook_range",
        latent_range: str = "per_channel",
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        self.downsampling_factor = 2 ** (len(block_out_channels) - 1)
        if sample_size % self.downsampling_factor:
            raise ValueError(
                f"Expected a sample_size divisible by {self.downsampling_factor} ({len(block_out_channels) - 1} "
                f"halvings for the {len(block_out_channels)} entries of block_out_channels), got {sample_size}. "
                "Choose another sample_size, or fewer entries."
            )
        if channel_names is None:
            names = ("cell", "nucleus") if num_channels == 2 else tuple(f"channel_{m}" for m in range(num_channels))
            self.register_to_config(channel_names=names)
        elif len(channel_names) != num_channels:
            raise ValueError(
                f"Expected {num_channels} channel_names (num_channels), got {len(channel_names)}: {channel_names}. "
                "Name every biological channel once."
            )
        if latent_scaling not in ("codebook_range", "standardize", "cell"):
            raise ValueError(
                f"Expected latent_scaling 'codebook_range', 'standardize' or 'cell', got {latent_scaling!r}. "
                "Choose one."
            )
        self.check_latent_range()

        num_halvings = len(block_out_channels) - 1
        if isinstance(layers_per_block, int):
            layers_per_block = (layers_per_block,) * num_halvings
        elif len(layers_per_block) != num_halvings:
            raise ValueError(
                f"Expected {num_halvings} layers_per_block, one for each entry of block_out_channels after the first, "
                f"got {len(layers_per_block)}: {layers_per_block}. Give one number for all, or one for each halving."
            )

        if num_quantizers < 1:
            raise ValueError(f"Expected num_quantizers of at least 1, got {num_quantizers}. Give 1 for the paper's.")

        num_encoders = 1 if share_encoder else num_channels
        shape = (block_out_channels, layers_per_block, norm_num_groups, act_fn)
        self.encoders = nn.ModuleList([Encoder3D(latent_channels, *shape) for _ in range(num_encoders)])
        self.codebooks = nn.ModuleList(
            [
                Codebook(num_vq_embeddings, latent_channels, use_ema_codebook)
                for _ in range(num_quantizers * (1 if share_codebook else num_channels))
            ]
        )
        self.decoder = Decoder3D(num_channels, num_channels * latent_channels, *shape)
        self.apply(initialize_convolution)
        # Start from background, which is most of a cell's cube, and from little else: unlearning a random volume costs
        # the first steps the very features that should carry the cell, and training stays at the constant -1.
        nn.init.constant_(self.decoder.conv_out.bias, -1.0)
        with torch.no_grad():
            self.decoder.conv_out.weight.mul_(0.05)

        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = 64  # voxels along each axis
        self.tile_overlap_factor = 0.25

    # ------------------------------------------------------------------ encode, quantise, decode

    @apply_forward_hook
    def encode(self, volumes: Tensor, return_dict: bool = True) -> MultiCodebookEncoderOutput | tuple[Tensor]:
        """Unquantised latents (eq. 1).

        Args:
            volumes: (B, M, D, H, W) in [-1, 1].
            return_dict: return the dataclass, or a plain tuple.

        Returns:
            `latents` (B, M*n, d, h, w).

        Raises:
            ValueError: for another number of axes or channels, or axes that cannot be halved.
        """
        self._check_volumes(volumes)
        volumes = to_fast_memory_format(volumes.to(self.dtype))
        latents = self._in_slices(self._encode, volumes)
        return MultiCodebookEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def quantize(self, latents: Tensor, return_dict: bool = True) -> MultiCodebookQuantizerOutput | tuple[Tensor, ...]:
        """Replace every latent vector by the closest code of its channel's codebook (eq. 3-4).

        With several codebooks a channel, by the sum of the closest codes of each to what is left; such a sum may be
        quantised to another one. Changes nothing in the model, in train mode either; `update_codebooks` does.

        Args:
            latents: (B, M*n, d, h, w), in the encoder's units (not normalised).
            return_dict: return the dataclass, or a plain tuple.
        """
        self._check_latents(latents)
        quantized, indices = [], []
        for channel_latents, codebooks in zip(
            self._split_channels(latents), self._codebooks_by_channel(), strict=True
        ):
            rows = channel_latents.movedim(1, -1)  # (B, d, h, w, n)
            codes, code_indices = quantize_residually(rows.flatten(0, 3), codebooks)
            quantized.append(codes.to(latents.dtype).view(rows.shape).movedim(-1, 1))
            indices.append(code_indices.view(*rows.shape[:-1], -1).movedim(-1, 1))  # (B, num_quantizers, d, h, w)
        quantized, indices = torch.cat(quantized, 1), torch.stack(indices, 2).flatten(1, 2)
        return MultiCodebookQuantizerOutput(quantized, indices) if return_dict else (quantized, indices)

    @apply_forward_hook
    def decode(
        self, latents: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Volumes from latents (eq. 5); the latents are quantised first, unless `force_not_quantize`.

        Args:
            latents: (B, M*n, d, h, w), in the encoder's units (not normalised).
            force_not_quantize: decode the latents as they are.
            return_dict: return the dataclass, or a plain tuple.

        Returns:
            `sample` (B, M, D, H, W), nominally in [-1, 1].
        """
        self._check_latents(latents)
        if not force_not_quantize:
            latents = self.quantize(latents).latents  # before a cast to half precision, which could move the argmin
        latents = to_fast_memory_format(latents.to(self.dtype))
        sample = self._in_slices(self._decode, latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self, sample: Tensor, return_dict: bool = True, latent_noise: Tensor | None = None
    ) -> MultiCodebookVQOutput | tuple[Tensor, ...]:
        """Reconstruct `sample`, straight-through (the training pass).

        Args:
            sample: (B, M, D, H, W) in [-1, 1]; whole cells, or crops around them.
            return_dict: return the dataclass, or a plain tuple.
            latent_noise: (B, M*n, d, h, w), added to the latents that are decoded, in the units of `latent_scaling`
                "cell": latents that grow gain nothing by it. None adds none.
        """
        # 1. encode
        latents = self.encode(sample).latents
        # 2. quantise; the commitment pulls the latents to their codes
        quantized, indices = self.quantize(latents, return_dict=False)
        commit_loss = self.config.commitment_cost * F.mse_loss(latents.float(), quantized.detach().float())
        if not self.config.use_ema_codebook:
            commit_loss = commit_loss + F.mse_loss(quantized.float(), latents.detach().float())
        # 3. decode; gradients pass the quantiser unchanged
        decoded = latents
        if latent_noise is not None:
            decoded = latents + latent_noise.to(latents.dtype) * self._cell_deviation(latents)
            quantized = self.quantize(decoded).latents
        straight_through = quantized.detach() + (decoded - decoded.detach())  # the codes exactly, in any precision
        reconstruction = self.decode(straight_through, force_not_quantize=True).sample
        if not return_dict:
            return (reconstruction, commit_loss, latents, indices)
        return MultiCodebookVQOutput(reconstruction, commit_loss, latents, indices)

    # ------------------------------------------------------------------ scaling for the diffusion

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, M*n, d, h, w) to the diffusion's units, by `latent_scaling` (section 3.2)."""
        shift, scale = self._latent_affine(latents)
        return ((latents.float() - shift) / scale).to(latents.dtype)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize_latents`."""
        shift, scale = self._latent_affine(latents)
        return (latents.float() * scale + shift).to(latents.dtype)

    def set_latent_statistics(self, mean: Tensor | None, std: Tensor | None) -> None:
        """Record the latents' mean and deviation, each (M*n,), for `latent_scaling`; "cell" has no use for a mean.

        None for both forgets them.
        """
        mean, std = (statistic if statistic is None else statistic.tolist() for statistic in (mean, std))
        self.register_to_config(latents_mean=mean, latents_std=std)

    @torch.no_grad()
    def background_latents(self, grid: tuple[int, int, int], device: torch.device | None = None) -> Tensor:
        """Latents (1, M*n, d, h, w), unquantised, of background alone: near the borders they are not those inside.

        `device` is where the model computes; None for where its weights are, which offloading may keep elsewhere.
        """
        shape = (1, self.config.num_channels, *(self.downsampling_factor * size for size in grid))
        return self.encode(torch.full(shape, -1.0, device=device or self.device)).latents

    def check_latent_range(self) -> None:
        """Raise `ValueError` for a `latent_range` that there is not, or that `latent_scaling` has no use for."""
        known = ("per_channel", "absolute", *self.config.channel_names)
        if self.config.latent_range not in known:
            raise ValueError(
                f"Expected latent_range among {', '.join(known)}, got {self.config.latent_range!r}. Choose one."
            )
        if self.config.latent_range != "per_channel" and self.config.latent_scaling != "codebook_range":
            raise ValueError(
                f"Expected latent_scaling 'codebook_range' for latent_range={self.config.latent_range!r}, got "
                f"{self.config.latent_scaling!r}. The other scalings do not look at codebooks: leave the range out."
            )

    def _cell_deviation(self, latents: Tensor) -> Tensor:
        """(1, M*n, 1, 1, 1), of these latents, what `latent_scaling` "cell" divides by; with its gradient."""
        grid = latents.shape[2:]
        shape = (1, self.config.num_channels, *(self.downsampling_factor * size for size in grid))
        background = self._encode_whole(torch.full(shape, -1.0, dtype=latents.dtype, device=latents.device))
        squares = (latents.float() - background.float()).square()
        # a crop's cell is all of the cell that there is in the whole volume
        num_places = len(latents) * max((self.config.sample_size // self.downsampling_factor) ** 3, math.prod(grid))
        is_cell = is_cell_place(squares.detach().movedim(1, -1), squares.detach().sum((0, 2, 3, 4)) / num_places)
        total = (squares * is_cell[:, None]).sum((0, 2, 3, 4), keepdim=True)
        return (total / is_cell.sum().clamp(min=1) + 1e-12).sqrt().to(latents.dtype)

    def _latent_affine(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, float32, that broadcast to `latents`."""
        self._check_latents(latents)
        self.check_latent_range()
        scaling, mean, std = self.config.latent_scaling, self.config.latents_mean, self.config.latents_std
        if scaling != "codebook_range" and (std is None or (mean is None and scaling == "standardize")):
            needed = "latents_std" if scaling == "cell" else "latents_mean and latents_std"
            raise ValueError(
                f"Expected {needed} for latent_scaling={scaling!r}, got None. "
                "Call set_latent_statistics with those of the training latents first."
            )
        if scaling == "cell":
            shift, scale = self.background_latents(tuple(latents.shape[2:]), latents.device).float(), torch.tensor(std)
        elif scaling == "standardize":
            shift, scale = torch.tensor(mean), torch.tensor(std)
        else:
            low, high = (
                torch.stack(ends)
                for ends in zip(*(codebooks[0].range for codebooks in self._codebooks_by_channel()), strict=True)
            )  # (M,)
            if self.config.latent_range == "absolute":
                low, high = low.amin().expand_as(low), high.amax().expand_as(high)
            elif self.config.latent_range != "per_channel":
                channel = list(self.config.channel_names).index(self.config.latent_range)
                low, high = low[channel].expand_as(low), high[channel].expand_as(high)
            shift, scale = ((low + high) / 2, ((high - low) / 2).clamp(min=1e-8))
            shift, scale = (x.repeat_interleave(self.config.latent_channels) for x in (shift, scale))
        return tuple(x.to(latents.device).view(1, -1, *(x.shape[2:] or (1, 1, 1))) for x in (shift, scale))

    # ------------------------------------------------------------------ codebook maintenance

    @torch.no_grad()
    def initialize_codebooks(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Start every codebook from vectors of `latents` (B, M*n, d, h, w), once; later calls do nothing."""
        channels = [channel.movedim(1, -1).flatten(0, 3).float() for channel in self._split_channels(latents)]
        if self.config.share_codebook:
            channels = [torch.cat(channels)]
        for rows, codebooks in zip(channels, self._codebooks_by_channel(), strict=False):
            for stage, codebook in enumerate(codebooks):
                if stage > 0:  # what those before it leave
                    rows = rows - quantize_rows(rows, codebooks[stage - 1])[0]
                if not codebook.is_initialized:
                    codebook.initialize(rows, generator, self.config.kmeans_iterations)

    @torch.no_grad()
    def update_codebooks(
        self, latents: Tensor, indices: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """Training step's half of the codebooks: moving averages and dead-code revival, agreed over all processes.

        Args:
            latents: (B, M*n, d, h, w) as `forward` returned them.
            indices: (B, M*num_quantizers, d, h, w) likewise.
            generator: CPU generator that chooses replacements for dead codes.

        Returns:
            Per codebook, by `codebook_names`, in this batch: `usage/NAME` (share of codes assigned at least once),
            `perplexity/NAME`, `revived/NAME`.
        """
        vectors = defaultdict(list)  # of each codebook, before any moves, with their codes
        for channel, channel_latents in enumerate(self._split_channels(latents)):
            rest = channel_latents.movedim(1, -1).flatten(0, 3).float()
            for place in range(channel, indices.shape[1], self.config.num_channels):
                number, codes = self.codebook_numbers[place], indices[:, place].flatten()
                vectors[number].append((rest, codes))
                rest = rest - self.codebooks[number]()[codes]
        statistics = {}
        for number, parts in vectors.items():
            rows, codes = (torch.cat(part) for part in zip(*parts, strict=True))
            count, num_revived = self.codebooks[number].update(
                rows, codes, self.config.ema_decay, self.config.revival_threshold, generator
            )
            usage, perplexity = usage_and_perplexity(count)
            name = self.codebook_names[number]
            statistics[f"usage/{name}"] = usage.item()
            statistics[f"perplexity/{name}"] = perplexity.item()
            statistics[f"revived/{name}"] = float(num_revived)
        return statistics

    @property
    def codebook_names(self) -> list[str]:
        """Of the `codebooks`, in their order: that of its channel, with its number from the second on ("cell_2")."""
        stages = range(1, self.config.num_quantizers + 1)
        names = ["shared"] if self.config.share_codebook else self.config.channel_names
        return [name if stage == 1 else f"{name}_{stage}" for stage in stages for name in names]

    @property
    def codebook_numbers(self) -> list[int]:
        """Which of the `codebooks` each of the `indices` of a vector belongs to."""
        places = range(self.config.num_channels * self.config.num_quantizers)
        return [place // self.config.num_channels if self.config.share_codebook else place for place in places]

    # ------------------------------------------------------------------ inside

    def _encode(self, volumes: Tensor) -> Tensor:
        if self.use_tiling:
            return self._in_tiles(self._encode_whole, volumes, self.tile_sample_min_size, 1 / self.downsampling_factor)
        return self._encode_whole(volumes)

    def _encode_whole(self, volumes: Tensor) -> Tensor:
        if self.config.share_encoder:
            channels = to_fast_memory_format(volumes.flatten(0, 1).unsqueeze(1))
            latents = self.encoders[0](channels)  # (B*M, n, d, h, w)
            return latents.unflatten(0, (-1, self.config.num_channels)).flatten(1, 2)  # (B, M*n, d, h, w)
        channels = (to_fast_memory_format(channel) for channel in volumes.split(1, dim=1))
        return torch.cat([encoder(channel) for encoder, channel in zip(self.encoders, channels, strict=True)], 1)

    def _decode(self, latents: Tensor) -> Tensor:
        if self.use_tiling:
            tile_size = self.tile_sample_min_size // self.downsampling_factor
            return self._in_tiles(self.decoder, latents, tile_size, self.downsampling_factor)
        return self.decoder(latents)

    def _in_slices(self, function, batch: Tensor) -> Tensor:
        if self.use_slicing and len(batch) > 1:
            return torch.cat([function(part) for part in batch.split(1)])
        return function(batch)

    def _in_tiles(self, function, volume: Tensor, tile_size: int, scale: float) -> Tensor:
        overlap = math.ceil(tile_size * self.tile_overlap_factor)
        if scale < 1:  # encoding: tiles must start on the latent grid
            overlap = math.ceil(overlap * scale) * self.downsampling_factor
        return blend_tiles(function, volume, tile_size, overlap, scale)

    def _split_channels(self, latents: Tensor) -> tuple[Tensor, ...]:
        return latents.split(self.config.latent_channels, dim=1)

    def _codebooks_by_channel(self) -> list[list[Codebook]]:
        if self.config.share_codebook:
            return [list(self.codebooks)] * self.config.num_channels
        return [
            list(self.codebooks)[channel :: self.config.num_channels] for channel in range(self.config.num_channels)
        ]

    def _check_volumes(self, volumes: Tensor) -> None:
        if volumes.ndim != 5 or volumes.shape[1] != self.config.num_channels:
            raise ValueError(
                f"Expected volumes (B, {self.config.num_channels}, D, H, W), got {tuple(volumes.shape)}. "
                "Stack the biological channels along axis 1, in the order of channel_names."
            )
        if any(size % self.downsampling_factor for size in volumes.shape[2:]):
            raise ValueError(
                f"Expected axes divisible by {self.downsampling_factor}, got {tuple(volumes.shape[2:])}. "
                "Pad the volume, for example with VolumeProcessor."
            )

    def _check_latents(self, latents: Tensor) -> None:
        num_features = self.config.num_channels * self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != num_features:
            raise ValueError(
                f"Expected latents (B, {num_features}, d, h, w) ({self.config.num_channels} channels of "
                f"{self.config.latent_channels} features), got {tuple(latents.shape)}. Pass what encode() returns."
            )
