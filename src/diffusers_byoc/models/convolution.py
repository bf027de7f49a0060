"""3D convolution that is right and fast on the smallest grids on the CPU."""

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


@lru_cache
def _neighbours(
    grid: tuple[int, ...], kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """For every output voxel and tap, the index of the input voxel under it, or D*H*W outside of the grid."""
    num_voxels = math.prod(grid)
    voxels = np.pad(np.arange(num_voxels).reshape(grid), [(p, p) for p in padding], constant_values=num_voxels)
    windows = np.lib.stride_tricks.sliding_window_view(voxels, kernel_size)
    windows = windows[tuple(slice(None, None, step) for step in stride)]
    return windows.flatten(), windows.shape[:3]
