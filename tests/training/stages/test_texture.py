import dataclasses

import pytest
import torch

from diffusers_byoc import MultiCodebookVQModel, TextureUNet3D, VolumeProcessor
from diffusers_byoc.data import PhantomCells
from diffusers_byoc.training import CheckpointError, Stage
from diffusers_byoc.training.stages import texture
from diffusers_byoc.training.stages.texture import TextureSettings, train_texture


SETTINGS = TextureSettings(
    max_train_steps=4,
    train_batch_size=2,
    crop_size=16,
    lr_scheduler="cosine",
    mixed_precision="no",
    num_cpu_threads=1,
    checkpointing_steps=2,
    validation_steps=4,
)


@pytest.fixture(scope="module")
def cells():
    return PhantomCells(4, VolumeProcessor(sample_size=32), ["nocodazole"])


@pytest.fixture(scope="module")
def vqvae(cells):
    torch.manual_seed(0)
    vqvae = MultiCodebookVQModel(
        latent_channels=4, num_vq_embeddings=16, block_out_channels=(4, 8), layers_per_block=1, sample_size=32
    )
    vqvae.initialize_codebooks(vqvae.encode(torch.stack([cells[i]["volumes"] for i in range(4)])).latents)
    return vqvae.eval()


@pytest.fixture
def train(fresh_state, vqvae, cells):
    def train(folder, **settings):
        fresh_state()
        torch.manual_seed(0)
        network = TextureUNet3D(block_out_channels=(8, 16), layers_per_block=(1, 1))
        with Stage(folder, "texture", dataclasses.replace(SETTINGS, **settings)) as stage:
            return train_texture(stage, network, vqvae, cells)

    return train


def test_a_network_is_trained_saved_and_resumed(train, tmp_path):
    whole = train(tmp_path / "whole")
    saved = TextureUNet3D.from_pretrained(tmp_path / "whole" / "texture_unet")
    assert 0.01 < saved.config.texture_scale < 2 and saved.config.connected_cells
    assert any(parameter.any() for parameter in saved.conv_out.parameters())  # which began at zero
    train(tmp_path / "parts", max_train_steps=2, lr_scheduler="constant")
    train(tmp_path / "whole_constant", lr_scheduler="constant")
    resumed = train(tmp_path / "parts", lr_scheduler="constant", resume_from_checkpoint="latest")
    unbroken = TextureUNet3D.from_pretrained(tmp_path / "whole_constant" / "texture_unet")
    for a, b, c in zip(resumed.parameters(), unbroken.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b) and a.shape == c.shape


def test_another_crop_size_is_not_resumed(train, tmp_path):
    train(tmp_path, max_train_steps=2)
    with pytest.raises(CheckpointError, match="crop_size"):
        train(tmp_path, crop_size=8, resume_from_checkpoint="latest")


def test_the_autoencoder_stays_as_it_is(train, vqvae, tmp_path):
    before = {name: tensor.clone() for name, tensor in vqvae.state_dict().items()}
    train(tmp_path, max_train_steps=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vqvae.state_dict().items())


def test_cells_of_several_pieces_are_noticed(train, cells, monkeypatch, tmp_path):
    item = type(cells).__getitem__

    def with_a_bead(self, index):
        cell = item(self, index)
        if index == 3:
            cell["volumes"][:, :2, :2, :2] = 0.5
        return cell

    monkeypatch.setattr(type(cells), "__getitem__", with_a_bead)
    assert not train(tmp_path, max_train_steps=1).config.connected_cells


@pytest.mark.parametrize("num_apart", [1, 2])
def test_one_of_fifty_may_be_of_several_pieces(fresh_state, vqvae, monkeypatch, tmp_path, num_apart):
    seen = []
    monkeypatch.setattr(texture, "is_connected", lambda volume: seen.append(volume) or len(seen) > num_apart)
    many = PhantomCells(50, VolumeProcessor(sample_size=32), ["nocodazole"])
    network = TextureUNet3D(block_out_channels=(8, 16), layers_per_block=(1, 1))
    with Stage(tmp_path, "texture", dataclasses.replace(SETTINGS, max_train_steps=1)) as stage:
        saved = train_texture(stage, network, vqvae, many)
    assert len(seen) == 50 and saved.config.connected_cells == (num_apart == 1)


def test_it_can_learn_from_cells_that_were_decoded_as_a_whole(train, tmp_path, vqvae, cells, monkeypatch):
    """A crop that was encoded alone looks otherwise, up to as far from its border as the autoencoder sees."""
    seen = []

    def flow_matching_loss(network, target, reconstruction, *others):
        seen.extend(reconstruction)
        return original(network, target, reconstruction, *others)

    original = texture.flow_matching_loss
    monkeypatch.setattr(texture, "flow_matching_loss", flow_matching_loss)
    train(tmp_path, max_train_steps=3, decode_whole_cells=True)
    with torch.no_grad():
        whole = torch.stack([cells[index]["volumes"] for index in range(4)])
        decoded = vqvae.decode(vqvae.encode(whole).latents).sample
    windows = decoded.unfold(2, 16, 1).unfold(3, 16, 1).unfold(4, 16, 1)  # (4, M, 17, 17, 17, 16, 16, 16), a view
    assert len(seen) == 6
    for crop in seen:
        near = (windows[..., 8, 8, 8] - crop[:, 8, 8, 8][:, None, None, None]).abs().amax(1) < 1e-5
        assert any(torch.allclose(windows[c, :, z, y, x], crop, atol=1e-5) for c, z, y, x in near.nonzero())
