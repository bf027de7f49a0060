"""Normalisation that keeps its speed in the memory format that 3D convolutions are fast in.

BYOC Table 3 asks for instance normalisation. PyTorch's group norm with one group per feature is that, but its CPU
kernel is up to a hundred times slower in `channels_last_3d` than in the contiguous format, and `channels_last_3d` is
what the bf16 convolutions want (`benchmarks/operations.py` measures both). `InstanceNorm` therefore computes a
channels-last volume, in any number of groups, as what it is in memory, a `(B, voxels, features)` matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm_coefficients(rows: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation over the voxels and a group, (B, 1, C) float32, of `rows` (B, N, C)."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    mean = _group_means(rows.mean(1, keepdim=True), num_groups)
    # The two-pass form: E[x²] - E[x]² cancels catastrophically where the mean is much larger than the spread.
    centred = rows - mean
    variance = _group_means(centred.mul_(centred).mean(1, keepdim=True), num_groups)
    return mean, (variance + eps).rsqrt()


def _group_means(features: Tensor, num_groups: int) -> Tensor:
    """(B, 1, C), each feature replaced by the mean of its group."""
    num_features = features.shape[-1]
    if num_groups == num_features:
        return features
    groups = features.unflatten(-1, (num_groups, -1))
    return groups.mean(-1, keepdim=True).expand_as(groups).flatten(-2)


class _RowsNorm(torch.autograd.Function):
    """`(rows - mean) * rstd * scale + shift` for `rows` (B, N, C) and `scale`, `shift` (B, 1, C) float32.

    One function, because autograd over the plain operations would keep four volumes for the backward pass; this keeps
    its input alone.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, scale: Tensor, shift: Tensor, num_groups: int, eps: float) -> Tensor:
        mean, rstd = _norm_coefficients(rows, num_groups, eps)
        ctx.save_for_backward(rows, mean, rstd, scale)
        ctx.num_groups = num_groups
        gain = rstd * scale
        return torch.addcmul((shift - mean * gain).to(rows.dtype), rows, gain.to(rows.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, mean, rstd, scale = ctx.saved_tensors
        num_voxels = rows.shape[1]
        grad_shift = grad.sum(1, keepdim=True, dtype=mean.dtype)
        # sum(grad * normalised), without materialising the normalised rows
        grad_dot_rows = (grad.to(mean.dtype) * rows).sum(1, keepdim=True)
        grad_scale = rstd * (grad_dot_rows - mean * grad_shift)
        # d rows = rstd * (scale * grad - mean(scale * grad) - normalised * mean(scale * grad * normalised)), the means
        # over voxels and group, as two multiply-adds
        slope = -(rstd**2) * _group_means(scale * grad_scale, ctx.num_groups) / num_voxels
        offset = -rstd * _group_means(scale * grad_shift, ctx.num_groups) / num_voxels - slope * mean
        grad_rows = torch.addcmul(offset.to(rows.dtype), grad, (rstd * scale).to(rows.dtype))
        grad_rows = grad_rows.addcmul_(rows, slope.to(rows.dtype))
        return grad_rows, grad_scale, grad_shift, None, None


class InstanceNorm(nn.Module):
    """Group or instance normalisation of `(B, C, D, H, W)`, followed by an optional scale and shift per sample.

    Args:
        num_features: C.
        num_groups: features normalised together; `None` normalises each feature alone (BYOC Table 3).
        eps: added to the variance.

    Source: BYOC, Table 3; scale and shift after the norm because instance norm forgets the mean.
    """

    def __init__(self, num_features: int, num_groups: int | None = None, eps: float = 1e-5):
        super().__init__()
        if num_groups is not None and num_features % num_groups:
            raise ValueError(
                f"Expected a feature count divisible by norm_num_groups, got {num_features} features and "
                f"norm_num_groups={num_groups}. Choose a divisor, or None for instance normalisation."
            )
        self.num_groups = num_groups or num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise `hidden_states` (B, C, D, H, W); `scale`, `shift` (B, C) give `norm * (1 + scale) + shift`."""
        channels_last = hidden_states.is_contiguous(memory_format=torch.channels_last_3d)
        if hidden_states.device.type == "cpu" and channels_last and not hidden_states.is_contiguous():
            return self._forward_rows(hidden_states, scale, shift)
        normalized = F.group_norm(hidden_states, self.num_groups, self.weight, self.bias, self.eps)
        if scale is None:
            return normalized
        return normalized * (1 + scale[:, :, None, None, None]) + shift[:, :, None, None, None]

    def _forward_rows(self, hidden_states: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        gain, offset = self.weight.to(dtype)[None], self.bias.to(dtype)[None]  # (1, C)
        if scale is not None:
            gain, offset = gain * (1 + scale.to(dtype)), offset * (1 + scale.to(dtype)) + shift.to(dtype)
        gain, offset = (x.expand(len(hidden_states), -1)[:, None] for x in (gain, offset))  # (B, 1, C)
        rows = hidden_states.permute(0, 2, 3, 4, 1).flatten(1, 3)  # a view: (B, D*H*W, C)
        if torch.is_grad_enabled():
            rows = _RowsNorm.apply(rows, gain, offset, self.num_groups, self.eps)
        else:
            mean, rstd = _norm_coefficients(rows, self.num_groups, self.eps)
            gain = rstd * gain
            rows = torch.addcmul((offset - mean * gain).to(rows.dtype), rows, gain.to(rows.dtype))
        return rows.unflatten(1, hidden_states.shape[2:]).permute(0, 4, 1, 2, 3)


class VoxelNorm(nn.Module):
    """Layer normalisation over the features of each voxel of `(B, C, D, H, W)`.

    The autoencoder's norm: it knows no other voxel, so decoding in tiles differs only where a tile's border is near.
    Group statistics of a tile of empty background are not those of the cell beside it. In `channels_last_3d` it is one
    fused kernel over contiguous memory.
    """

    def __init__(self, num_features: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, hidden_states: Tensor) -> Tensor:
        voxels = hidden_states.movedim(1, -1)  # a view in channels_last_3d
        weight, bias = self.weight.to(voxels.dtype), self.bias.to(voxels.dtype)
        return F.layer_norm(voxels, weight.shape, weight, bias, self.eps).movedim(-1, 1)


def to_fast_memory_format(tensor: Tensor) -> Tensor:
    """`tensor` (B, C, D, H, W) in the memory format its device convolves fastest: `channels_last_3d` on the CPU."""
    if tensor.device.type != "cpu":
        return tensor
    if tensor.shape[1] == 1:  # contiguous in both formats, and its strides say which a convolution writes
        return tensor.contiguous().squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return tensor.contiguous(memory_format=torch.channels_last_3d)
