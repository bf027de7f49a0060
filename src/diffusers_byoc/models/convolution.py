"""3D convolution that stays right in bf16 on the CPU."""

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, computed in float32 where PyTorch 2.13's bf16 CPU kernel reads uninitialised memory.

    The weight gradient of a 3×3×3 convolution over a grid only 2 voxels deep, which is the deepest level of the
    paper's U-Net on 16³ latents, comes out of oneDNN's bf16 kernel as garbage now and then as large as infinity
    (`tests/models/test_convolution.py` measures it). Such grids are so small that float32 costs nothing.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type != "cpu" or min(hidden_states.shape[2:]) >= min(self.kernel_size):
            return super().forward(hidden_states)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(hidden_states.float(), self.weight.float(), bias).to(dtype)
