import pytest
import torch
import torch.nn.functional as F

from diffusers_byoc.models.attention import AxialAttention, AxialAttnProcessor, attend_in_products


def layer(axes, num_features=8, head_dim=4):
    return AxialAttention(num_features, head_dim, axes)


def plain_attention(attention, tokens):
    """(N, C) to (N, C), written out head by head."""
    normalised = attention.norm(tokens)
    queries, keys, values = (proj(normalised) for proj in (attention.to_q, attention.to_k, attention.to_v))
    heads = []
    for head in range(attention.heads):
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        weights = (queries[:, part] @ keys[:, part].T / attention.head_dim**0.5).softmax(-1)
        heads.append(weights @ values[:, part])
    return tokens + attention.to_out[0](torch.cat(heads, 1))


# 3 x 4 tokens take the plain products, 6 x 7 tokens the fused kernel
@pytest.mark.parametrize("shape", [(2, 8, 2, 3, 4), (1, 8, 2, 6, 7)])
@torch.no_grad()
def test_spatial_attention_attends_within_each_plane(shape):
    attention, volume = layer("spatial"), torch.randn(shape)
    result = attention(volume)
    for sample, depth in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[2])):
        tokens = volume[sample, :, depth].flatten(1).T
        expected = plain_attention(attention, tokens).T.reshape(shape[1], *shape[3:])
        torch.testing.assert_close(result[sample, :, depth], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_depth_attention_attends_along_each_line():
    attention, volume = layer("depth"), torch.randn(2, 8, 5, 2, 3)
    result = attention(volume)
    for y in range(2):
        for x in range(3):
            expected = plain_attention(attention, volume[1, :, :, y, x].T).T
            torch.testing.assert_close(result[1, :, :, y, x], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_two_together_reach_every_voxel():
    spatial, depth = layer("spatial").double(), layer("depth").double()
    volume = torch.randn(1, 8, 3, 4, 5, dtype=torch.float64)
    changed = volume.clone()
    changed[0, :, 0, 0, 0] = torch.randn(8, dtype=torch.float64)
    moved = (depth(spatial(changed)) - depth(spatial(volume))).abs().amax(1)
    assert (moved > 0).all()
    assert ((spatial(changed) - spatial(volume)).abs().amax(1) > 0)[0, 1:].sum() == 0


@pytest.mark.parametrize(("num_features", "head_dim", "heads"), [(8, 4, 2), (8, 32, 1), (12, 8, 1)])
def test_heads(num_features, head_dim, heads):
    attention = layer("depth", num_features, head_dim)
    assert attention.heads == heads
    assert attention(torch.randn(1, num_features, 2, 2, 2)).shape == (1, num_features, 2, 2, 2)


@torch.no_grad()
def test_fused_projections_change_nothing():
    attention, volume = layer("spatial"), torch.randn(1, 8, 2, 3, 4)
    expected = attention(volume)
    attention.fuse_projections()
    assert attention.fused_projections
    torch.testing.assert_close(attention(volume), expected)
    attention.unfuse_projections()
    torch.testing.assert_close(attention(volume), expected)


def test_products_and_the_fused_kernel_have_the_same_gradients():
    attention = layer("spatial")
    volume = torch.randn(1, 8, 2, 3, 4)
    products = torch.autograd.grad(attention(volume).square().sum(), attention.parameters())
    attention.processor._attention_backend = "native"
    fused = torch.autograd.grad(attention(volume).square().sum(), attention.parameters())
    for got, want in zip(products, fused, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scores_at_once", [1, 100, 250])
def test_products_in_parts_are_the_products(monkeypatch, scores_at_once):
    query, key, value = torch.randn(3, 7, 6, 2, 4)
    whole = attend_in_products(query, key, value)
    monkeypatch.setattr("diffusers_byoc.models.attention._SCORES_AT_ONCE", scores_at_once)
    torch.testing.assert_close(attend_in_products(query, key, value), whole)


def test_bf16_products_add_no_more_error_than_bf16_inputs_have():
    inputs = torch.randn(3, 8, 256, 1, 32, dtype=torch.float64)
    exact = attend_in_products(*inputs)
    fused = F.scaled_dot_product_attention(*(x.bfloat16().transpose(1, 2) for x in inputs)).transpose(1, 2)
    products = attend_in_products(*inputs.bfloat16())
    assert (products - exact).norm() < 2 * (fused - exact).norm() < 0.02 * exact.norm()


def test_a_processor_can_be_replaced():
    class Nothing(AxialAttnProcessor):
        def __call__(self, attn, hidden_states):
            return F.relu(hidden_states) * 0

    attention, volume = layer("depth"), torch.randn(1, 8, 2, 2, 2)
    assert not torch.equal(attention(volume), volume)
    attention.set_processor(Nothing())
    assert torch.equal(attention(volume), volume)
