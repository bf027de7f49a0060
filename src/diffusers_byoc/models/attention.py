"""Axial self-attention over a volume: within each depth plane ("spatial") or along the depth ("depth-wise").

Together they reach every voxel in two steps (BYOC section 3.2, after Khader et al. 2023).
"""

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn


# Scores that `attend_in_products` holds at a time: 4 MB in bf16, which stays in a core's cache.
_SCORES_AT_ONCE = 2**21


def attend_in_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention as two matrix products, over `(sequences, tokens, heads, head_dim)`.

    On a CPU it is 2 to 10 times as fast as the flash kernel, forward and backward (`benchmarks/operations.py`). The
    backward pass keeps all scores, which of axes of a latent grid are few.
    """
    num_sequences, num_tokens, heads, head_dim = query.shape
    query, key, value = (x.transpose(1, 2).reshape(-1, num_tokens, head_dim) for x in (query, key, value))
    at_once = max(1, _SCORES_AT_ONCE // num_tokens**2)
    nothing = query.new_zeros(1, 1, 1)
    parts = []
    for q, k, v in zip(query.split(at_once), key.split(at_once), value.split(at_once), strict=True):
        scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
        parts.append(torch.bmm(scores.softmax(-1), v))
    return torch.cat(parts).unflatten(0, (num_sequences, heads)).transpose(1, 2)


class AxialAttnProcessor:
    """Scaled dot-product attention through diffusers' backend dispatch (`set_attention_backend` applies).

    On a CPU, with no backend set, as plain products.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "AxialAttention", hidden_states: Tensor) -> Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # (sequences, tokens, heads, head_dim)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
        backend = self._attention_backend
        active_backend, _ = _AttentionBackendRegistry.get_active_backend()
        is_default = backend is None and active_backend is AttentionBackendName.NATIVE
        if is_default and self._parallel_config is None and hidden_states.device.type == "cpu":
            hidden_states = attend_in_products(query, key, value)
        else:
            hidden_states = dispatch_attention_fn(
                query, key, value, backend=backend, parallel_config=self._parallel_config
            )
        return attn.to_out[0](hidden_states.flatten(2, 3))


class AxialAttention(nn.Module, AttentionModuleMixin):
    """Pre-normalised residual self-attention over `axes` of `(B, C, D, H, W)`.

    Args:
        num_features: C.
        head_dim: features per head; a narrower layer gets one head of its own width.
        axes: "spatial" attends over (H, W) within each plane, "depth" over D at each (H, W).
    """

    _default_processor_cls = AxialAttnProcessor
    _available_processors = [AxialAttnProcessor]
    is_cross_attention = False  # diffusers' layer skipping asks

    def __init__(self, num_features: int, head_dim: int, axes: str):
        super().__init__()
        self.axes = axes
        self.head_dim = min(head_dim, num_features)
        self.heads = max(1, num_features // self.head_dim)
        self.use_bias = False
        inner_dim = self.heads * self.head_dim
        self.norm = nn.LayerNorm(num_features)
        self.to_q = nn.Linear(num_features, inner_dim, bias=self.use_bias)
        self.to_k = nn.Linear(num_features, inner_dim, bias=self.use_bias)
        self.to_v = nn.Linear(num_features, inner_dim, bias=self.use_bias)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, num_features)])
        self.set_processor(AxialAttnProcessor())

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, _, depth, height, width = hidden_states.shape
        voxels = hidden_states.permute(0, 2, 3, 4, 1)  # (B, D, H, W, C)
        if self.axes == "spatial":
            tokens = voxels.reshape(batch * depth, height * width, -1)
            update = self.processor(self, self.norm(tokens)).reshape(batch, depth, height, width, -1)
        else:
            tokens = voxels.flatten(2, 3).transpose(1, 2).reshape(batch * height * width, depth, -1)
            update = self.processor(self, self.norm(tokens)).reshape(batch, height * width, depth, -1)
            update = update.transpose(1, 2).reshape(batch, depth, height, width, -1)
        return (voxels + update).permute(0, 4, 1, 2, 3)
