import copy

import pytest
import torch
from torch import nn

from diffusers_byoc.baselines.medical_diffusion_unet import (
    MedicalDiffusionUNet3D,
    RelativePositionBias,
    SoftmaxAttention,
    SpatialLinearAttention,
)


TINY = {
    "latent_channels": 3,
    "sample_size": 4,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
}


def model(**changes):
    torch.manual_seed(0)
    return MedicalDiffusionUNet3D(**(TINY | changes)).eval()


def inputs(unet, batch=2):
    return {"sample": torch.randn(batch, *unet.latent_shape), "timestep": torch.arange(batch) * 300 + 5}


def test_the_parameters_are_as_many_as_the_papers():
    """Counted once in the authors' `Unet3D(dim=32, channels=8)` and `Unet3D(dim=64, channels=16)`."""
    with torch.device("meta"):
        unets = MedicalDiffusionUNet3D(), MedicalDiffusionUNet3D(16, 16, (64, 128, 256, 512))
    assert [sum(p.numel() for p in unet.parameters()) for unet in unets] == [9_981_512, 35_755_920]


@pytest.mark.parametrize("changes", [{}, {"latent_channels": 1}, {"block_out_channels": (8,)}])
@torch.no_grad()
def test_the_output_has_the_shape_of_the_input(changes):
    unet = model(**changes)
    arguments = inputs(unet)
    output = unet(**arguments).sample
    assert output.shape == arguments["sample"].shape == (2, *unet.latent_shape)
    assert torch.equal(unet(**arguments, return_dict=False)[0], output)


@torch.no_grad()
def test_the_depth_is_not_halved():
    unet = model()
    seen = []
    unet.mid_block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[2:]))
    assert unet(torch.randn(1, 3, 5, 4, 8), 3).sample.shape == (1, 3, 5, 4, 8)
    assert seen == [(5, 2, 4)]


def test_planes_know_of_each_other_by_attention_along_the_depth_alone():
    unet = model()
    assert all(m.kernel_size[0] == 1 for m in unet.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)))
    assert unet.conv_in.kernel_size == (1, 7, 7)
    sample = torch.randn(1, 3, 4, 4, 4)
    changed = sample.clone()
    changed[:, :, 0] += 1
    for knows in (True, False):
        with torch.no_grad():
            moved = (unet(changed, 3).sample - unet(sample, 3).sample).abs().amax((0, 1, 3, 4))
        assert (moved[1:] > 1e-3).all() == knows
        for attention in (m for m in unet.modules() if getattr(m, "axes", None) == "depth"):
            nn.init.zeros_(attention.to_out.weight)
        for norm in (unet.resnet_out.norm1, *(m.norm2 for m in unet.modules() if hasattr(m, "norm2"))):
            norm.forward = lambda hidden_states, scale=None, shift=None: hidden_states  # which sees all planes
        for norm in (m.norm1 for m in unet.modules() if hasattr(m, "norm1")):
            norm.forward = lambda hidden_states, scale=None, shift=None: hidden_states


def test_the_position_bias_has_one_number_for_each_near_distance_and_shares_far_ones():
    bias = RelativePositionBias(heads=3)
    values = bias(80)
    assert values.shape == (3, 80, 80)
    assert torch.equal(values[:, 5, 9], values[:, 20, 24])  # of the distance alone
    near = values[0, 40, 33:48].tolist()
    assert len(set(near)) == len(near)  # 7 on each side
    assert torch.equal(values[:, 0, 31], values[:, 0, 79])  # from 31 on
    assert not torch.equal(values[:, 0, 20], values[:, 0, 79])
    assert not torch.equal(values[:, 0, 79], values[:, 79, 0])  # before and behind


