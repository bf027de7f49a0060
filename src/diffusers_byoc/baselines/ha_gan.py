"""HA-GAN, a hierarchical amortised GAN (Sun et al. 2022), for volumes of 32³ to 256³ voxels.

In training it makes the whole volume at a quarter of the resolution and an eighth of its slices at the full one, from
the same features; afterwards the whole volume at once. The authors have it for 256³ and 128³ voxels, the latter with a
level less at the fine end. For smaller volumes the levels lessen further in the same way, but where the networks of a
low-resolution volume would have too few halvings left to keep all their convolutions, these lose their stride.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..models.convolution import Conv3d
from ..models.normalization import to_fast_memory_format
from .gan import GANModel, check_channel_names


SIZES = (32, 64, 128, 256)
DOWNSCALING = 4  # of the low-resolution volume, and of the features
NUM_CROPS = 8  # sub-volumes that a volume is parted in, along D
NUM_GROUPS = 8  # of the group norms


def norm_act(width: int) -> list[nn.Module]:
    return [nn.GroupNorm(NUM_GROUPS, width), nn.ReLU()]


class HAGANGenerator(nn.Module):
    """G^A: noise to features A; G^L: A to the low-resolution volume X̂^L; G^H: A to X̂^H, or slices of both."""

    def __init__(self, num_channels: int, sample_size: int, latent_dim: int, base_channels: int):
        super().__init__()
        width = base_channels
        self.grid = (16 * width, 4, 4, 4)

        # G^A: noise to features (B, 2 * width, D/4, H/4, W/4)
        self.project = nn.Linear(latent_dim, 16 * width * 4**3)
        num_doublings = (sample_size // 16).bit_length() - 1
        widths = [16 * width, 16 * width, 16 * width, 8 * width, 4 * width, 2 * width]
        layers: list[nn.Module] = []
        for level, (width_in, width_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += [nn.Upsample(scale_factor=2)] if 1 <= level <= num_doublings else []
            layers += [Conv3d(width_in, width_out, 3, padding=1), *norm_act(width_out)]
        self.features = nn.Sequential(*layers)

        # G^L
        self.low = nn.Sequential(
            *(Conv3d(2 * width, width, 3, padding=1), *norm_act(width)),
            *(Conv3d(width, width // 2, 3, padding=1), *norm_act(width // 2)),
            *(Conv3d(width // 2, num_channels, 3, padding=1), nn.Tanh()),
        )

        # G^H
        self.high = nn.Sequential(
            *(nn.Upsample(scale_factor=2), Conv3d(2 * width, width, 3, padding=1), *norm_act(width)),
            *(nn.Upsample(scale_factor=2), Conv3d(width, num_channels, 3, padding=1), nn.Tanh()),
        )

    def make_features(self, latents: Tensor) -> Tensor:
        """A = G^A(Z): (B, latent_dim) to (B, n, D/4, H/4, W/4)."""
        return self.features(to_fast_memory_format(self.project(latents).unflatten(1, self.grid)))

    def forward(self, latents: Tensor) -> Tensor:
        """X̂^H = G^H(G^A(Z)): (B, latent_dim) to (B, M, D, H, W) in [-1, 1]."""
        return self.high(self.make_features(latents))


class HAGANDiscriminator(nn.Module):
    """D^H and D^L: the mean of their logits, (B, 1), of slices and of the low-resolution volume they belong to."""

    def __init__(self, num_channels: int, sample_size: int, base_channels: int):
        super().__init__()
        width = base_channels

        # D^H: (B, M, D/8, H, W)
        num_halvings = (sample_size // 32).bit_length() - 1
        widths = [width // 2 * 2**level for level in range(6)][3 - num_halvings :]
        kernels = [(4, 4, 4)] * num_halvings + [(2, 4, 4)] * 2 + [(1, 4, 4)]
        layers: list[nn.Module] = []
        for width_in, width_out, kernel in zip([num_channels, *widths[:-1]], widths, kernels, strict=True):
            stride, padding = (min(kernel[0], 2), 2, 2), (int(kernel[0] == 4), 1, 1)
            layers += [spectral_norm(Conv3d(width_in, width_out, kernel, stride, padding)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(Conv3d(16 * width, 4 * width, (1, 4, 4))), nn.LeakyReLU(0.2), nn.Flatten()]
        self.high = nn.Sequential(*layers)
        self.head = nn.Sequential(
            *(spectral_norm(nn.Linear(4 * width + 1, 2 * width)), nn.LeakyReLU(0.2)),
            spectral_norm(nn.Linear(2 * width, 1)),
        )

        # D^L: (B, M, D/4, H/4, W/4)
        layers = []
        widths = low_widths(sample_size, 8 * width)
        for width_in, width_out, stride in zip(
            [num_channels, *widths[:-1]], widths, low_strides(sample_size), strict=True
        ):
            layers += [spectral_norm(low_convolution(width_in, width_out, stride)), nn.LeakyReLU(0.2)]
        self.low = nn.Sequential(*layers, spectral_norm(Conv3d(8 * width, 1, 4)), nn.Flatten())

    def forward(self, slices: Tensor, low: Tensor, position: float) -> Tensor:
        """Logits (B, 1).

        Args:
            slices: (B, M, D/8, H, W) S^H(X^H; r).
            low: (B, M, D/4, H/4, W/4) X^L.
            position: in [0, 1], of the slices along D: r over the last one possible.
        """
        high = self.high(to_fast_memory_format(slices))
        high = self.head(F.pad(high, (0, 1), value=position))
        return (high + self.low(to_fast_memory_format(low))) / 2


# functions, as group offloading slices an `nn.Sequential`, and a subclass with arguments of its own breaks there
def ha_gan_encoder(num_channels: int, base_channels: int) -> nn.Sequential:
    """E^H: slices (B, M, D/8, H, W) to features (B, n, D/32, H/4, W/4)."""
    width = base_channels
    return nn.Sequential(
        *(Conv3d(num_channels, width, 4, stride=2, padding=1), *norm_act(width)),
        *(Conv3d(width, width, 3, padding=1), *norm_act(width)),
        *(Conv3d(width, 2 * width, 4, stride=2, padding=1), *norm_act(2 * width)),
    )


def ha_gan_feature_encoder(sample_size: int, latent_dim: int, base_channels: int) -> nn.Sequential:
    """E^G: features (B, n, D/4, H/4, W/4) to codes (B, latent_dim)."""
    layers: list[nn.Module] = []
    widths = low_widths(sample_size, 8 * base_channels)
    pairs = zip([2 * base_channels, *widths[:-1]], widths, low_strides(sample_size), strict=True)
    for width_in, width_out, stride in pairs:
        layers += [low_convolution(width_in, width_out, stride), *norm_act(width_out)]
    return nn.Sequential(*layers, Conv3d(8 * base_channels, latent_dim, 4), nn.Flatten())


def low_strides(sample_size: int) -> list[int]:
    """Of three convolutions, or four for 256³, that bring a quarter of the resolution to 4³."""
    num_halvings = (sample_size // 16).bit_length() - 1
    return [2] * num_halvings + [1] * (3 - num_halvings)


def low_widths(sample_size: int, last: int) -> list[int]:
    """Features after each of these convolutions."""
    return [last // 2**level for level in reversed(range(len(low_strides(sample_size))))]


def low_convolution(width_in: int, width_out: int, stride: int) -> Conv3d:
    return Conv3d(width_in, width_out, 4 if stride == 2 else 3, stride, padding=1)


class HAGAN(GANModel):
    """Hierarchical amortised GAN for volumes of M channels.

    Args:
        num_channels: M, the biological channels.
        channel_names: M names, in the order of the channels.
        sample_size: edge of the volumes in voxels: 32, 64, 128 or 256.
        latent_dim: length of the noise.
        base_channels: features of the generator at half the resolution, a multiple of 16; all other widths follow.

    Raises:
        ValueError: for another `sample_size` or `base_channels`, or names that are not M.
    """

    @register_to_config
    def __init__(
        self,
        num_channels: int = 2,
        channel_names: tuple[str, ...] = ("cell", "nucleus"),
        sample_size: int = 64,
        latent_dim: int = 1024,
        base_channels: int = 32,
    ):
        super().__init__()
        check_channel_names(num_channels, channel_names)
        if sample_size not in SIZES:
            raise ValueError(
                f"Expected a sample_size of {', '.join(map(str, SIZES))}, got {sample_size}. Choose one of these."
            )
        if base_channels % (2 * NUM_GROUPS) or base_channels < 1:
            raise ValueError(
                f"Expected base_channels as a multiple of {2 * NUM_GROUPS}, for group norms of {NUM_GROUPS} groups on"
                f" half of them, got {base_channels}. Choose one."
            )
        self.generator = HAGANGenerator(num_channels, sample_size, latent_dim, base_channels)
        self.discriminator = HAGANDiscriminator(num_channels, sample_size, base_channels)
        self.encoder = ha_gan_encoder(num_channels, base_channels)
        self.feature_encoder = ha_gan_feature_encoder(sample_size, latent_dim, base_channels)

    @property
    def crop_size(self) -> int:
        """Slices of a sub-volume, along D."""
        return self.config.sample_size // NUM_CROPS

    @property
    def num_positions(self) -> int:
        """First slices r that a sub-volume can have: multiples of 4, where features can be cut like the volume."""
        return (self.config.sample_size - self.crop_size) // DOWNSCALING + 1

    def select(self, volumes: Tensor, place: int) -> Tensor:
        """S^H(X^H; r), (B, M, D/8, H, W) of volumes, for r = 4 · place, place in [0, num_positions)."""
        return volumes.narrow(2, DOWNSCALING * place, self.crop_size)

    def select_features(self, features: Tensor, place: int) -> Tensor:
        """S^L(A; r), (B, n, D/32, H/4, W/4) of features: what `select` is made of."""
        return features.narrow(2, place, self.crop_size // DOWNSCALING)

    def encode_features(self, volumes: Tensor) -> Tensor:
        """E^H(X^H), features (B, n, D/4, H/4, W/4) of volumes: it sees their eight parts one by one."""
        return torch.cat([self.encoder(part) for part in volumes.split(self.crop_size, dim=2)], dim=2)

    def encode(self, volumes: Tensor) -> Tensor:
        """Ẑ = E^G(E^H(X^H)), codes (B, latent_dim) of volumes (B, M, D, H, W)."""
        return self.feature_encoder(self.encode_features(volumes))


# ---------------------------------------------------------------------- losses


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E[log D(X)] - E[log(1 - D(X̂))], a scalar; L^H_GAN and L^L_GAN in one, as D is the mean of both logits.

    Source: Sun et al. 2022, section III-B.
    """
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[log D(X̂)], a scalar: the form that does not saturate."""
    return F.softplus(-fake_logits.float()).mean()


def reconstruction_loss(slices: Tensor, real_slices: Tensor) -> Tensor:
    """L^H_recon = E[|S^H(X^H; r) - G^H(Â_r)|₁], a scalar, a mean over voxels, for Â_r = E^H(S^H(X^H; r)).

    Source: Sun et al. 2022, section III-C.
    """
    return F.l1_loss(slices.float(), real_slices.float())


def feature_encoder_loss(slices: Tensor, real_slices: Tensor, low: Tensor, real_low: Tensor) -> Tensor:
    """L^G_recon, a scalar: half the sum of the errors of slices and low-resolution volume, both from Ẑ = E^G(E^H(X)).

    Source: Sun et al. 2022, section III-C.
    """
    return (reconstruction_loss(slices, real_slices) + reconstruction_loss(low, real_low)) / 2
