"""MedicalDiffusion's VQGAN (Khader et al. 2023): one codebook for all channels, judged in slices and in volume.

Its adversaries are in `medical_diffusion_discriminator.py`, its denoiser in `medical_diffusion_unet.py`.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..models import Codebook, MultiCodebookQuantizerOutput, MultiCodebookVQOutput
from ..models.checked_loading import CheckedModelMixin
from ..models.normalization import InstanceNorm, to_fast_memory_format
from ..models.quantizer import draw_rows, quantize_rows, usage_and_perplexity


class _ReplicatePadding(torch.autograd.Function):
    """One voxel more on each side, equal to the one beside it: PyTorch's, in the memory format of its input.

    PyTorch's own is ten times slower on a CPU, and its result contiguous, which convolutions rearrange.
    """

    @staticmethod
    def forward(ctx, hidden_states: Tensor) -> Tensor:
        padded = F.pad(hidden_states, (1,) * 6)
        for axis in (2, 3, 4):
            padded.select(axis, 0).copy_(padded.select(axis, 1))
            padded.select(axis, -1).copy_(padded.select(axis, -2))
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        for axis in (4, 3, 2):
            grad.select(axis, 1).add_(grad.select(axis, 0))
            grad.select(axis, -2).add_(grad.select(axis, -1))
        return grad[:, :, 1:-1, 1:-1, 1:-1]


def _replicate(hidden_states: Tensor) -> Tensor:
    if hidden_states.device.type == "cpu":
        return _ReplicatePadding.apply(hidden_states)
    return F.pad(hidden_states, (1,) * 6, mode="replicate")


class ReplicateConv3d(nn.Conv3d):
    """A convolution as if the border went on for a voxel outside."""

    def __init__(self, in_features: int, out_features: int, kernel_size: int = 3, stride: int = 1):
        super().__init__(in_features, out_features, kernel_size, stride)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(_replicate(hidden_states))


class DoublingReplicateConv3d(nn.ConvTranspose3d):
    """Double D, H and W by a 4×4×4 transposed convolution of stride 2, as if the border went on outside."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, 4, stride=2, padding=3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(_replicate(hidden_states))


class ReplicateResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input. `(B, C, D, H, W)` to the same."""

    def __init__(self, num_features: int, norm_num_groups: int):
        super().__init__()
        self.norm1 = _norm(num_features, norm_num_groups)
        self.conv1 = ReplicateConv3d(num_features, num_features)
        self.norm2 = _norm(num_features, norm_num_groups)
        self.conv2 = ReplicateConv3d(num_features, num_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return hidden_states + residual


class MedicalDiffusionEncoder(nn.Module):
    """All channels of a volume `(B, M, D, H, W)` to latents `(B, n, d, h, w)`."""

    def __init__(self, num_channels, latent_channels, block_out_channels, norm_num_groups):
        super().__init__()
        widths = block_out_channels
        self.conv_in = ReplicateConv3d(num_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            nn.Sequential(
                ReplicateConv3d(width_in, width, kernel_size=4, stride=2),
                ReplicateResidualBlock(width, norm_num_groups),
            )
            for width_in, width in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norm_out = _norm(widths[-1], norm_num_groups)
        self.conv_out = nn.Conv3d(widths[-1], latent_channels, 1)
        self.gradient_checkpointing = False

    def forward(self, volumes: Tensor) -> Tensor:
        # 1. in
        hidden_states = self.conv_in(volumes)
        # 2. down
        for block in self.down_blocks:
            hidden_states = _run(self, block, hidden_states)
        # 3. out
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class MedicalDiffusionDecoder(nn.Module):
    """Quantised latents `(B, n, d, h, w)` to all channels of a volume `(B, M, D, H, W)`."""

    def __init__(self, num_channels, latent_channels, block_out_channels, norm_num_groups):
        super().__init__()
        widths = block_out_channels[:0:-1]  # of the doubled grids, the smallest first
        self.conv_in = nn.Conv3d(latent_channels, widths[0], 1)
        self.norm_in = _norm(widths[0], norm_num_groups)
        self.up_blocks = nn.ModuleList(
            nn.Sequential(
                DoublingReplicateConv3d(width_in, width),
                ReplicateResidualBlock(width, norm_num_groups),
                ReplicateResidualBlock(width, norm_num_groups),
            )
            for width_in, width in zip((widths[0], *widths[:-1]), widths, strict=True)
        )
        self.conv_out = ReplicateConv3d(widths[-1], num_channels)
        self.gradient_checkpointing = False

    def forward(self, latents: Tensor) -> Tensor:
        # 1. in
        hidden_states = F.silu(self.norm_in(self.conv_in(latents)))
        # 2. up
        for block in self.up_blocks:
            hidden_states = _run(self, block, hidden_states)
        # 3. out
        return self.conv_out(hidden_states)


def _norm(num_features: int, num_groups: int) -> InstanceNorm:
    return InstanceNorm(num_features, num_groups, eps=1e-6)


def _run(half: nn.Module, block: nn.Module, hidden_states: Tensor) -> Tensor:
    if torch.is_grad_enabled() and half.gradient_checkpointing:
        return half._gradient_checkpointing_func(block, hidden_states)
    return block(hidden_states)


class RestartedCodebook(Codebook):
    """A codebook whose codes begin at, and are restarted from, vectors drawn evenly from a batch.

    A code is restarted when its running count falls below a number of vectors, not below a share of an even count.

    Source: van den Oord et al. 2017, appendix A.1; Dhariwal et al. 2020 (Jukebox), section 3.1, random restarts.
    """

    def smallest_count(self, revival_threshold: float) -> float:
        return revival_threshold

    def draw(self, vectors: Tensor, approximations: Tensor, num_draws: int, generator=None) -> Tensor:
        return draw_rows(vectors, torch.ones(len(vectors)), num_draws, generator)


class MedicalDiffusionVQModel(CheckedModelMixin, ConfigMixin):
    """Vector-quantising autoencoder of volumes whose channels are those of one image.

    It differs from the public code in the codebook alone: that it has been initialised is saved with it; its codes
    move once a step, and not a second time when the discriminators are trained; the running average of a restarted
    code begins anew too.

    Args:
        num_channels: M, the biological channels.
        channel_names: M names, in their order.
        latent_channels: n, code length and features of the latents.
        num_vq_embeddings: K, the codes.
        block_out_channels: features at the volume's resolution, then at each halved one. Two take 64³ to 32³, as the
            authors' command does; three to 16³.
        norm_num_groups: groups of the group norm.
        sample_size: edge D = H = W that the model is made for, in voxels. Others that can be halved as often work.
        ema_decay: of the codes' moving average.
        restart_threshold: codes with a running count of vectors a batch below this are restarted.
        commitment_cost: weight of the commitment term in `commit_loss`.

    Raises:
        ValueError: for sizes that cannot be halved, or counts that do not fit together.

    Source: Khader et al. 2023, Methods; Esser et al. 2021, section 3.1; sizes as in the authors' command for BraTS.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ReplicateResidualBlock", "RestartedCodebook"]
    _skip_layerwise_casting_patterns = ["norm", "codebook"]
    _supports_group_offloading = True
    _group_offload_block_modules = ["decoder"]  # encode() and decode() are called without forward()

    @register_to_config
    def __init__(
        self,
        num_channels: int = 2,
        channel_names: tuple[str, ...] = ("cell", "nucleus"),
        latent_channels: int = 8,
        num_vq_embeddings: int = 16_384,
        block_out_channels: tuple[int, ...] = (16, 32),
        norm_num_groups: int = 32,
        sample_size: int = 64,
        ema_decay: float = 0.99,
        restart_threshold: float = 1.0,
        commitment_cost: float = 0.25,
    ):
        super().__init__()
        if len(channel_names) != num_channels:
            raise ValueError(f"Expected {num_channels} channel_names, got {tuple(channel_names)}. Name every channel.")
        if len(block_out_channels) < 2:
            raise ValueError(
                f"Expected at least 2 block_out_channels, got {tuple(block_out_channels)}. Give one for the volume's "
                "resolution and one for each halving."
            )
        self.downsampling_factor = 2 ** (len(block_out_channels) - 1)
        self._check_grid((sample_size,) * 3, "sample_size")
        shape = num_channels, latent_channels, tuple(block_out_channels), norm_num_groups
        self.encoder = MedicalDiffusionEncoder(*shape)
        self.codebook = RestartedCodebook(num_vq_embeddings, latent_channels)
        self.decoder = MedicalDiffusionDecoder(*shape)

    @property
    def encoders(self) -> nn.ModuleList:
        """As `MultiCodebookVQModel` has them; here one encodes all channels."""
        return nn.ModuleList([self.encoder])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of the latents of one volume, (n, d, h, w)."""
        return (self.config.latent_channels, *(self.config.sample_size // self.downsampling_factor,) * 3)

    @apply_forward_hook
    def encode(self, volumes: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Unquantised latents.

        Args:
            volumes: (B, M, D, H, W) in [-1, 1].
            return_dict: return the dataclass, or a plain tuple.

        Returns:
            `latents` (B, n, d, h, w).

        Raises:
            ValueError: for another number of axes or channels, or axes that cannot be halved.
        """
        if volumes.ndim != 5 or volumes.shape[1] != self.config.num_channels:
            raise ValueError(
                f"Expected volumes (B, {self.config.num_channels}, D, H, W), got {tuple(volumes.shape)}. Stack the "
                "biological channels along axis 1, in the order of channel_names."
            )
        self._check_grid(volumes.shape[2:], "grid of voxels")
        latents = self.encoder(to_fast_memory_format(volumes.to(self.dtype)))
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def quantize(self, latents: Tensor, return_dict: bool = True) -> MultiCodebookQuantizerOutput | tuple[Tensor, ...]:
        """Replace every latent vector by the closest code; changes nothing in the model, in train mode either.

        Args:
            latents: (B, n, d, h, w), in the encoder's units (not normalised).
            return_dict: return the dataclass, or a plain tuple.

        Returns:
            `latents` (B, n, d, h, w), and `indices` (B, 1, d, h, w) int64 of their codes.
        """
        self._check_latents(latents)
        rows = latents.movedim(1, -1)  # (B, d, h, w, n)
        codes, indices = quantize_rows(rows.flatten(0, 3), self.codebook)
        quantized = codes.to(latents.dtype).view(rows.shape).movedim(-1, 1)
        indices = indices.view(rows.shape[:-1]).unsqueeze(1)
        return MultiCodebookQuantizerOutput(quantized, indices) if return_dict else (quantized, indices)

    @apply_forward_hook
    def decode(
        self, latents: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Volumes from latents; the latents are quantised first, unless `force_not_quantize`.

        Args:
            latents: (B, n, d, h, w), in the encoder's units (not normalised).
            force_not_quantize: decode the latents as they are.
            return_dict: return the dataclass, or a plain tuple.

        Returns:
            `sample` (B, M, D, H, W), nominally in [-1, 1].
        """
        self._check_latents(latents)
        if not force_not_quantize:
            latents = self.quantize(latents).latents  # before a cast to half precision, which could move the argmin
        sample = self.decoder(to_fast_memory_format(latents.to(self.dtype)))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> MultiCodebookVQOutput | tuple[Tensor, ...]:
        """Reconstruct `sample` (B, M, D, H, W) in [-1, 1], straight-through (the training pass).

        Returns:
            `sample` (B, M, D, H, W); `commit_loss`, β‖sg[z_q] - E(x)‖², a scalar; `latents` (B, n, d, h, w)
            unquantised; `indices` (B, 1, d, h, w).
        """
        latents = self.encode(sample).latents
        quantized, indices = self.quantize(latents, return_dict=False)
        commit_loss = self.config.commitment_cost * F.mse_loss(latents.float(), quantized.detach().float())
        straight_through = quantized.detach() + (latents - latents.detach())  # the codes exactly, in any precision
        reconstruction = self.decode(straight_through, force_not_quantize=True).sample
        if not return_dict:
            return (reconstruction, commit_loss, latents, indices)
        return MultiCodebookVQOutput(reconstruction, commit_loss, latents, indices)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, n, d, h, w) to the diffusion's units: the codebook's smallest number is -1, its largest 1.

        Source: Khader et al. 2023, Methods; BYOC, section 3.2.
        """
        low, high = self.codebook.range
        return ((latents.float() - low) / (high - low) * 2 - 1).to(latents.dtype)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize_latents`."""
        low, high = self.codebook.range
        return ((latents.float() + 1) / 2 * (high - low) + low).to(latents.dtype)

    @torch.no_grad()
    def initialize_codebook(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Start the codes from vectors of `latents` (B, n, d, h, w), once; later calls do nothing."""
        if not self.codebook.is_initialized:
            self.codebook.initialize(latents.movedim(1, -1).flatten(0, 3), generator)

    @torch.no_grad()
    def update_codebook(
        self, latents: Tensor, indices: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """The training step's half of the codebook: moving averages and restarts, agreed over all processes.

        Args:
            latents: (B, n, d, h, w) as `forward` returned them.
            indices: (B, 1, d, h, w) likewise.
            generator: CPU generator that chooses what restarted codes become.

        Returns:
            In this batch: `usage` (share of codes assigned at least once), `perplexity`, `restarted` (a count).
        """
        rows = latents.movedim(1, -1).flatten(0, 3).float()
        options = self.config.ema_decay, self.config.restart_threshold, generator
        count, num_restarted = self.codebook.update(rows, indices.flatten(), *options)
        usage, perplexity = usage_and_perplexity(count)
        return {"usage": usage.item(), "perplexity": perplexity.item(), "restarted": float(num_restarted)}

    def _check_grid(self, sizes, name: str) -> None:
        if any(size % self.downsampling_factor for size in sizes):
            raise ValueError(
                f"Expected a {name} divisible by {self.downsampling_factor} (block_out_channels has "
                f"{len(self.config.block_out_channels)} resolutions), got {tuple(sizes)}. Choose another size, or "
                "fewer entries in block_out_channels."
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"Expected latents (B, {self.config.latent_channels}, d, h, w), got {tuple(latents.shape)}. Pass what "
                "encode() returns."
            )
