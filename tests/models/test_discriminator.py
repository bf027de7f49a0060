import pytest
import torch

from diffusers_byoc import PatchDiscriminator3D


@pytest.mark.parametrize("num_channels", [1, 2, 3])
def test_one_logit_for_every_patch(num_channels):
    discriminator = PatchDiscriminator3D(num_channels, block_out_channels=(4, 8))
    assert discriminator(torch.randn(2, num_channels, 16, 8, 12)).shape == (2, 1, 4, 2, 3)


def test_a_logit_sees_its_patch_and_no_more():
    discriminator = PatchDiscriminator3D(1, block_out_channels=(4, 8))
    volume = torch.randn(1, 1, 64, 16, 16)
    changed = volume.clone()
    changed[:, :, 0] += 1.0
    moved = (discriminator(changed) - discriminator(volume)).abs().amax((0, 1, 3, 4))  # (16,), along D
    assert moved[0] > 0
    assert (moved[3:] == 0).all()


def test_it_sees_every_channel():
    discriminator = PatchDiscriminator3D(2, block_out_channels=(4, 8))
    volume = torch.randn(1, 2, 8, 8, 8)
    for channel in range(2):
        changed = volume.clone()
        changed[:, channel] *= -1
        assert not torch.allclose(discriminator(changed), discriminator(volume))


def test_save_and_load(tmp_path):
    discriminator = PatchDiscriminator3D(3, block_out_channels=(4, 8))
    discriminator.save_pretrained(tmp_path)
    loaded = PatchDiscriminator3D.from_pretrained(tmp_path)
    volume = torch.randn(1, 3, 8, 8, 8)
    assert torch.equal(loaded(volume), discriminator(volume))
