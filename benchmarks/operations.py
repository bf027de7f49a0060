"""The kernels whose choice decides this package's speed on a CPU, each against its plain PyTorch alternative.

    python benchmarks/operations.py

Every row is one comparison in one run: milliseconds (the best of many, because other load only ever adds), and the
ratio plain / ours. "both" is forward and backward.
"""

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import best_ms
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_byoc.models import nearest_code
from diffusers_byoc.models.attention import attend_in_products
from diffusers_byoc.models.convolution import DoublingConv3d, HalvingConv3d
from diffusers_byoc.models.normalization import InstanceNorm, VoxelNorm


BATCH = 8
GRIDS = ((64, 16), (128, 8), (256, 4))  # features and edge at the levels of the paper's U-Net on 16³ latents


def both(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Forward and backward of `function`."""
    output = function(*inputs)
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def row(name: str, plain: float, ours: float) -> None:
    print(f"| {name} | {plain:.2f} | {ours:.2f} | {plain / ours:.1f} |")


def channels_last(*shape: int, dtype=torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d).requires_grad_()


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor()}, ", end="")
    print(f"AMX {torch.cpu._is_amx_tile_supported()}, AVX-512 bf16 {torch.cpu._is_avx512_bf16_supported()}\n")
    print("| what (bf16, batch 8, channels_last_3d) | plain, ms | ours, ms | ratio |\n| --- | --- | --- | --- |")

    for features, edge in GRIDS:
        volume = channels_last(BATCH, features, edge, edge, edge)
        norm = InstanceNorm(features).bfloat16()
        plain = both(lambda x, c=features: F.group_norm(x, c), volume)
        row(f"instance norm, both, {features} x {edge}³", best_ms(plain), best_ms(both(norm, volume)))

    volume = channels_last(BATCH, 32, 32, 32, 32)
    weight = torch.ones(32, dtype=torch.bfloat16)
    plain = both(lambda x: F.rms_norm(x.movedim(1, -1), (32,), weight).movedim(-1, 1), volume)
    ours = both(VoxelNorm(32).bfloat16(), volume)
    row("norm of each voxel, both, 32 x 32³ (plain: rms_norm)", best_ms(plain), best_ms(ours))

    hidden_states, doubling = channels_last(BATCH, 32, 32, 32, 32), DoublingConv3d(32, 2).bfloat16()
    plain = both(nn.ConvTranspose3d(32, 2, 4, stride=2, padding=1).bfloat16(), hidden_states)
    row("doubling convolution, both, 32 x 32³ to 2 x 64³", best_ms(plain), best_ms(both(doubling, hidden_states)))
    volume, halving = channels_last(BATCH, 2, 64, 64, 64), HalvingConv3d(2, 32).bfloat16()
    plain = both(nn.Conv3d(2, 32, 4, stride=2, padding=1).bfloat16(), volume)
    row("halving convolution, both, 2 x 64³ to 32 x 32³", best_ms(plain), best_ms(both(halving, volume)))

    def flash(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)

    for name, num_sequences, num_tokens in (("spatial", 128, 256), ("depth", 2048, 16)):
        inputs = [torch.randn(num_sequences, num_tokens, 2, 32).bfloat16().requires_grad_() for _ in range(3)]
        plain, ours = (best_ms(both(attend, *inputs)) for attend in (flash, attend_in_products))
        row(f"{name} attention, both, {num_sequences} x {num_tokens} tokens (plain: flash)", plain, ours)

    vectors, codebook = torch.randn(32_768, 16), torch.randn(1024, 16)
    plain = best_ms(lambda: torch.cdist(vectors, codebook).argmin(1))
    ours = best_ms(lambda: nearest_code(vectors, codebook))
    row("nearest of 1024 codes, 32,768 x 16, fp32 (plain: cdist)", plain, ours)

    print("\n| 3x3x3 convolution, forward and input gradient, GFLOP/s | contiguous | channels_last_3d |")
    print("| --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for features, edge in GRIDS:
            convolution = nn.Conv3d(features, features, 3, padding=1, dtype=dtype)
            gigaflops = 2 * 2 * BATCH * edge**3 * features**2 * 27 / 1e9
            volume = channels_last(BATCH, features, edge, edge, edge, dtype=dtype)
            contiguous = volume.detach().contiguous().requires_grad_()
            speeds = [gigaflops / best_ms(both(convolution, x)) * 1e3 for x in (contiguous, volume)]
            print(f"| {str(dtype)[6:]}, {features} x {edge}³ | {speeds[0]:.0f} | {speeds[1]:.0f} |")


if __name__ == "__main__":
    main()
