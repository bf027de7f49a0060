import pytest
import torch
from torch import nn

from diffusers_byoc.models.convolution import Conv3d, DoublingConv3d, HalvingConv3d


def weight_gradient(convolution: nn.Conv3d, volume: torch.Tensor, use_autocast: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
        output = convolution(volume)
    (output.float() ** 2).sum().backward()
    gradient, convolution.weight.grad = convolution.weight.grad, None
    return gradient.float()


@pytest.mark.parametrize("grid", [(2, 2, 2), (2, 4, 4), (1, 2, 2), (4, 4, 4)])
@pytest.mark.parametrize("use_autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_weight_gradients_on_small_grids_are_those_of_float32(grid, use_autocast):
    volume = torch.randn(4, 16, *grid)
    reference = Conv3d(16, 16, 3, padding=1)
    expected = weight_gradient(reference, volume, use_autocast=False)

    dtype = torch.float32 if use_autocast else torch.bfloat16
    convolution = Conv3d(16, 16, 3, padding=1).to(dtype)
    convolution.load_state_dict(reference.state_dict())
    volume = volume.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    for _ in range(5):
        # freed memory full of NaN: what a kernel reads that forgets to write first
        torch.full((4 * convolution.weight.numel(),), torch.nan, dtype=torch.bfloat16)
        gradient = weight_gradient(convolution, volume, use_autocast)
        assert (gradient - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("grid", [(2, 2, 2), (1, 1, 1), (2, 3, 4), (5, 1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_small_grids_give_what_the_plain_layer_gives(grid, stride, bias, memory_format):
    arguments = {"kernel_size": 3, "padding": 1, "stride": stride, "bias": bias, "dtype": torch.float64}
    convolution, plain = Conv3d(5, 6, **arguments), nn.Conv3d(5, 6, **arguments)
    plain.load_state_dict(convolution.state_dict())
    convolution = convolution.to(memory_format=memory_format)
    volume = torch.randn(3, 5, *grid, dtype=torch.float64).requires_grad_()
    with torch.inference_mode():
        convolution(volume)  # leaves nothing behind that gradients could not go through
    output, expected = convolution(volume), plain(volume)
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad(y, (volume, *m.parameters()), gradient) for y, m in
                   ((output, convolution), (expected, plain)))  # fmt: skip
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("grid", [(2, 2, 2), (4, 4, 4)])
def test_output_has_the_dtype_of_the_plain_layer(grid):
    convolution, plain = Conv3d(2, 3, 3, padding=1), nn.Conv3d(2, 3, 3, padding=1)
    volume = torch.randn(1, 2, *grid)
    assert convolution(volume).dtype is plain(volume).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution(volume).dtype is plain(volume).dtype is torch.bfloat16
    volume = volume.bfloat16()
    assert convolution.bfloat16()(volume).dtype is plain.bfloat16()(volume).dtype is torch.bfloat16


def test_small_grids_compile_into_one_graph():
    convolution, volume = Conv3d(3, 4, 3, padding=1, stride=2), torch.randn(2, 3, 2, 1, 2)
    compiled = torch.compile(convolution, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(volume), convolution(volume))


@pytest.mark.parametrize("num_features", [1, 2, 9])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("plain", [nn.Conv3d, nn.ConvTranspose3d])
def test_halving_and_doubling_give_what_the_plain_layers_give(plain, num_features, memory_format):
    features = (num_features, 5) if plain is nn.Conv3d else (5, num_features)
    convolution = {nn.Conv3d: HalvingConv3d, nn.ConvTranspose3d: DoublingConv3d}[plain](*features).double()
    plain = plain(*features, 4, stride=2, padding=1).double()
    plain.load_state_dict(convolution.state_dict())
    convolution = convolution.to(memory_format=memory_format)
    volume = torch.randn(2, features[0], 6, 4, 8, dtype=torch.float64).to(memory_format=memory_format)
    torch.testing.assert_close(convolution(volume), plain(volume))
    volume.requires_grad_()
    output, expected = convolution(volume), plain(volume)
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad(y, (volume, *m.parameters()), gradient) for y, m in
                   ((output, convolution), (expected, plain)))  # fmt: skip
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_halving_takes_odd_volumes_as_the_plain_layer_does():
    convolution, volume = HalvingConv3d(2, 3), torch.randn(1, 2, 7, 6, 9).requires_grad_()
    assert convolution(volume).shape == nn.Conv3d(2, 3, 4, stride=2, padding=1)(volume).shape
