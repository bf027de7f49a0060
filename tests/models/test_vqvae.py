import copy

import pytest
import torch

from diffusers_byoc import MultiCodebookVQModel
from diffusers_byoc.models.encoder_decoder import ResidualBlock
from diffusers_byoc.models.vqvae import is_cell_place


TINY = {
    "latent_channels": 4,
    "num_vq_embeddings": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 8,
}


def model(**changes):
    torch.manual_seed(0)
    vqvae = MultiCodebookVQModel(**(TINY | changes)).eval()
    size = vqvae.config.sample_size
    vqvae.initialize_codebooks(vqvae.encode(volumes(vqvae, batch=4, size=size)).latents)
    return vqvae


def volumes(vqvae, batch=2, size=8):
    return torch.rand(batch, vqvae.config.num_channels, size, size, size) * 2 - 1


@torch.no_grad()
def test_training_starts_from_background():
    # from a random volume, 300 steps on real cells ended at the constant -1 (error 0.011 instead of 0.002)
    vqvae = model(block_out_channels=(16, 32, 64), sample_size=32)
    sample = vqvae(volumes(vqvae, size=32)).sample
    assert (sample + 1).square().mean() < 0.05 and sample.std() > 1e-3


@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"norm_num_groups": 4}, {"share_encoder": False}])
@torch.no_grad()
def test_shapes(num_channels, changes):
    vqvae = model(num_channels=num_channels, **changes)
    sample = volumes(vqvae)
    latents = vqvae.encode(sample).latents
    assert latents.shape == (2, num_channels * 4, 4, 4, 4)
    quantized = vqvae.quantize(latents)
    assert quantized.latents.shape == latents.shape
    assert quantized.indices.shape == (2, num_channels, 4, 4, 4)
    assert vqvae.decode(latents).sample.shape == sample.shape
    output = vqvae(sample)
    assert output.sample.shape == sample.shape
    assert output.commit_loss.ndim == 0


def test_residual_blocks_can_differ_between_resolutions():
    def count(part):
        return [sum(isinstance(m, ResidualBlock) for m in block.modules()) for block in part]

    vqvae = model(block_out_channels=(8, 8, 16), layers_per_block=(0, 2))
    assert count(vqvae.encoders[0].down_blocks) == [0, 2]
    assert count(vqvae.decoder.up_blocks) == [2, 0]  # from the latents towards the volume
    vqvae = model(block_out_channels=(8, 8, 16), layers_per_block=2)
    assert count(vqvae.encoders[0].down_blocks) == count(vqvae.decoder.up_blocks) == [2, 2]


def test_residual_blocks_of_too_few_resolutions_are_refused():
    with pytest.raises(ValueError, match="Expected 2 layers_per_block.*got 1"):
        model(block_out_channels=(8, 8, 16), layers_per_block=(2,))


