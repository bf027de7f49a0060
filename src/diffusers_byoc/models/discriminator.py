"""The patch discriminator of the VQGAN (BYOC eq. 8; Esser et al. 2021), in three dimensions."""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .convolution import Conv3d, HalvingConv3d
from .normalization import VoxelNorm, to_fast_memory_format


class PatchDiscriminator3D(ModelMixin, ConfigMixin):
    """Realness of every patch of a volume of M channels: one number per patch, unbounded.

    Args:
        num_channels: M.
        block_out_channels: features after each convolution of stride 2.
    """

    @register_to_config
    def __init__(self, num_channels: int = 2, block_out_channels: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        layers: list[nn.Module] = []
        width_in = num_channels
        for level, width in enumerate(block_out_channels):
            layers.append(HalvingConv3d(width_in, width))
            if level > 0:  # normalising the first level would hide the intensity
                layers.append(VoxelNorm(width))
            layers.append(nn.LeakyReLU(0.2))
            width_in = width
        layers.append(Conv3d(width_in, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, sample: Tensor) -> Tensor:
        """(B, M, D, H, W) to patch logits (B, 1, D/2^L, H/2^L, W/2^L), for L levels."""
        return self.layers(to_fast_memory_format(sample))
