import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_byoc import BaselinePipeline, MedicalDiffusionUNet3D, MedicalDiffusionVQModel, VolumeProcessor
from diffusers_byoc.baselines import MedicalDiffusionDiscriminator
from diffusers_byoc.data import CellFolder, PhantomCells
from diffusers_byoc.training import CheckpointError, Stage
from diffusers_byoc.training.stages import medical_diffusion
from diffusers_byoc.training.stages.medical_diffusion import (
    MedicalDiffusionAutoencoderSettings,
    MedicalDiffusionSettings,
    train_medical_autoencoder,
    train_medical_diffusion,
)


COMMON = {
    "max_train_steps": 4,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "mixed_precision": "no",
    "num_cpu_threads": 1,
    "checkpointing_steps": 2,
    "validation_steps": 1000,
}
AUTOENCODER = MedicalDiffusionAutoencoderSettings(**COMMON, discriminator_start=1, learning_rate=1e-3)
DIFFUSION = MedicalDiffusionSettings(**COMMON, ema_start=2, ema_update_every=1, num_inference_steps=3)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Phantoms at half their resolution, 16³ voxels."""
    phantoms = PhantomCells(8, VolumeProcessor(sample_size=32), ["nocodazole"])
    folder = tmp_path_factory.mktemp("halved")
    for index in range(len(phantoms)):
        volume = phantoms[index]["volumes"] / 2 + 0.5
        np.save(folder / f"{index:02}.npy", F.avg_pool3d(volume, 2).numpy())
    return CellFolder(folder, VolumeProcessor(sample_size=16))


def make_autoencoder():
    torch.manual_seed(0)
    return MedicalDiffusionVQModel(
        latent_channels=4, num_vq_embeddings=32, block_out_channels=(8, 16), norm_num_groups=8, sample_size=16
    )


def make_unet():
    torch.manual_seed(0)
    return MedicalDiffusionUNet3D(
        4, 8, block_out_channels=(16, 32), norm_num_groups=4, num_attention_heads=2, attention_head_dim=8
    )


@pytest.fixture
def train(fresh_state, cells, monkeypatch):
    """Trains the stage that the settings are of."""
    shown = []
    monkeypatch.setattr(Stage, "log_volumes", lambda stage, rows, names: shown.append(rows))

    def train(folder, settings, vqvae=None, scheduler=None, **changes):
        fresh_state()
        settings = dataclasses.replace(settings, **changes)
        if isinstance(settings, MedicalDiffusionSettings):
            with Stage(folder, "diffusion", settings) as stage:
                scheduler = scheduler or DDPMScheduler(beta_schedule="squaredcos_cap_v2")
                return train_medical_diffusion(stage, make_unet(), scheduler, vqvae or initialized(cells), cells)
        with Stage(folder, "autoencoder", settings) as stage:
            vqvae = make_autoencoder()
            discriminator = MedicalDiffusionDiscriminator(base_channels=4, num_layers=2)
            train.discriminator = discriminator
            return train_medical_autoencoder(stage, vqvae, discriminator, cells)

    train.shown = shown
    return train


def initialized(cells):
    vqvae = make_autoencoder().eval()
    with torch.no_grad():
        vqvae.initialize_codebook(vqvae.encode(torch.stack([cells[i]["volumes"] for i in range(2)])).latents)
    return vqvae


def assert_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert one.keys() == other.keys() and not different, different


def scalars(folder, stage, name):
    events = EventAccumulator(str(folder / "logs" / stage)).Reload()
    return [event.value for event in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def test_the_autoencoder_resumes_bit_for_bit(train, tmp_path):
    whole = train(tmp_path / "whole", AUTOENCODER)
    adversary = {name: tensor.clone() for name, tensor in train.discriminator.state_dict().items()}
    assert_same(MedicalDiffusionVQModel.from_pretrained(tmp_path / "whole" / "model"), whole)
    train(tmp_path / "parts", AUTOENCODER, max_train_steps=2)
    assert_same(train(tmp_path / "parts", AUTOENCODER, resume_from_checkpoint="latest"), whole)
    assert all(torch.equal(tensor, adversary[name]) for name, tensor in train.discriminator.state_dict().items())
    with pytest.raises(CheckpointError, match="l1_weight 4.0"):
        train(tmp_path / "parts", AUTOENCODER, l1_weight=1.0, resume_from_checkpoint="latest")


def test_the_adversaries_join_late_and_each_counts(train, tmp_path):
    late = train(tmp_path / "late", AUTOENCODER, discriminator_start=3)
    assert len(scalars(tmp_path / "late", "autoencoder", "loss/l1")) == 4
    for name in ("adversarial", "feature_matching", "discriminators"):
        assert len(scalars(tmp_path / "late", "autoencoder", f"loss/{name}")) == 1
    for weight in ("slice_weight", "volume_weight", "feature_matching_weight"):
        without = train(tmp_path / weight, AUTOENCODER, discriminator_start=3, **{weight: 0.0})
        assert not torch.equal(without.decoder.conv_out.weight, late.decoder.conv_out.weight), weight


def test_a_perceptual_loss_is_one_of_the_losses(train, tmp_path, monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, fake, real):
            return (fake - real).abs().flatten(1).mean(1)

    monkeypatch.setattr(medical_diffusion, "load_perceptual_network", lambda device: Network())
    plain = train(tmp_path / "plain", AUTOENCODER, max_train_steps=1)
    assert not scalars(tmp_path / "plain", "autoencoder", "loss/perceptual")
    perceptual = train(tmp_path / "perceptual", AUTOENCODER, max_train_steps=1, perceptual_weight=4.0)
    assert len(scalars(tmp_path / "perceptual", "autoencoder", "loss/perceptual")) == 1
    assert not torch.equal(perceptual.decoder.conv_out.weight, plain.decoder.conv_out.weight)


def test_the_autoencoder_learns(train, cells, tmp_path):
    settings = {"max_train_steps": 150, "learning_rate": 2e-3, "lr_scheduler": "cosine", "discriminator_start": 130}
    vqvae = train(tmp_path, AUTOENCODER, **settings, validation_steps=150, checkpointing_steps=150)
    volumes = torch.stack([cells[index]["volumes"] for index in range(len(cells))])
    with torch.no_grad():
        error = F.l1_loss(vqvae(volumes).sample, volumes)
    background = F.l1_loss(torch.full_like(volumes, -1.0), volumes).item()  # the best constant: the median
    assert error.item() < 0.8 * background
    assert [rows.keys() for rows in train.shown] == [{"cells", "reconstructed"}]


def test_the_diffusion_resumes_bit_for_bit(train, tmp_path):
    whole = train(tmp_path / "whole", DIFFUSION)
    train(tmp_path / "parts", DIFFUSION, max_train_steps=2)
    parts = train(tmp_path / "parts", DIFFUSION, resume_from_checkpoint="latest")
    assert_same(parts.unet, whole.unet)
    assert_same(parts.model, whole.model)
    loaded = BaselinePipeline.from_pretrained(tmp_path / "whole")
    loaded.set_progress_bar_config(disable=True)
    volumes = [pipe(2, generator=torch.manual_seed(1)).volumes for pipe in (loaded, whole)]
    assert volumes[0].shape == (2, 2, 16, 16, 16) and loaded.scheduler.config.clip_sample
    np.testing.assert_array_equal(*volumes)


def test_another_autoencoder_is_not_resumed(train, cells, tmp_path):
    train(tmp_path, DIFFUSION, max_train_steps=2)
    other = initialized(cells)
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    with pytest.raises(CheckpointError, match="Expected autoencoder"):
        train(tmp_path, DIFFUSION, other, resume_from_checkpoint="latest")


def test_the_average_is_a_copy_before_its_start_and_moves_now_and_then(train, tmp_path):
    weights = {}
    for steps in (1, 2, 3):  # the weights themselves: with so late a start the average is a copy of them
        pipeline = train(tmp_path / f"copy_{steps}", DIFFUSION, max_train_steps=steps, ema_start=100)
        weights[steps] = pipeline.unet.conv_out.weight
    assert not torch.equal(weights[1], weights[2])

    average = train(tmp_path / "average", DIFFUSION, max_train_steps=3, ema_start=2, ema_decay=0.75)
    # after two steps a copy, after the third 0.75 of that and 0.25 of the new weights
    expected = 0.75 * weights[2] + 0.25 * weights[3]
    torch.testing.assert_close(average.unet.conv_out.weight, expected)
    rare = train(tmp_path / "rare", DIFFUSION, max_train_steps=3, ema_start=100, ema_update_every=10)
    assert torch.equal(rare.unet.conv_out.weight, weights[1])


def test_the_diffusion_learns(train, cells, tmp_path):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    settings = {"max_train_steps": 60, "learning_rate": 3e-3, "ema_start": 1000, "checkpointing_steps": 60}
    pipeline = train(tmp_path, DIFFUSION, scheduler=scheduler, **settings, validation_steps=60, max_grad_norm=1.0)
    losses = scalars(tmp_path, "diffusion", "loss/diffusion")
    assert len(losses) == 60
    assert sum(losses[-15:]) / 15 < 0.6 * losses[0]  # the mean |ε|, 0.8, of a network that says nothing
    assert [rows["generated"].shape for rows in train.shown] == [(4, 2, 16, 16, 16)]
    # the latents are those of cells, not of noise: latents between them have another spread
    vqvae = pipeline.model
    with torch.no_grad():
        clean = vqvae.normalize_latents(vqvae.encode(torch.stack([cells[i]["volumes"] for i in range(8)])).latents)
        noise, timesteps = torch.randn_like(clean), torch.full((8,), 300)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        error = F.l1_loss(pipeline.unet(noisy, timesteps).sample, noise)
    assert error < 0.7 * noise.abs().mean()
