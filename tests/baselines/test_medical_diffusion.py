import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload

from diffusers_byoc.baselines import MedicalDiffusionVQModel
from diffusers_byoc.baselines.medical_diffusion import DoublingReplicateConv3d, ReplicateConv3d, RestartedCodebook


TINY = {
    "latent_channels": 3,
    "num_vq_embeddings": 8,
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "sample_size": 8,
}


def model(**changes):
    torch.manual_seed(0)
    return MedicalDiffusionVQModel(**(TINY | changes)).eval()


def volumes(vqvae, batch=2):
    return torch.rand(batch, vqvae.config.num_channels, *(vqvae.config.sample_size,) * 3) * 2 - 1


@pytest.mark.parametrize(
    ("widths", "count"), [((16, 32), 268_122), ((16, 32, 64), 1_392_378), ((16, 32, 64, 128), 5_885_498)]
)
def test_the_parameters_are_as_many_as_the_papers(widths, count):
    """Counted once in the authors' `VQGAN` of 16 features and 512 codes, without discriminators and its buffers."""
    with torch.device("meta"):
        vqvae = MedicalDiffusionVQModel(num_vq_embeddings=512, block_out_channels=widths)
    assert sum(parameter.numel() for parameter in vqvae.parameters() if parameter.requires_grad) == count


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (4, 2)])
def test_borders_go_on_outside(kernel_size, stride, memory_format):
    convolution = ReplicateConv3d(2, 3, kernel_size, stride).double()
    sample = torch.randn(2, 2, 4, 6, 8, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    output = convolution(sample)
    padded = F.pad(sample, (1,) * 6, mode="replicate")
    expected = F.conv3d(padded, convolution.weight, convolution.bias, stride)
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        *(torch.autograd.grad(y, (sample, convolution.weight), gradient) for y in (output, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("num_channels", [1, 3])
@torch.no_grad()
def test_shapes(num_channels):
    vqvae = model(num_channels=num_channels, channel_names=tuple("abc"[:num_channels]), block_out_channels=(4, 8, 8))
    sample = volumes(vqvae)
    latents = vqvae.encode(sample).latents
    assert latents.shape == (2, 3, 2, 2, 2) == (2, *vqvae.latent_shape)
    output = vqvae(sample)
    assert output.sample.shape == sample.shape and output.indices.shape == (2, 1, 2, 2, 2)
    assert torch.equal(vqvae.decode(latents).sample, output.sample)
    assert torch.equal(vqvae(sample, return_dict=False)[0], output.sample)


@torch.no_grad()
def test_channels_share_their_latents():
    vqvae = model()
    sample = volumes(vqvae, 1)
    for channel in range(2):
        changed = sample.clone()
        changed[:, channel] *= -1
        moved = (vqvae.encode(changed).latents - vqvae.encode(sample).latents).abs().amax((0, 2, 3, 4))
        assert (moved > 1e-4).all()


def test_latents_become_their_nearest_codes():
    vqvae = model()
    latents = torch.randn(2, 3, 2, 3, 4)
    quantized, indices = vqvae.quantize(latents, return_dict=False)
    codes = vqvae.codebook.embedding
    rows = latents.movedim(1, -1)
    assert torch.equal(indices[:, 0], torch.cdist(rows, codes).argmin(-1))
    assert torch.equal(quantized.movedim(1, -1), codes[indices[:, 0]])
    assert torch.equal(vqvae.decode(latents).sample, vqvae.decode(quantized, force_not_quantize=True).sample)


def test_gradients_pass_the_quantiser_unchanged_and_the_latents_are_pulled_to_their_codes():
    vqvae = model().train()
    sample = volumes(vqvae)
    output = vqvae(sample)
    quantized = vqvae.quantize(output.latents).latents
    expected = 0.25 * F.mse_loss(output.latents, quantized.detach())
    torch.testing.assert_close(output.commit_loss, expected)
    (output.sample.square().mean() + output.commit_loss).backward()
    for name, parameter in vqvae.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name
    assert not vqvae.codebook.embedding.requires_grad


@torch.no_grad()
def test_a_constant_volume_has_no_border():
    """Whatever is added outside continues the volume: a doubling of it is periodic up to the border."""
    doubled = DoublingReplicateConv3d(2, 3)(torch.ones(1, 2, 4, 4, 4))
    torch.testing.assert_close(doubled, doubled[..., :2, :2, :2].repeat(1, 1, 4, 4, 4))
    features = model().encoder.conv_in(torch.ones(1, 2, 4, 4, 4))
    torch.testing.assert_close(features, features[..., :1, :1, :1].expand_as(features))


@torch.no_grad()
def test_normalised_latents_have_the_codebooks_range():
    vqvae = model()
    vqvae.codebook.embedding.copy_(torch.randn(8, 3) * 3 + 1)
    codes = vqvae.codebook.embedding
    latents = codes.t()[None, :, :, None, None]  # (1, 3, 8, 1, 1)
    normalized = vqvae.normalize_latents(latents)
    assert normalized.min() == -1 and normalized.max() == 1
    torch.testing.assert_close(normalized, 2 * (latents - codes.min()) / (codes.max() - codes.min()) - 1)
    torch.testing.assert_close(vqvae.denormalize_latents(normalized), latents)


@torch.no_grad()
def test_codes_begin_as_vectors_once():
    vqvae = model()
    latents = torch.randn(1, 3, 4, 4, 4)
    rows = latents.movedim(1, -1).flatten(0, 3)
    vqvae.initialize_codebook(latents)
    codes = vqvae.codebook.embedding.clone()
    is_row = (codes[:, None] == rows).all(-1)  # (codes, rows)
    assert is_row.any(1).all() and len(codes.unique(dim=0)) == 8
    vqvae.initialize_codebook(torch.zeros_like(latents))
    assert torch.equal(vqvae.codebook.embedding, codes)


@torch.no_grad()
def test_codes_are_drawn_evenly():
    codebook = RestartedCodebook(200, 1)
    vectors = torch.cat([torch.zeros(800, 1), torch.full((200, 1), 100.0)])  # far from the mean, and yet no likelier
    codebook.initialize(vectors, torch.Generator().manual_seed(0))
    assert 20 < int((codebook.embedding > 50).sum()) < 60


@torch.no_grad()
def test_codes_move_to_the_average_of_their_vectors_and_rare_ones_are_restarted():
    codebook = RestartedCodebook(2, 1)
    codebook.embedding.copy_(torch.tensor([[0.0], [50.0]]))
    codebook.ema_sum.copy_(codebook.embedding)
    vectors = torch.tensor([[1.0]] * 10)
    count, num_restarted = codebook.update(vectors, torch.zeros(10, dtype=torch.long), 0.9, 1.0)
    assert count.tolist() == [10, 0] and num_restarted == 1
    # 0.9 * 1 + 0.1 * 10 of a count, 0.9 * 0 + 0.1 * 10 of a sum; the other one has 0.9 of a count left, below 1
    torch.testing.assert_close(codebook.embedding, torch.tensor([[1.0 / 1.9], [1.0]]))
    _, num_restarted = codebook.update(vectors, torch.zeros(10, dtype=torch.long), 0.9, 1.0)
    assert num_restarted == 0  # it has time to be used
    torch.testing.assert_close(codebook.embedding[1], torch.tensor([1.0]))


@torch.no_grad()
def test_save_and_load(tmp_path):
    vqvae = model()
    sample = volumes(vqvae)
    vqvae.initialize_codebook(vqvae.encode(sample).latents)
    vqvae.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MedicalDiffusionVQModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample).sample, vqvae(sample).sample)
    assert loaded.codebook.is_initialized


def test_gradient_checkpointing_gives_the_same_gradients():
    plain = model().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    checkpointed.decoder.up_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    sample = volumes(plain)
    for vqvae in (plain, checkpointed):
        vqvae(sample).sample.square().mean().backward()
    assert len(calls) == 2  # once forward, once again for the backward pass
    for (name, expected), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_decodes_like_float32(dtype):
    vqvae = model()
    latents = torch.randn(1, *vqvae.latent_shape)
    expected = vqvae.decode(latents).sample
    output = copy.deepcopy(vqvae).to(dtype).decode(latents).sample
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_layerwise_casting_leaves_the_codes_and_the_norms_in_full_precision():
    vqvae = model()
    codes = vqvae.codebook.embedding.clone()
    vqvae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert vqvae.decoder.conv_out.weight.dtype == torch.float8_e4m3fn
    assert vqvae.decoder.norm_in.weight.dtype == torch.float32 and torch.equal(vqvae.codebook.embedding, codes)
    assert torch.isfinite(vqvae(volumes(vqvae)).sample).all()


@torch.no_grad()
def test_offloaded_weights_are_brought_back_for_every_public_call():
    vqvae = model()
    latents = vqvae.encode(volumes(vqvae)).latents
    calls = [vqvae.normalize_latents, vqvae.denormalize_latents, lambda x: vqvae.quantize(x).latents]
    calls.append(lambda x: vqvae.decode(x).sample)
    expected = [call(latents) for call in calls]
    cpu_offload(vqvae, "cpu", offload_buffers=True)
    for call, want in zip(calls, expected, strict=True):
        assert torch.equal(call(latents), want)
        assert all(parameter.is_meta for parameter in vqvae.parameters())


@torch.no_grad()
def test_it_compiles_into_one_graph():
    vqvae = model()
    sample = volumes(vqvae)
    compiled = torch.compile(vqvae, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(sample).sample, vqvae(sample).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 6, "block_out_channels": (4, 8, 8)}, r"sample_size divisible by 4 .*got \(6, 6, 6\)"),
        ({"channel_names": ("cell",)}, r"Expected 2 channel_names, got \('cell',\)"),
        ({"block_out_channels": (4,)}, r"at least 2 block_out_channels, got \(4,\)"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_shapes_that_do_not_fit_are_refused():
    vqvae = model()
    with pytest.raises(ValueError, match=r"Expected volumes \(B, 2, D, H, W\), got \(1, 3, 8, 8, 8\)"):
        vqvae.encode(torch.zeros(1, 3, 8, 8, 8))
    with pytest.raises(ValueError, match=r"divisible by 2 .*got \(8, 7, 8\)"):
        vqvae.encode(torch.zeros(1, 2, 8, 7, 8))
    with pytest.raises(ValueError, match=r"Expected latents \(B, 3, d, h, w\), got \(1, 2, 4, 4, 4\)"):
        vqvae.decode(torch.zeros(1, 2, 4, 4, 4))
