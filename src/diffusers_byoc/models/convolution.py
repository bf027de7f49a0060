"""3D convolutions that are right on a CPU, and fast, where PyTorch's own are not."""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` (`padding_mode="zeros"`, no groups), computed as a matrix product on grids smaller than the kernel.

    The deepest level of the paper's U-Net on 16³ latents is 2 voxels wide. There PyTorch 2.13's bf16 CPU kernel gives
    weight gradients that are garbage now and then, as large as infinity (`tests/models/test_convolution.py` measures
    it), and most of its time goes into rearranging the weights, which the product takes as they are.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type != "cpu" or min(hidden_states.shape[2:]) >= min(self.kernel_size):
            return super().forward(hidden_states)
        grid = tuple(hidden_states.shape[2:])
        neighbours, output_grid = _neighbours(grid, self.kernel_size, self.stride, self.padding)
        voxels = hidden_states.permute(0, 2, 3, 4, 1).flatten(1, 3)  # (B, D*H*W, C)
        voxels = F.pad(voxels, (0, 0, 0, 1))  # one more voxel of zeros: the padding
        columns = voxels.index_select(1, torch.from_numpy(neighbours))
        columns = columns.unflatten(1, (-1, self.weight[0, 0].numel()))  # (B, output voxels, taps, C)
        if self.weight.is_contiguous():
            columns, weight = columns.transpose(2, 3), self.weight
        else:  # channels_last_3d
            weight = self.weight.permute(0, 2, 3, 4, 1)
        rows = F.linear(columns.flatten(2), weight.flatten(1), self.bias)  # (B, output voxels, features)
        return rows.unflatten(1, output_grid).permute(0, 4, 1, 2, 3)


class HalvingConv3d(Conv3d):
    """Halve D, H and W by a 4×4×4 convolution of stride 2.

    A volume of few features that wants a gradient, as a discriminator's does, is convolved in cubes on a CPU: with the
    2×2×2 voxels of a cube as its features, the kernel is 2×2×2 cubes wide. PyTorch's own, forward and backward, takes
    twice as long (`benchmarks/operations.py`).
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, 4, stride=2, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        is_even = all(size % 2 == 0 for size in hidden_states.shape[2:])
        if not (_fits_in_cubes(hidden_states, self.in_channels) and hidden_states.requires_grad and is_even):
            return super().forward(hidden_states)
        voxels = F.pad(hidden_states.movedim(1, -1), (0, 0, 1, 1, 1, 1, 1, 1))
        voxels = voxels.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, d, 2, h, 2, w, 2, C)
        cubes = voxels.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)  # (B, d, h, w, 8*C)
        # (out, C, 2, 2, 2, 2, 2, 2): along each axis, which cube, and which voxel of it
        weight = self.weight.reshape(*self.weight.shape[:2], 2, 2, 2, 2, 2, 2)
        weight = weight.permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)  # (out, 8*C, 2, 2, 2)
        return F.conv3d(cubes.movedim(-1, 1), weight, self.bias)


class DoublingConv3d(nn.ConvTranspose3d):
    """Double D, H and W by a 4×4×4 transposed convolution of stride 2.

    To few features, as of a volume, it is a plain convolution on a CPU: around every corner of the grid, 2×2×2 voxels
    of the input make 2×2×2 of the output. PyTorch's own takes twice as long (`benchmarks/operations.py`).
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, 4, stride=2, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _fits_in_cubes(hidden_states, self.out_channels):
            return super().forward(hidden_states)
        # (C, out, 2, 2, 2, 2, 2, 2): along each axis, which voxel of the input, last first, and which of the output
        weight = self.weight.reshape(*self.weight.shape[:2], 2, 2, 2, 2, 2, 2)
        weight = weight.flip(2, 4, 6).permute(3, 5, 7, 1, 0, 2, 4, 6).flatten(0, 3)  # (8*out, C, 2, 2, 2)
        cubes = F.conv3d(hidden_states, weight, self.bias.repeat(8), padding=1)  # (B, 8*out, D+1, H+1, W+1)
        voxels = cubes.movedim(1, -1).unflatten(4, (2, 2, 2, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7).contiguous()
        voxels = voxels.flatten(5, 6).flatten(3, 4).flatten(1, 2)  # (B, 2*D+2, 2*H+2, 2*W+2, out)
        return voxels[:, 1:-1, 1:-1, 1:-1].movedim(-1, 1)


def _fits_in_cubes(hidden_states: Tensor, num_features: int) -> bool:
    return hidden_states.device.type == "cpu" and num_features <= 8


@lru_cache
def _neighbours(
    grid: tuple[int, ...], kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """For every output voxel and tap, the index of the input voxel under it, or D*H*W outside of the grid."""
    # arithmetic alone, which torch.compile can read; along each axis (output voxels, taps)
    axes = zip(grid, kernel_size, stride, padding, strict=True)
    z, y, x = (np.arange(0, n + 2 * p - k + 1, s)[:, None] + np.arange(k) - p for n, k, s, p in axes)
    output_grid = len(z), len(y), len(x)
    z, y, x = z[:, None, None, :, None, None], y[:, None, None, :, None], x[:, None, None, :]
    is_inside = (0 <= z) & (z < grid[0]) & (0 <= y) & (y < grid[1]) & (0 <= x) & (x < grid[2])
    neighbours = np.where(is_inside, (z * grid[1] + y) * grid[2] + x, math.prod(grid))
    return neighbours.flatten(), output_grid
