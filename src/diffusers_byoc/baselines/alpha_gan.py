"""α-GAN (Rosca et al. 2017) for volumes, in the form of Kwon et al. (2019)."""

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..models.convolution import Conv3d
from ..models.normalization import to_fast_memory_format
from .dcgan import COARSEST, downsampling_stack, generator_widths, upsampling_stack
from .gan import GANModel, check_channel_names


class AlphaGANGenerator(nn.Module):
    """G_θ: codes (B, latent_dim) to volumes (B, M, D, H, W) in [-1, 1]."""

    def __init__(self, num_channels: int, sample_size: int, latent_dim: int, base_channels: int):
        super().__init__()
        widths = generator_widths(sample_size, base_channels)
        self.project = nn.ConvTranspose3d(latent_dim, widths[0], COARSEST, bias=False)
        self.layers = upsampling_stack(widths, num_channels)

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(to_fast_memory_format(self.project(codes[:, :, None, None, None])))


class AlphaGANEncoder(nn.Module):
    """q_η and, with one output, D_φ: volumes (B, M, D, H, W) to (B, num_outputs), unbounded."""

    def __init__(
        self, num_channels: int, sample_size: int, num_outputs: int, base_channels: int, use_batch_norm: bool = True
    ):
        super().__init__()
        widths = generator_widths(sample_size, base_channels)[::-1]
        self.layers = downsampling_stack(num_channels, widths, use_batch_norm)
        self.conv_out = Conv3d(widths[-1], num_outputs, COARSEST)

    def forward(self, volumes: Tensor) -> Tensor:
        return self.conv_out(self.layers(to_fast_memory_format(volumes))).flatten(1)


def code_discriminator(latent_dim: int, hidden_size: int, use_batch_norm: bool) -> nn.Sequential:
    """C_ω: codes (B, latent_dim) to logits (B, 1)."""
    layers: list[nn.Module] = []  # of a plain `nn.Sequential`, which group offloading can slice
    for width in (latent_dim, hidden_size):
        layers += [nn.Linear(width, hidden_size)]
        layers += [nn.BatchNorm1d(hidden_size)] if use_batch_norm else []
        layers += [nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(hidden_size, 1))


class AlphaGAN(GANModel):
    """Auto-encoding GAN for volumes of M channels.

    Args:
        num_channels: M, the biological channels.
        channel_names: M names, in the order of the channels.
        sample_size: edge of the volumes in voxels, a power of two from 8 on.
        latent_dim: length of the codes.
        base_channels: features of the generator's finest resolution but the volume itself; they double with each
            halving. Encoder and discriminator have as many.
        code_hidden_size: features of the code discriminator's two hidden layers.
        use_batch_norm: normalise the features of the two discriminators over the batch, as Kwon et al. do; see
            `WGAN`.

    Raises:
        ValueError: for another `sample_size`, or names that are not M.
    """

    @register_to_config
    def __init__(
        self,
        num_channels: int = 2,
        channel_names: tuple[str, ...] = ("cell", "nucleus"),
        sample_size: int = 64,
        latent_dim: int = 1000,
        base_channels: int = 64,
        code_hidden_size: int = 4096,
        use_batch_norm: bool = True,
    ):
        super().__init__()
        check_channel_names(num_channels, channel_names)
        self.encoder = AlphaGANEncoder(num_channels, sample_size, latent_dim, base_channels)
        self.generator = AlphaGANGenerator(num_channels, sample_size, latent_dim, base_channels)
        self.discriminator = AlphaGANEncoder(num_channels, sample_size, 1, base_channels, use_batch_norm)
        self.code_discriminator = code_discriminator(latent_dim, code_hidden_size, use_batch_norm)


# ---------------------------------------------------------------------- losses


def reconstruction_loss(reconstruction: Tensor, volumes: Tensor) -> Tensor:
    """E[|x - G_θ(ẑ)|₁], a scalar: a mean over voxels (Rosca et al. 2017, section 3; Kwon et al. 2019, L_GD)."""
    return F.l1_loss(reconstruction.float(), volumes.float())


def ratio_loss(logits: Tensor) -> Tensor:
    """R = E[-log D + log(1 - D)], a scalar: for D = sigmoid(logit), minus the mean logit.

    It is at once the generator's loss of the Wasserstein form, where D is a critic and the logits are its scores.

    Source: Rosca et al. 2017, section 3, R_D and R_C; Kwon et al. 2019, L_GD.
    """
    return -logits.float().mean()


def discriminator_loss(real_logits: Tensor, *fake_logits: Tensor) -> Tensor:
    """-k E[log D(real)] - Σ E[log(1 - D(fake))] over k kinds of fakes, a scalar.

    For D_φ the fakes are reconstructions and samples (k = 2), for C_ω codes are fake and noise is real (k = 1).

    Source: Rosca et al. 2017, Algorithm 1; the weight k as in Kwon et al. 2019.
    """
    real = len(fake_logits) * F.softplus(-real_logits.float()).mean()
    return real + sum(F.softplus(logits.float()).mean() for logits in fake_logits)


def critic_loss(real_scores: Tensor, *fake_scores: Tensor) -> Tensor:
    """Σ E[D(fake)] - k E[D(real)] over k kinds of fakes, a scalar (Kwon et al. 2019, L_D and L_C)."""
    return sum(scores.float().mean() for scores in fake_scores) - len(fake_scores) * real_scores.float().mean()
