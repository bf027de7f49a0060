"""What MedicalDiffusion's VQGAN is trained against (Khader et al. 2023): discriminators of slices and of volumes."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from ..models.checked_loading import CheckedModelMixin
from ..optional import optional


class NLayerDiscriminator(nn.Module):
    """Patch discriminator of images or volumes that gives all its features.

    Args:
        num_channels: M.
        base_channels: features of the first layer; they double with each, up to 512.
        num_layers: convolutions of stride 2.
        num_axes: 2 or 3.

    Source: Isola et al. 2017, appendix 6.1.2; in 3D Ge et al. 2022 (TATS), section 3.1.
    """

    def __init__(self, num_channels: int, base_channels: int, num_layers: int, num_axes: int):
        super().__init__()
        conv, batch_norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[num_axes]
        widths = [min(base_channels * 2**level, 512) for level in range(num_layers + 1)]
        self.layers = nn.ModuleList()
        for level, (width_in, width) in enumerate(zip([num_channels, *widths[:-1]], widths, strict=True)):
            layer = [conv(width_in, width, 4, stride=2 if level < num_layers else 1, padding=2)]
            layer += [batch_norm(width)] if level > 0 else []
            self.layers.append(nn.Sequential(*layer, nn.LeakyReLU(0.2)))
        self.layers.append(conv(widths[-1], 1, 4, padding=2))

    def forward(self, sample: Tensor) -> list[Tensor]:
        """(B, M, *axes) to the features of every layer; those of the last are the logits, one for each patch."""
        features = []
        for layer in self.layers:
            sample = layer(sample)
            features.append(sample)
        return features


class MedicalDiffusionDiscriminator(CheckedModelMixin, ConfigMixin):
    """The two adversaries of the VQGAN: of one slice (H, W) of each volume, and of the volumes.

    Args:
        num_channels: M, the biological channels.
        base_channels: features of the first layer of either.
        num_layers: convolutions of stride 2 of either.

    Source: Khader et al. 2023, Methods; Ge et al. 2022 (TATS), section 3.1.
    """

    @register_to_config
    def __init__(self, num_channels: int = 2, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.slices = NLayerDiscriminator(num_channels, base_channels, num_layers, num_axes=2)
        self.volumes = NLayerDiscriminator(num_channels, base_channels, num_layers, num_axes=3)

    def forward(self, slices: Tensor, volumes: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features of slices (B, M, H, W) and of volumes (B, M, D, H, W), layer by layer; the last are logits."""
        return self.slices(slices), self.volumes(volumes)


# ---------------------------------------------------------------------- losses


def select_slices(volumes: Tensor, places: Tensor) -> Tensor:
    """One slice (B, M, H, W) of each of the volumes (B, M, D, H, W), at `places` (B,) in [0, 1) of the depth."""
    rows = torch.arange(len(volumes), device=volumes.device)
    return volumes[rows, :, (places.to(volumes.device) * volumes.shape[2]).long()]


def feature_matching_loss(fake_features: list[Tensor], real_features: list[Tensor]) -> Tensor:
    """Σ mean |D_l(x̂) - D_l(x)| over the layers l of a discriminator but the last, a scalar.

    Source: Wang et al. 2018 (pix2pixHD), eq. 4; Ge et al. 2022 (TATS), section 3.1.
    """
    pairs = zip(fake_features[:-1], real_features[:-1], strict=True)
    return sum(F.l1_loss(fake.float(), real.detach().float()) for fake, real in pairs)


def load_perceptual_network(device: torch.device) -> nn.Module:
    """LPIPS on VGG-16 (Zhang et al. 2018), which sees images (B, 3, H, W) in [-1, 1]; it downloads VGG's weights.

    Raises:
        ImportError: if the package lpips is not installed.
        ValueError: if the weights cannot be downloaded.
    """
    lpips = optional("lpips", "perceptual")
    try:
        network = lpips.LPIPS(net="vgg", verbose=False)
    except OSError as error:
        raise ValueError(
            f"Expected the weights of VGG-16 for the perceptual loss, got {str(error)!r}. Go online once, or train "
            "with --perceptual_weight 0."
        ) from error
    return network.to(device).eval().requires_grad_(False)


def perceptual_loss(network: nn.Module, fake_slices: Tensor, real_slices: Tensor) -> Tensor:
    """LPIPS between slices (B, M, H, W) in [-1, 1], each channel as a grey picture, a scalar.

    Source: Zhang et al. 2018, eq. 1; that of M channels is the mean over them, as VGG knows red, green and blue alone.
    """
    fake, real = (slices.flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1) for slices in (fake_slices, real_slices))
    return network(fake, real).mean()
