"""The stacks of convolutions that the GANs for brain volumes share (Kwon et al. 2019, Fig. 2), after DCGAN."""

import math

from torch import nn

from ..models.convolution import Conv3d, HalvingConv3d


COARSEST = 4  # voxels: the edge of the grid that a generator begins with, and a critic ends with


def count_halvings(sample_size: int, smallest: int = COARSEST) -> int:
    """How often a cube of this edge is halved to reach `smallest`.

    Raises:
        ValueError: if it is not `smallest` times a power of two above 1.
    """
    halvings = int(math.log2(max(1, sample_size // smallest)))
    if halvings < 1 or smallest * 2**halvings != sample_size:
        raise ValueError(
            f"Expected a sample_size of {2 * smallest}, {4 * smallest}, {8 * smallest} or a larger power of two, got"
            f" {sample_size}. Choose one of these."
        )
    return halvings


def generator_widths(sample_size: int, base_channels: int) -> list[int]:
    """Features of a generator at each resolution but the finest, coarsest (4³) first; each is half the one before."""
    return [base_channels * 2**level for level in reversed(range(count_halvings(sample_size)))]


def upsampling_stack(widths: list[int], num_channels: int) -> nn.Sequential:
    """From widths[0] features on 4³ to M channels in [-1, 1] on 4³ · 2^len(widths).

    At every resolution batch norm and ReLU; then the voxels are doubled (nearest) and convolved by 3³.
    """
    layers: list[nn.Module] = []
    for width, next_width in zip(widths, [*widths[1:], num_channels], strict=True):
        layers += [nn.BatchNorm3d(width), nn.ReLU(), nn.Upsample(scale_factor=2)]
        layers += [Conv3d(width, next_width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.Tanh())


def downsampling_stack(num_channels: int, widths: list[int], use_batch_norm: bool) -> nn.Sequential:
    """From M channels to widths[-1] features on 4³, by 4³ convolutions of stride 2, finest first.

    After each, batch norm (but for the first: it would hide the intensity) and leaky ReLU.
    """
    layers: list[nn.Module] = []
    for level, (width_in, width) in enumerate(zip([num_channels, *widths[:-1]], widths, strict=True)):
        layers += [HalvingConv3d(width_in, width)]
        layers += [nn.BatchNorm3d(width)] if use_batch_norm and level > 0 else []
        layers += [nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)
