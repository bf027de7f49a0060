import dataclasses

import pytest
import torch

from diffusers_byoc import MultiCodebookVQModel, VolumeProcessor
from diffusers_byoc.data import PhantomCells
from diffusers_byoc.training import Stage
from diffusers_byoc.training.stages.autoencoder import AutoencoderSettings, train_autoencoder


SETTINGS = AutoencoderSettings(
    max_train_steps=3,
    train_batch_size=2,
    crop_size=16,
    discriminator_start=3,
    mixed_precision="no",
    num_cpu_threads=1,
    checkpointing_steps=3,
    validation_steps=4,
)


@pytest.fixture
def train(fresh_state, monkeypatch, tmp_path):
    """Train, and say what noise the network was given."""
    cells = PhantomCells(4, VolumeProcessor(sample_size=32), ["nocodazole"])

    def train(name, **settings):
        fresh_state()
        torch.manual_seed(0)
        vqvae = MultiCodebookVQModel(
            latent_channels=4, num_vq_embeddings=16, block_out_channels=(4, 8, 8), layers_per_block=1, sample_size=32
        )
        forward, noises = vqvae.forward, []

        def noting(volumes, latent_noise=None, **arguments):
            noises.append(latent_noise)
            return forward(volumes, latent_noise=latent_noise, **arguments)

        monkeypatch.setattr(vqvae, "forward", noting)
        with Stage(tmp_path / name, "autoencoder", dataclasses.replace(SETTINGS, **settings)) as stage:
            train_autoencoder(stage, vqvae, cells)
        return MultiCodebookVQModel.from_pretrained(tmp_path / name / "vqvae"), noises

    return train


def test_latents_get_noise_of_many_deviations(train):
    without, noises = train("without")
    assert noises == [None] * 3
    noisy, noises = train("noisy", latent_noise=0.5)
    assert all(noise.shape == (2, 8, 4, 4, 4) for noise in noises)
    deviations = torch.cat([noise.flatten(1).std(1) for noise in noises])
    assert deviations.max() < 0.6 and deviations.std() > 0.05  # each cell's its own, below the greatest
    assert not torch.equal(noisy.decoder.conv_out.weight, without.decoder.conv_out.weight)
    again, _ = train("again", latent_noise=0.5)
    assert torch.equal(again.decoder.conv_out.weight, noisy.decoder.conv_out.weight)
