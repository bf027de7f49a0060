import math

import pytest
import torch

import diffusers_byoc.training.latents as latents_module
from diffusers_byoc import MultiCodebookVQModel
from diffusers_byoc.training import cache_latents, encode_batches, latent_statistics
from diffusers_byoc.training.latents import measure_latents


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
    statistics = latent_statistics(vqvae, latents.split(16))
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
    assert set(latent_statistics(vqvae, [torch.randn(2, 6, 4, 4, 4)])) == {
        f"{what}/{name}" for what in ("latent_std", "latent_outside") for name in ("cell", "nucleus", "actin")
    }


class Cells(torch.utils.data.Dataset):
    def __init__(self, num_cells, seed=0):
        self.volumes = torch.rand(num_cells, 2, 8, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, index):
        return {"volumes": self.volumes[index]}


@pytest.fixture
def encoded(monkeypatch):
    """How many times volumes were encoded."""
    original, calls = latents_module.encode_batches, []
    monkeypatch.setattr(latents_module, "encode_batches", lambda *args: calls.append(1) or original(*args))
    return calls


def test_cached_latents_are_the_encoders(vqvae, accelerator, tmp_path, encoded):
    cells = Cells(7)
    for _ in "encoded", "from disk":
        cache = cache_latents(vqvae, cells, tmp_path, accelerator, shard_size=3)
        assert len(cache) == 7 and len(encoded) == 3
        expected = vqvae.encode(cells.volumes).latents.detach()
        torch.testing.assert_close(cache[[6, 0, 3]], expected[[6, 0, 3]])
        torch.testing.assert_close(torch.cat(list(cache.chunks())), expected)
        mean, std = cache.mean_and_std()
        torch.testing.assert_close(mean, expected.mean((0, 2, 3, 4)))
        torch.testing.assert_close(std, expected.std((0, 2, 3, 4)))


def test_what_changes_the_latents_encodes_again(vqvae, accelerator, tmp_path, encoded):
    def encodings(cells):
        encoded.clear()
        cache_latents(vqvae, cells, tmp_path, accelerator, shard_size=3)
        return len(encoded)

    cells = Cells(6)
    assert encodings(cells) == 2 and encodings(cells) == 0
    cells.volumes[4, 1, 2, 3, 4] += 0.01  # of a file, a processor or an augmentation
    assert encodings(cells) == 1 and encodings(cells) == 0
    with torch.no_grad():
        next(vqvae.encoders.parameters()).view(-1)[0] += 0.01
    assert encodings(cells) == 2
    vqvae.register_to_config(latent_scaling="standardize")  # comes after encoding
    assert encodings(cells) == 0
    vqvae.register_to_config(latent_scaling="codebook_range", latent_range="absolute")  # likewise
    assert encodings(cells) == 0
    assert encodings(Cells(7)) == 3 and len(list(tmp_path.iterdir())) == 3
    next(tmp_path.glob("latents-00001*")).unlink()  # killed while encoding
    assert encodings(Cells(7)) == 1


def test_the_deviation_of_latents_is_that_where_a_cell_is(vqvae, accelerator, tmp_path):
    vqvae.register_to_config(latent_scaling="cell")
    cells = Cells(6)
    cells.volumes.fill_(-1)
    background = vqvae.background_latents((4, 4, 4))
    latents = cache_latents(vqvae, cells, tmp_path, accelerator)
    amplitudes = torch.arange(1.0, 1.0 + background.shape[1])
    signs = torch.randn(6, len(amplitudes)).sign()
    for shard in latents._shards:
        shard[:] = background + 0.01 * torch.randn(shard.shape)
        shard[:, :, 1, 1:3, 2] += (signs * amplitudes)[:, :, None]
    measure_latents(vqvae, latents)
    torch.testing.assert_close(torch.tensor(vqvae.config.latents_std), amplitudes, rtol=0.02, atol=0)
    assert vqvae.config.latents_mean is None
