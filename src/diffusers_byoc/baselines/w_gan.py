"""W-GAN (Arjovsky et al. 2017, Gulrajani et al. 2017) for volumes, in the form of Kwon et al. (2019)."""

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..models.convolution import Conv3d
from ..models.normalization import to_fast_memory_format
from .dcgan import COARSEST, downsampling_stack, generator_widths, upsampling_stack
from .gan import GANModel, check_channel_names


class WGANGenerator(nn.Module):
    """g_θ: noise (B, latent_dim) to volumes (B, M, D, H, W) in [-1, 1]."""

    def __init__(self, num_channels: int, sample_size: int, latent_dim: int, base_channels: int):
        super().__init__()
        widths = generator_widths(sample_size, base_channels)
        self.project = nn.Linear(latent_dim, widths[0] * COARSEST**3)
        self.grid = (widths[0], *(COARSEST,) * 3)
        self.layers = upsampling_stack(widths, num_channels)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(to_fast_memory_format(self.project(latents).unflatten(1, self.grid)))


class WGANCritic(nn.Module):
    """f_w: volumes (B, M, D, H, W) to scores (B, 1, 2, 2, 2), unbounded, one for each octant."""

    def __init__(self, num_channels: int, sample_size: int, base_channels: int, use_batch_norm: bool):
        super().__init__()
        widths = generator_widths(sample_size, base_channels)[::-1]
        self.layers = downsampling_stack(num_channels, widths, use_batch_norm)
        self.conv_out = Conv3d(widths[-1], 1, 4, stride=2, padding=1)

    def forward(self, volumes: Tensor) -> Tensor:
        return self.conv_out(self.layers(to_fast_memory_format(volumes)))


class WGAN(GANModel):
    """Wasserstein GAN for volumes of M channels.

    Args:
        num_channels: M, the biological channels.
        channel_names: M names, in the order of the channels.
        sample_size: edge of the volumes in voxels, a power of two from 8 on.
        latent_dim: length of the noise.
        base_channels: features of the generator's finest resolution but the volume itself; they double with each
            halving. The critic has as many.
        use_batch_norm: normalise the critic's features over the batch, as Kwon et al. do. Gulrajani et al. advise
            against it: the gradient penalty is one of each sample, which batch norm makes depend on the others.

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
        use_batch_norm: bool = True,
    ):
        super().__init__()
        check_channel_names(num_channels, channel_names)
        self.generator = WGANGenerator(num_channels, sample_size, latent_dim, base_channels)
        self.critic = WGANCritic(num_channels, sample_size, base_channels, use_batch_norm)


# ---------------------------------------------------------------------- losses


def critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """-(E[f_w(x)] - E[f_w(g_θ(z))]), a scalar: minus the estimate of the Wasserstein distance.

    Source: Arjovsky et al. 2017, eq. 3 and Algorithm 1, line 5.
    """
    return fake_scores.float().mean() - real_scores.float().mean()


def generator_loss(fake_scores: Tensor) -> Tensor:
    """-E[f_w(g_θ(z))], a scalar (Arjovsky et al. 2017, Algorithm 1, line 10)."""
    return -fake_scores.float().mean()


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, shares: Tensor) -> Tensor:
    """E[(‖∇ f_w(x̂)‖₂ - 1)²] at x̂ between real and fake samples, a scalar.

    In float32, whatever arithmetic is around it: it is differentiated twice.

    Args:
        critic: f_w; what it returns for one sample is averaged.
        real: (B, ...) samples.
        fake: (B, ...) samples; their graph is not followed.
        shares: (B,) ε in [0, 1], of the real sample in x̂ = ε x + (1 - ε) x̃.

    Source: Gulrajani et al. 2017, eq. 3.
    """
    with torch.autocast(real.device.type, enabled=False):
        shares = shares.view(-1, *(1,) * (real.ndim - 1))
        mixed = (shares * real.float() + (1 - shares) * fake.detach().float()).requires_grad_()
        scores = critic(mixed.view_as(mixed)).flatten(1).mean(1)
        (gradients,) = torch.autograd.grad(scores.sum(), mixed, create_graph=True)
        return (gradients.flatten(1).norm(dim=1) - 1).square().mean()


@torch.no_grad()
def clip_weights(critic: nn.Module, limit: float) -> None:
    """Bring every weight into [-c, c] (Arjovsky et al. 2017, Algorithm 1, line 7)."""
    for weight in critic.parameters():
        weight.clamp_(-limit, limit)