@torch.no_grad()
def test_depth_attention_is_softmax_of_rotated_products_and_bias():
    attention = SoftmaxAttention(6, heads=1, head_dim=4, axes="depth")
    hidden_states, bias = torch.randn(1, 6, 5, 1, 1), torch.randn(1, 5, 5)
    tokens = hidden_states[0, :, :, 0, 0].t()  # (D, C)
    query, key, value = attention.to_qkv(attention.norm(tokens)).chunk(3, dim=-1)

    def rotate(rows):  # pairs of features as complex numbers, turned by place * 10000 ** (-2i / head_dim)
        angles = torch.arange(5.0)[:, None] * 10_000 ** (-torch.arange(0, 4, 2) / 4)
        pairs = torch.view_as_complex(rows.reshape(5, 2, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    weights = (rotate(query) @ rotate(key).t() / 2 + bias[0]).softmax(-1)
    expected = tokens + attention.to_out(weights @ value)
    torch.testing.assert_close(attention(hidden_states, bias)[0, :, :, 0, 0].t(), expected)


@torch.no_grad()
def test_spatial_attention_is_within_planes_and_linear():
    attention = SpatialLinearAttention(6, heads=2, head_dim=4)
    hidden_states = torch.randn(2, 6, 3, 4, 5)
    output = attention(hidden_states)
    tokens = hidden_states[1, :, 2].flatten(1).t()  # (H*W, C), of one plane
    query, key, value = (x.unflatten(1, (2, 4)) for x in attention.to_qkv(attention.norm(tokens)).chunk(3, dim=-1))
    weights = torch.einsum("nhc,mhc->hnm", query.softmax(-1) / 2, key.softmax(0))
    expected = tokens + attention.to_out(torch.einsum("hnm,mhc->nhc", weights, value).flatten(1))
    torch.testing.assert_close(output[1, :, 2].flatten(1).t(), expected)


@torch.no_grad()
def test_one_timestep_serves_the_whole_batch():
    unet = model()
    sample = inputs(unet)["sample"]
    expected = unet(sample, torch.tensor([7, 7])).sample
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7])):
        assert torch.equal(unet(sample, timestep).sample, expected)
    assert not torch.allclose(unet(sample, 700).sample, expected)


@torch.no_grad()
def test_samples_of_a_batch_are_independent():
    unet = model()
    arguments = inputs(unet, batch=3)
    together = unet(**arguments).sample
    for index in range(3):
        alone = unet(**{name: value[index : index + 1] for name, value in arguments.items()}).sample
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=1e-4)


def test_every_parameter_takes_part():
    unet = model().train()
    unet(**inputs(unet)).sample.square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients():
    plain = model().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    checkpointed.mid_block.register_forward_pre_hook(lambda *_: calls.append(1))
    arguments = inputs(plain)
    for unet in (plain, checkpointed):
        unet(**arguments).sample.square().mean().backward()
    assert len(calls) == 2  # once forward, once again for the backward pass
    for (name, expected), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


@torch.no_grad()
def test_save_and_load_are_identical(tmp_path):
    unet = model()
    arguments = inputs(unet)
    unet.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MedicalDiffusionUNet3D.from_pretrained(tmp_path)
    assert torch.equal(loaded(**arguments).sample, unet(**arguments).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_predicts_like_float32(dtype, tmp_path):
    unet = model()
    arguments = inputs(unet)
    expected = unet(**arguments).sample
    unet.save_pretrained(tmp_path)
    half = MedicalDiffusionUNet3D.from_pretrained(tmp_path, dtype=dtype)
    output = half(**arguments | {"sample": arguments["sample"].to(dtype)}).sample
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_layerwise_casting_keeps_the_norms_and_embeddings():
    unet = model()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.conv_in.weight.dtype == torch.float8_e4m3fn
    for module in (unet.mid_block.resnets[0].norm1, unet.time_embedding.linear_1, unet.position_bias.embedding):
        assert module.weight.dtype == torch.float32
    assert torch.isfinite(unet(**inputs(unet)).sample).all()


@torch.no_grad()
def test_it_compiles_into_one_graph():
    unet = model()
    arguments = inputs(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**arguments).sample, unet(**arguments).sample)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 4, 4, 4), r"\(B, 3, d, h, w\), got \(1, 2, 4, 4, 4\)"),
        ((3, 4, 4, 4), r"\(B, 3, d, h, w\), got \(3, 4, 4, 4\)"),
        ((1, 3, 4, 5, 4), r"divisible by 2 .*got \(5, 4\)"),
    ],
)
def test_a_sample_of_the_wrong_shape_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        model()(torch.zeros(shape), 1)


def test_a_size_that_cannot_be_halved_so_often_is_refused():
    with pytest.raises(ValueError, match=r"sample_size divisible by 4 .*got \(6, 6\)"):
        model(sample_size=6, block_out_channels=(8, 8, 8))