@pytest.mark.parametrize(("block_out_channels", "factor"), [((8,), 1), ((8, 16), 2), ((8, 8, 16), 4)])
@torch.no_grad()
def test_each_further_width_halves_the_grid(block_out_channels, factor):
    vqvae = model(block_out_channels=block_out_channels)
    assert vqvae.encode(torch.zeros(1, 2, 8, 16, 8)).latents.shape[2:] == (8 // factor, 16 // factor, 8 // factor)
    assert vqvae(torch.zeros(1, 2, 8, 16, 8)).sample.shape == (1, 2, 8, 16, 8)


@pytest.mark.parametrize("share_encoder", [True, False])
@torch.no_grad()
def test_the_encoder_sees_channels_alone_and_the_decoder_jointly(share_encoder):
    vqvae = model(share_encoder=share_encoder)
    sample = volumes(vqvae)
    other_nucleus = sample.clone()
    other_nucleus[:, 1] = -sample[:, 1]
    latents, other_latents = vqvae.encode(sample).latents, vqvae.encode(other_nucleus).latents
    assert torch.equal(other_latents[:, :4], latents[:, :4])  # the cell's latents
    assert not torch.equal(other_latents[:, 4:], latents[:, 4:])
    decoded, other_decoded = vqvae.decode(latents).sample, vqvae.decode(other_latents).sample
    assert not torch.equal(other_decoded[:, 0], decoded[:, 0])  # the cell's reconstruction


@pytest.mark.parametrize("share_encoder", [True, False])
@torch.no_grad()
def test_the_encoder_is_shared_exactly_if_asked(share_encoder):
    vqvae = model(share_encoder=share_encoder)
    channel = torch.rand(1, 1, 8, 8, 8)
    cell, nucleus = vqvae.encode(channel.repeat(1, 2, 1, 1, 1)).latents.chunk(2, 1)
    assert torch.allclose(cell, nucleus, atol=1e-6) == share_encoder


@torch.no_grad()
def test_quantize_takes_the_nearest_code_of_the_channels_own_codebook():
    vqvae = model(num_channels=3)
    latents = torch.randn(2, 12, 3, 2, 4)
    quantized = vqvae.quantize(latents)
    for channel, codebook in enumerate(vqvae.codebooks):
        rows = latents[:, 4 * channel : 4 * channel + 4].permute(0, 2, 3, 4, 1).reshape(-1, 4)
        nearest = torch.cdist(rows.double(), codebook.embedding.double()).argmin(1)
        assert torch.equal(quantized.indices[:, channel].flatten(), nearest)
        expected = codebook.embedding[nearest].view(2, 3, 2, 4, 4).permute(0, 4, 1, 2, 3)
        assert torch.equal(quantized.latents[:, 4 * channel : 4 * channel + 4], expected)


def residual_codes(vqvae, channel, latents):
    """Brute force: the codes of one channel's vectors (N, n), stage by stage, and what each stage is given."""
    rest, codes, given = latents.double(), [], []
    for codebook in vqvae.codebooks[channel :: vqvae.config.num_channels]:
        given.append(rest)
        codes.append(torch.cdist(rest, codebook.embedding.detach().double()).argmin(1))
        rest = rest - codebook.embedding.detach().double()[codes[-1]]
    return codes, given


def rows_of(latents, channel):
    return latents[:, 4 * channel : 4 * channel + 4].movedim(1, -1).flatten(0, 3)


@pytest.mark.parametrize("num_quantizers", [1, 2, 3])
@pytest.mark.parametrize("num_channels", [1, 2, 3])
@torch.no_grad()
def test_residual_codebooks_quantize_what_is_left(num_channels, num_quantizers):
    vqvae = model(num_channels=num_channels, num_quantizers=num_quantizers)
    assert len(vqvae.codebooks) == len(vqvae.codebook_names) == num_channels * num_quantizers
    latents = torch.randn(2, 4 * num_channels, 3, 2, 4)
    quantized = vqvae.quantize(latents)
    assert quantized.indices.shape == (2, num_channels * num_quantizers, 3, 2, 4)
    for channel in range(num_channels):
        codes, _ = residual_codes(vqvae, channel, rows_of(latents, channel))
        total = torch.zeros(48, 4)
        for stage, expected in enumerate(codes):
            number = stage * num_channels + channel
            assert torch.equal(quantized.indices[:, number].flatten(), expected)
            total += vqvae.codebooks[number].embedding[expected]
        torch.testing.assert_close(rows_of(quantized.latents, channel), total)
    torch.testing.assert_close(
        vqvae.decode(latents).sample, vqvae.decode(quantized.latents, force_not_quantize=True).sample
    )


@torch.no_grad()
def test_each_further_codebook_leaves_less():
    errors = []
    for num_quantizers in (1, 2, 4):
        vqvae = model(num_quantizers=num_quantizers)
        latents = vqvae.encode(volumes(vqvae, batch=4)).latents
        errors.append((vqvae.quantize(latents).latents - latents).square().mean())
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.9 * errors[1]


def test_a_model_of_one_quantizer_has_the_weights_it_always_had(tmp_path):
    one, three = model(), model(num_quantizers=3)
    assert [name for name in one.state_dict() if name.endswith("embedding")] == [
        "codebooks.0.embedding",
        "codebooks.1.embedding",
    ]
    assert one.codebook_names == ["cell", "nucleus"]
    assert three.codebook_names == ["cell", "nucleus", "cell_2", "nucleus_2", "cell_3", "nucleus_3"]
    three.save_pretrained(tmp_path)
    loaded = MultiCodebookVQModel.from_pretrained(tmp_path)
    latents = torch.randn(1, 8, 4, 4, 4)
    assert torch.equal(loaded.quantize(latents).indices, three.quantize(latents).indices)
    with pytest.raises(ValueError, match="num_quantizers of at least 1, got 0"):
        model(num_quantizers=0)


def test_residual_codebooks_start_from_what_is_left():
    torch.manual_seed(0)
    vqvae = MultiCodebookVQModel(**TINY, num_quantizers=2)
    latents = torch.randn(4, 8, 4, 4, 4)
    vqvae.initialize_codebooks(latents)
    for channel in range(2):
        _, given = residual_codes(vqvae, channel, rows_of(latents, channel))
        for stage, rows in enumerate(given):
            codes = vqvae.codebooks[2 * stage + channel].embedding.detach()
            assert torch.cdist(codes.double(), rows).amin(1).max() < 1e-5  # each code is one of the vectors
            assert len(codes.unique(dim=0)) == 16


@pytest.mark.parametrize("use_ema_codebook", [True, False])
def test_residual_codebooks_follow_what_they_are_given(use_ema_codebook):
    vqvae = model(num_quantizers=2, use_ema_codebook=use_ema_codebook, ema_decay=0.8, revival_threshold=0.0)
    output = vqvae(volumes(vqvae))
    expected = {}
    for channel in range(2):
        codes, given = residual_codes(vqvae, channel, rows_of(output.latents.detach(), channel))
        for stage, (indices, rows) in enumerate(zip(codes, given, strict=True)):
            number = 2 * stage + channel
            one_hot = torch.nn.functional.one_hot(indices, 16).float()
            count = 0.8 * vqvae.codebooks[number].ema_count + 0.2 * one_hot.sum(0)
            total = 0.8 * vqvae.codebooks[number].ema_sum + 0.2 * one_hot.T @ rows.float()
            expected[number] = count, total
    before = [codebook.embedding.detach().clone() for codebook in vqvae.codebooks]
    statistics = vqvae.update_codebooks(output.latents, output.indices)
    for number, (count, total) in expected.items():
        codebook = vqvae.codebooks[number]
        torch.testing.assert_close(codebook.ema_count, count)
        torch.testing.assert_close(codebook.ema_sum, total, atol=1e-5, rtol=1e-4)
        wanted = total / count[:, None] if use_ema_codebook else before[number]
        torch.testing.assert_close(codebook.embedding.detach(), wanted, atol=1e-5, rtol=1e-4)
        name = vqvae.codebook_names[number]
        assert statistics[f"usage/{name}"] == len(output.indices[:, number].unique()) / 16
    assert set(statistics) == {
        f"{kind}/{name}" for kind in ("usage", "perplexity", "revived") for name in vqvae.codebook_names
    }


def test_dead_residual_codes_become_what_is_badly_quantized():
    vqvae = model(num_quantizers=2, revival_threshold=0.5)
    codebook = vqvae.codebooks[2]  # the cell's second
    with torch.no_grad():
        codebook.embedding[3:] = 1e3  # never the closest
        codebook.ema_count[3:] = 1e-3
    output = vqvae(volumes(vqvae))
    _, given = residual_codes(vqvae, 0, rows_of(output.latents.detach(), 0))
    statistics = vqvae.update_codebooks(output.latents, output.indices)
    assert statistics["revived/cell_2"] >= 13
    revived = codebook.embedding.detach()[3:]
    assert torch.cdist(revived.double(), given[1]).amin(1).max() < 1e-5


def test_gradients_reach_every_residual_codebook():
    vqvae = model(num_quantizers=3, use_ema_codebook=False)
    output = vqvae(volumes(vqvae))
    distance = (output.latents - vqvae.quantize(output.latents).latents).square().mean()
    torch.testing.assert_close(output.commit_loss, 1.25 * distance)
    output.commit_loss.backward()
    assert all(codebook.embedding.grad.abs().sum() > 0 for codebook in vqvae.codebooks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_residual_codes_in_half_precision_sum_in_float32(dtype):
    vqvae = model(num_quantizers=2).to(dtype)
    latents = torch.randn(2, 8, 4, 4, 4)
    quantized = vqvae.quantize(latents)
    indices = quantized.indices.unbind(1)
    codes = [codebook.embedding.float()[i] for codebook, i in zip(vqvae.codebooks, indices, strict=True)]
    expected = torch.cat([codes[0] + codes[2], codes[1] + codes[3]], -1).movedim(-1, 1)
    assert torch.equal(quantized.latents, expected)
    assert vqvae(volumes(vqvae)).sample.dtype == dtype


@torch.no_grad()
def test_residual_codebooks_do_not_change_the_scale_of_the_latents():
    vqvae = model(num_quantizers=2)
    latents = torch.randn(1, 8, 4, 4, 4)
    scaled = vqvae.normalize_latents(latents)
    for codebook in vqvae.codebooks[2:]:
        codebook.embedding.mul_(10)
    assert torch.equal(vqvae.normalize_latents(latents), scaled)
    torch.testing.assert_close(vqvae.denormalize_latents(scaled), latents)


@torch.no_grad()
def test_quantizing_twice_is_quantizing_once():
    vqvae = model()
    once = vqvae.quantize(torch.randn(1, 8, 4, 4, 4))
    twice = vqvae.quantize(once.latents)
    assert torch.equal(twice.latents, once.latents)
    assert torch.equal(twice.indices, once.indices)


@torch.no_grad()
def test_decode_quantizes_unless_told_not_to():
    vqvae = model()
    latents = torch.randn(1, 8, 4, 4, 4)
    quantized = vqvae.quantize(latents).latents
    assert torch.equal(vqvae.decode(latents).sample, vqvae.decode(quantized, force_not_quantize=True).sample)
    assert not torch.equal(vqvae.decode(latents).sample, vqvae.decode(latents, force_not_quantize=True).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_chooses_codes_from_float32_latents(dtype):
    vqvae = model().to(dtype)
    codes = vqvae.codebooks[0].embedding.float()
    # Just beside the middle between two codes, where rounding to half precision could tip the balance.
    middle = (codes[0] + codes[1]) / 2
    rows = torch.stack([middle.lerp(codes[k % 2], 1e-3 * (k + 1)) for k in range(8)])
    latents = torch.zeros(1, 8, 2, 2, 2)
    latents[0, :4] = rows.T.view(4, 2, 2, 2)
    expected = torch.cdist(rows.double(), codes.double()).argmin(1)
    assert torch.equal(vqvae.quantize(latents).indices[0, 0].flatten(), expected)
    quantized = vqvae.quantize(latents).latents
    assert torch.equal(vqvae.decode(latents).sample, vqvae.decode(quantized, force_not_quantize=True).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_reconstructs_like_float32(dtype):
    vqvae = model()
    sample = volumes(vqvae)
    latents = vqvae.quantize(vqvae.encode(sample).latents).latents
    expected = vqvae.decode(latents).sample
    half = vqvae.to(dtype)(sample)
    assert half.sample.dtype == dtype
    assert torch.isfinite(half.sample).all()
    assert (vqvae.decode(latents).sample.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_gradients_pass_straight_through_the_quantizer():
    vqvae = model()
    sample = volumes(vqvae)
    output = vqvae(sample)
    weights = torch.randn_like(output.sample)
    (gradient,) = torch.autograd.grad((output.sample * weights).sum(), output.latents)
    quantized = vqvae.quantize(output.latents.detach()).latents.requires_grad_()
    decoded = vqvae.decode(quantized, force_not_quantize=True).sample
    assert torch.equal(decoded, output.sample)
    (expected,) = torch.autograd.grad((decoded * weights).sum(), quantized)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("use_ema_codebook", [True, False])
def test_the_commitment_loss_is_equation_7(use_ema_codebook):
    vqvae = model(use_ema_codebook=use_ema_codebook, commitment_cost=0.5)
    output = vqvae(volumes(vqvae))
    distance = (output.latents - vqvae.quantize(output.latents).latents).square().mean()
    torch.testing.assert_close(output.commit_loss, distance * (0.5 if use_ema_codebook else 1.5))
    output.commit_loss.backward()
    assert vqvae.encoders[0].conv_out.weight.grad.abs().sum() > 0
    assert (vqvae.codebooks[0].embedding.grad is None) == use_ema_codebook


def test_calls_in_train_mode_change_no_state():
    vqvae = model().train()
    before = copy.deepcopy(vqvae.state_dict())
    sample = volumes(vqvae)
    latents = vqvae(sample).latents
    vqvae.quantize(latents)
    vqvae.decode(latents)
    for name, value in vqvae.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_only_update_codebooks_moves_the_codes():
    vqvae = model()
    before = copy.deepcopy(vqvae.state_dict())
    output = vqvae(volumes(vqvae))
    statistics = vqvae.update_codebooks(output.latents, output.indices)
    changed = {
        name.split(".")[0] for name, value in vqvae.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"codebooks"}
    assert set(statistics) == {
        f"{kind}/{name}" for kind in ("usage", "perplexity", "revived") for name in ("cell", "nucleus")
    }
    assert statistics["usage/cell"] == len(output.indices[:, 0].unique()) / 16
    assert statistics["usage/nucleus"] == len(output.indices[:, 1].unique()) / 16


def test_the_initialized_flag_survives_saving(tmp_path):
    vqvae = model()
    codes = vqvae.codebooks[1].embedding.clone()
    vqvae.save_pretrained(tmp_path)
    loaded = MultiCodebookVQModel.from_pretrained(tmp_path)
    loaded.initialize_codebooks(torch.randn(2, 8, 4, 4, 4))
    assert torch.equal(loaded.codebooks[1].embedding, codes)
    fresh = MultiCodebookVQModel(**TINY)
    unsaved_codes = fresh.codebooks[1].embedding.clone()
    fresh.initialize_codebooks(torch.randn(2, 8, 4, 4, 4))
    assert not torch.equal(fresh.codebooks[1].embedding, unsaved_codes)


@pytest.mark.parametrize("num_channels", [1, 2, 3])
@torch.no_grad()
def test_each_codebooks_extremes_map_to_one(num_channels):
    vqvae = model(num_channels=num_channels)
    for channel, codebook in enumerate(vqvae.codebooks):
        codebook.embedding.mul_(channel + 1).add_(channel)
    for channel, codebook in enumerate(vqvae.codebooks):
        for extreme, expected in ((codebook.embedding.min(), -1.0), (codebook.embedding.max(), 1.0)):
            normalised = vqvae.normalize_latents(extreme.expand(1, 4 * num_channels, 1, 1, 1))
            own_features = normalised[0, 4 * channel : 4 * channel + 4]
            torch.testing.assert_close(own_features, torch.full_like(own_features, expected))


@pytest.mark.parametrize("latent_scaling", ["codebook_range", "standardize", "cell"])
@torch.no_grad()
def test_denormalize_is_the_inverse_of_normalize(latent_scaling):
    vqvae = model(latent_scaling=latent_scaling)
    vqvae.set_latent_statistics(torch.randn(8), torch.rand(8) + 0.5)
    latents = 3 * torch.randn(2, 8, 4, 4, 4)
    assert not torch.allclose(vqvae.normalize_latents(latents), latents)
    torch.testing.assert_close(vqvae.denormalize_latents(vqvae.normalize_latents(latents)), latents)
    torch.testing.assert_close(vqvae.normalize_latents(vqvae.denormalize_latents(latents)), latents)


@torch.no_grad()
def test_standardised_latents_have_zero_mean_and_unit_deviation(tmp_path):
    vqvae = model(latent_scaling="standardize")
    latents = torch.randn(4, 8, 4, 4, 4) * torch.arange(1, 9).view(8, 1, 1, 1) + 5
    vqvae.set_latent_statistics(latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
    vqvae.save_pretrained(tmp_path)
    normalised = MultiCodebookVQModel.from_pretrained(tmp_path).normalize_latents(latents)
    torch.testing.assert_close(normalised.mean((0, 2, 3, 4)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3, 4)), torch.ones(8))


@torch.no_grad()
def test_background_is_zero_to_the_scaling_by_cells():
    vqvae = model(latent_scaling="cell")
    vqvae.set_latent_statistics(None, torch.full((8,), 0.5))
    background = vqvae.encode(torch.full((1, 2, 16, 16, 16), -1.0)).latents
    assert background.std((2, 3, 4)).max() > 0.01  # near the borders it is not what it is inside
    torch.testing.assert_close(vqvae.normalize_latents(background), torch.zeros_like(background))
    torch.testing.assert_close(vqvae.normalize_latents(background + 2), torch.full_like(background, 4.0))


def test_noise_on_the_latents_is_measured_by_them():
    vqvae = model(block_out_channels=(8, 8, 16), sample_size=32)
    sample = torch.full((2, 2, 32, 32, 32), -1.0)
    sample[:, :, 8:16, 8:16, 8:16] = torch.rand(2, 2, 8, 8, 8)
    clean = vqvae(sample).sample
    torch.testing.assert_close(vqvae(sample, latent_noise=torch.zeros(2, 8, 8, 8, 8)).sample, clean)
    noise = 0.3 * torch.randn(2, 8, 8, 8, 8)
    noisy = vqvae(sample, latent_noise=noise)
    assert not torch.allclose(noisy.sample, clean)
    torch.testing.assert_close(noisy.latents, vqvae.encode(sample).latents)  # the codebooks follow what is encoded

    # in the units of latent_scaling="cell": latents that grow gain nothing by it
    latents = vqvae.encode(sample).latents
    deviation = vqvae._cell_deviation(latents)
    squares = (latents - vqvae.background_latents((8, 8, 8))).square().movedim(1, -1)  # (B, d, h, w, M*n)
    expected = squares[is_cell_place(squares, squares.mean((0, 1, 2, 3)))].mean(0).sqrt()
    assert deviation.shape == (1, 8, 1, 1, 1)
    torch.testing.assert_close(deviation.flatten(), expected)
    with torch.no_grad():
        vqvae.encoders[0].conv_out.weight.mul_(10)
        vqvae.encoders[0].conv_out.bias.mul_(10)
    torch.testing.assert_close(vqvae._cell_deviation(vqvae.encode(sample).latents), 10 * deviation, rtol=1e-3, atol=0)
    vqvae._cell_deviation(vqvae.encode(sample).latents).sum().backward()
    assert vqvae.encoders[0].conv_out.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_scalings_need_their_statistics():
    latents = torch.zeros(1, 8, 4, 4, 4)
    with pytest.raises(ValueError, match="Expected latents_std for latent_scaling='cell', got None"):
        model(latent_scaling="cell").normalize_latents(latents)
    with pytest.raises(ValueError, match="Expected latents_mean and latents_std"):
        model(latent_scaling="standardize").normalize_latents(latents)


@torch.no_grad()
def test_slicing_is_exact():
    vqvae = model()
    sample = volumes(vqvae, batch=3)
    latents, decoded = vqvae.encode(sample).latents, vqvae(sample).sample
    batches = []
    vqvae.decoder.register_forward_hook(lambda module, args, output: batches.append(len(output)))
    vqvae.enable_slicing()
    torch.testing.assert_close(vqvae.encode(sample).latents, latents, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vqvae(sample).sample, decoded, atol=1e-5, rtol=1e-5)
    assert batches == [1, 1, 1]
    vqvae.disable_slicing()
    assert torch.equal(vqvae(sample).sample, decoded)


@torch.no_grad()
def test_one_tile_is_exact():
    vqvae = model()
    sample = volumes(vqvae)
    latents, decoded = vqvae.encode(sample).latents, vqvae(sample).sample
    vqvae.enable_tiling()
    assert torch.equal(vqvae.encode(sample).latents, latents)
    assert torch.equal(vqvae(sample).sample, decoded)


@pytest.mark.parametrize("share_encoder", [True, False])
@torch.no_grad()
def test_tiles_agree_with_the_whole(share_encoder):
    vqvae = model(block_out_channels=(8, 8, 16), sample_size=32, share_encoder=share_encoder)
    sample = volumes(vqvae, batch=1, size=64)
    latents = vqvae.encode(sample).latents
    decoded = vqvae.decode(latents).sample
    sizes = []
    vqvae.decoder.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    vqvae.enable_tiling()
    vqvae.tile_sample_min_size = 32
    tiled, encoded = vqvae.decode(latents).sample, vqvae.encode(sample).latents
    assert len(sizes) == 27
    assert max(sizes) == 32
    # A convolution at a tile's border sees zeros in place of the neighbour. Far from the borders nothing changes, and
    # near them fading into the neighbour leaves less of it than cutting off.
    torch.testing.assert_close(tiled[..., :8, :8, :8], decoded[..., :8, :8, :8], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded[..., :2, :2, :2], latents[..., :2, :2, :2], atol=1e-5, rtol=1e-4)
    vqvae.tile_overlap_factor = 0.0
    cut = vqvae.decode(latents).sample
    error = (tiled - decoded).square().mean()
    assert 0 < error < 0.2 * decoded.var()
    assert error < (cut - decoded).square().mean()


@pytest.mark.parametrize("norm_num_groups", [None, 4])
def test_gradient_checkpointing_gives_the_same_gradients(norm_num_groups):
    plain = model(norm_num_groups=norm_num_groups).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    checkpointed.decoder.up_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    sample = volumes(plain)
    for vqvae in (plain, checkpointed):
        output = vqvae(sample)
        (output.sample.square().mean() + output.commit_loss).backward()
    assert len(calls) == 2  # once forward, once again for the backward pass
    for (name, expected), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(got.grad, expected.grad, msg=name)


@pytest.mark.parametrize("changes", [{}, {"num_channels": 3, "norm_num_groups": 4, "share_encoder": False}])
@torch.no_grad()
def test_save_and_load_are_identical(changes, tmp_path):
    vqvae = model(**changes)
    sample = volumes(vqvae)
    vqvae.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MultiCodebookVQModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample).sample, vqvae(sample).sample)
    assert loaded.config.num_channels == vqvae.config.num_channels
    assert tuple(loaded.config.channel_names) == tuple(vqvae.config.channel_names)
    assert tuple(loaded.config.block_out_channels) == (8, 16)


def test_loading_in_half_precision(tmp_path):
    model().half().save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    loaded = MultiCodebookVQModel.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert bool(loaded.codebooks[0].is_initialized)


@torch.no_grad()
def test_layerwise_casting_leaves_the_codes_in_full_precision():
    vqvae = model()
    codes = vqvae.codebooks[0].embedding.clone()
    vqvae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert vqvae.decoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(vqvae.codebooks[0].embedding, codes)
    assert vqvae(volumes(vqvae)).sample.dtype == torch.float32


@pytest.mark.parametrize("latent_scaling", ["codebook_range", "cell"])
@torch.no_grad()
def test_offloaded_weights_are_brought_back_for_every_public_call(latent_scaling):
    from accelerate import cpu_offload

    vqvae = model(latent_scaling=latent_scaling, latents_std=[0.5] * 8)
    latents = vqvae.encode(volumes(vqvae)).latents
    calls = [vqvae.normalize_latents, vqvae.denormalize_latents, lambda x: vqvae.quantize(x).latents]
    calls.append(lambda x: vqvae.decode(x).sample)
    expected = [call(latents) for call in calls]
    cpu_offload(vqvae, "cpu", offload_buffers=True)
    assert all(parameter.is_meta for parameter in vqvae.parameters())
    for call, want in zip(calls, expected, strict=True):
        assert torch.equal(call(latents), want)
        assert all(parameter.is_meta for parameter in vqvae.parameters())


@pytest.mark.parametrize("num_channels", [1, 3])
def test_channel_names_follow_their_number(num_channels):
    assert len(MultiCodebookVQModel(**TINY, num_channels=num_channels).config.channel_names) == num_channels


def test_tuples_and_dataclasses_hold_the_same():
    vqvae = model()
    sample = volumes(vqvae)
    latents = vqvae.encode(sample).latents
    assert torch.equal(vqvae.encode(sample, return_dict=False)[0], latents)
    assert torch.equal(vqvae.decode(latents, return_dict=False)[0], vqvae.decode(latents).sample)
    assert torch.equal(vqvae.quantize(latents, return_dict=False)[1], vqvae.quantize(latents).indices)
    assert torch.equal(vqvae(sample, return_dict=False)[0], vqvae(sample).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 9}, "divisible by 2 .*got 9"),
        ({"channel_names": ("cell",)}, "Expected 2 channel_names .*got 1"),
        ({"latent_scaling": "unit"}, "got 'unit'"),
        ({"norm_num_groups": 3}, "got 16 features and norm_num_groups=3|got 8 features and norm_num_groups=3"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MultiCodebookVQModel(**(TINY | changes))


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (2, 3, 8, 8, 8), r"\(B, 2, D, H, W\), got \(2, 3, 8, 8, 8\)"),
        ("encode", (2, 8, 8, 8), r"\(B, 2, D, H, W\), got \(2, 8, 8, 8\)"),
        ("encode", (1, 2, 8, 9, 8), r"divisible by 2, got \(8, 9, 8\)"),
        ("decode", (1, 4, 4, 4, 4), r"\(B, 8, d, h, w\).*got \(1, 4, 4, 4, 4\)"),
        ("quantize", (8, 4, 4, 4), r"\(B, 8, d, h, w\).*got \(8, 4, 4, 4\)"),
        ("normalize_latents", (1, 16, 4, 4, 4), r"\(B, 8, d, h, w\).*got \(1, 16, 4, 4, 4\)"),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_refused(method, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(MultiCodebookVQModel(**TINY), method)(torch.zeros(shape))


# ---------------------------------------------------------------------- ablations


def with_ranges(**changes):
    """Codebooks whose numbers are in [-1, 3] for the cell and in [-4, 2] for the nucleus."""
    vqvae = model(**changes)
    with torch.no_grad():
        for codebook, (low, high) in zip(vqvae.codebooks, ((-1.0, 3.0), (-4.0, 2.0)), strict=True):
            codebook.embedding.uniform_(low, high)
            codebook.embedding[0, 0], codebook.embedding[1, 0] = low, high
    return vqvae


@pytest.mark.parametrize(
    ("latent_range", "cell", "nucleus"),
    [
        ("per_channel", (-1.0, 3.0), (-4.0, 2.0)),
        ("absolute", (-4.0, 3.0), (-4.0, 3.0)),
        ("cell", (-1.0, 3.0), (-1.0, 3.0)),
        ("nucleus", (-4.0, 2.0), (-4.0, 2.0)),
    ],
)
@torch.no_grad()
def test_the_range_that_latents_are_normalised_by(latent_range, cell, nucleus):
    vqvae = with_ranges()
    vqvae.register_to_config(latent_range=latent_range)  # as after training
    n = vqvae.config.latent_channels
    ends = torch.tensor([cell, nucleus]).repeat_interleave(n, 0)  # (M*n, 2)
    normalized = vqvae.normalize_latents(ends[None, :, :, None, None])
    torch.testing.assert_close(normalized[0, :, :, 0, 0], torch.tensor([-1.0, 1.0]).expand(2 * n, 2))
    latents = torch.randn(1, 2 * n, 2, 2, 2)
    torch.testing.assert_close(vqvae.denormalize_latents(vqvae.normalize_latents(latents)), latents)


def test_a_range_of_nothing_is_refused():
    with pytest.raises(ValueError, match="Expected latent_range among per_channel, absolute, cell, nucleus, got 'er'"):
        model(latent_range="er")
    with pytest.raises(ValueError, match="Expected latent_scaling 'codebook_range' for latent_range='cell'"):
        model(latent_range="cell", latent_scaling="standardize")
    vqvae = model()
    vqvae.register_to_config(latent_range="membrane")
    with pytest.raises(ValueError, match="Expected latent_range among"):
        vqvae.normalize_latents(torch.zeros(1, 2 * vqvae.config.latent_channels, 2, 2, 2))


@pytest.mark.parametrize("num_quantizers", [1, 2])
@torch.no_grad()
def test_channels_can_share_their_codebooks(num_quantizers, tmp_path):
    vqvae = MultiCodebookVQModel(**TINY, share_codebook=True, num_quantizers=num_quantizers).eval()
    n = vqvae.config.latent_channels
    assert len(vqvae.codebooks) == num_quantizers
    assert vqvae.codebook_names == ["shared", "shared_2"][:num_quantizers]
    latents = torch.cat([torch.randn(2, n, 4, 4, 4), torch.randn(2, n, 4, 4, 4) + 100], 1)
    vqvae.initialize_codebooks(latents, torch.Generator().manual_seed(0))
    assert (vqvae.codebooks[0].embedding.mean(1) > 50).any()  # the nucleus
    assert (vqvae.codebooks[0].embedding.mean(1) < 50).any()  # the cell
    _, indices = vqvae.quantize(latents, return_dict=False)
    _, swapped = vqvae.quantize(torch.cat(latents.chunk(2, 1)[::-1], 1), return_dict=False)
    assert indices.shape[1] == 2 * num_quantizers
    assert torch.equal(swapped[:, :2], indices[:, [1, 0]])  # the same codes, whichever channel
    assert vqvae.normalize_latents(latents)[:, :n].max() < vqvae.normalize_latents(latents)[:, n:].min()

    before = vqvae.codebooks[0].ema_count.sum()
    logs = vqvae.update_codebooks(latents, indices)
    used = {int(index) for index in indices[:, :2].unique()}
    assert logs["usage/shared"] == pytest.approx(len(used) / vqvae.config.num_vq_embeddings)
    decay = vqvae.config.ema_decay
    after = decay * before + (1 - decay) * 2 * 2 * 4**3  # vectors of both channels
    if not logs["revived/shared"]:
        torch.testing.assert_close(vqvae.codebooks[0].ema_count.sum(), after)
    vqvae.save_pretrained(tmp_path)
    assert torch.equal(
        MultiCodebookVQModel.from_pretrained(tmp_path).decode(latents).sample, vqvae.decode(latents).sample
    )
