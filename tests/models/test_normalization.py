import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_byoc.models.normalization import InstanceNorm, VoxelNorm, _RowsNorm, to_fast_memory_format


def randomised(norm):
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("num_groups", [None, 2, 6])
@pytest.mark.parametrize("grad", [True, False])
def test_instance_norm_is_group_norm_in_both_memory_formats(memory_format, num_groups, grad):
    norm = randomised(InstanceNorm(6, num_groups))
    volume = (3 * torch.randn(2, 6, 4, 5, 3) + 10).contiguous(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        result = norm(volume)
    torch.testing.assert_close(result, F.group_norm(volume, num_groups or 6, norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_gradients_are_those_of_group_norm(memory_format, num_groups):
    norm = randomised(InstanceNorm(4, num_groups))
    scale, shift = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    volume = torch.randn(2, 4, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    inputs = (volume, scale, shift, norm.weight, norm.bias)
    weights = torch.randn(volume.shape)
    plain = F.group_norm(volume, num_groups, norm.weight, norm.bias, norm.eps)
    plain = plain * (1 + scale[:, :, None, None, None]) + shift[:, :, None, None, None]
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    result = torch.autograd.grad((norm(volume, scale, shift) * weights).sum(), inputs)
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_rows_gradient_is_the_derivative_in_float64(num_groups):
    rows = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: _RowsNorm.apply(*x, num_groups, 1e-5), (rows, scale, shift))


def test_module_gradient_is_the_derivative_in_float64():
    norm = randomised(InstanceNorm(3)).double()
    volume = torch.randn(2, 3, 2, 3, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    assert torch.autograd.gradcheck(norm, (volume.requires_grad_(),))


def test_a_large_mean_does_not_cancel():
    volume = torch.randn(1, 4, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    norm = InstanceNorm(4)
    torch.testing.assert_close(norm(volume + 1000.0), norm(volume), atol=2e-3, rtol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_bfloat16_is_near_float32(memory_format):
    norm = randomised(InstanceNorm(8))
    volume = torch.randn(2, 8, 6, 6, 6).contiguous(memory_format=memory_format)
    result = norm.bfloat16()(volume.bfloat16())
    assert result.dtype == torch.bfloat16
    assert (result.float() - norm.float()(volume.bfloat16().float())).abs().max() < 0.05


def test_the_result_keeps_channels_last():
    volume = torch.randn(2, 4, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    for norm in (InstanceNorm(4), VoxelNorm(4)):
        assert norm(volume).is_contiguous(memory_format=torch.channels_last_3d)


def test_groups_must_divide_the_features():
    with pytest.raises(ValueError, match=r"6 features and norm_num_groups=4"):
        InstanceNorm(6, 4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_voxel_norm_is_layer_norm_over_the_features(memory_format):
    norm = randomised(VoxelNorm(5))
    volume = torch.randn(2, 5, 3, 4, 2).contiguous(memory_format=memory_format)
    plain = nn.LayerNorm(5, eps=norm.eps)
    plain.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    torch.testing.assert_close(norm(volume), plain(volume.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3))


@pytest.mark.parametrize("num_features", [1, 3])
def test_fast_memory_format_changes_no_value_and_convolutions_keep_it(num_features):
    volume = torch.randn(2, num_features, 4, 4, 4)
    fast = to_fast_memory_format(volume)
    assert torch.equal(fast, volume)
    for tensor in (fast, nn.Conv3d(num_features, 5, 3, padding=1)(fast)):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)
