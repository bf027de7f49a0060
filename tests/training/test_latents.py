import math

import pytest
import torch

from diffusers_byoc import MultiCodebookVQModel
from diffusers_byoc.training import encode_batches, latent_statistics


@pytest.fixture
def vqvae():
    return MultiCodebookVQModel(
        latent_channels=4, num_vq_embeddings=8, block_out_channels=(4, 8), layers_per_block=1, sample_size=8
    )


def set_codebook_range(codebook, low, high):
    with torch.no_grad():
        codebook.embedding.uniform_(low, high)
        codebook.embedding[0, 0], codebook.embedding[-1, -1] = low, high


def test_encoding_in_batches_is_encoding_at_once(vqvae):
    volumes = torch.rand(5, 2, 8, 8, 8) * 2 - 1
    latents = encode_batches(vqvae, volumes.split(2))
    torch.testing.assert_close(latents, vqvae.encode(volumes).latents.detach())
    assert latents.shape == (5, 8, 4, 4, 4) and not latents.requires_grad and not vqvae.training


def test_latents_come_back_in_float32_whatever_computed_them(vqvae):
    volumes = torch.rand(2, 2, 8, 8, 8)
    assert encode_batches(vqvae.bfloat16(), [volumes]).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert encode_batches(vqvae.float(), [volumes]).dtype == torch.float32


def test_encoding_does_not_touch_the_codebooks(vqvae):
    before = {name: value.clone() for name, value in vqvae.state_dict().items()}
    encode_batches(vqvae.train(), [torch.rand(2, 2, 8, 8, 8)])
    assert all(torch.equal(value, before[name]) for name, value in vqvae.state_dict().items())


def test_statistics_are_each_channels_own(vqvae):
    """Ranges of width 4 around 0 and of width 1 around 10; uniform latents of known spread."""
    set_codebook_range(vqvae.codebooks[0], -2.0, 2.0)
    set_codebook_range(vqvae.codebooks[1], 9.5, 10.5)
    uniform = torch.linspace(-1, 1, 70 * 4 * 64).view(70, 4, 4, 4, 4)
    latents = torch.cat([uniform * 4.0, uniform * 0.25 + 10.0], dim=1)  # normalised: [-2, 2], and [-0.5, 0.5]
    statistics = latent_statistics(vqvae, latents)
    assert statistics["latent_std/cell"] == pytest.approx(2 / math.sqrt(3), rel=1e-3)
    assert statistics["latent_std/nucleus"] == pytest.approx(0.5 / math.sqrt(3), rel=1e-3)
    assert statistics["latent_outside/cell"] == pytest.approx(0.5, abs=1e-3)
    assert statistics["latent_outside/nucleus"] == 0
    assert len(statistics) == 4


def test_statistics_name_any_number_of_channels():
    vqvae = MultiCodebookVQModel(
        num_channels=3,
        channel_names=("cell", "nucleus", "actin"),
        latent_channels=2,
        num_vq_embeddings=8,
        block_out_channels=(4, 8),
        sample_size=8,
    )
    assert set(latent_statistics(vqvae, torch.randn(2, 6, 4, 4, 4))) == {
        f"{what}/{name}" for what in ("latent_std", "latent_outside") for name in ("cell", "nucleus", "actin")
    }
