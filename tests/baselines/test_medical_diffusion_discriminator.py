import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from diffusers_byoc.baselines import MedicalDiffusionDiscriminator
from diffusers_byoc.baselines.medical_diffusion_discriminator import (
    feature_matching_loss,
    load_perceptual_network,
    perceptual_loss,
    select_slices,
)


TINY = {"base_channels": 4, "num_layers": 2}


def test_the_parameters_are_as_many_as_the_papers():
    """Counted once in the authors' `NLayerDiscriminator` and `NLayerDiscriminator3D` of 2 channels, 64 features."""
    with torch.device("meta"):
        discriminator = MedicalDiffusionDiscriminator()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 13_819_266


@pytest.mark.parametrize("num_channels", [1, 3])
def test_features_of_every_layer_and_logits_of_patches(num_channels):
    discriminator = MedicalDiffusionDiscriminator(num_channels, **TINY)
    slices, volumes = discriminator(torch.randn(2, num_channels, 16, 8), torch.randn(2, num_channels, 8, 16, 8))
    assert [feature.shape[1] for feature in slices] == [feature.shape[1] for feature in volumes] == [4, 8, 16, 1]
    assert slices[-1].shape[2:] == (7, 5) and volumes[-1].shape[2:] == (5, 7, 5)
    assert (slices[-1] < 0).any() and (slices[-1] > 0).any()  # no leaky ReLU after the logits


def test_save_and_load(tmp_path):
    discriminator = MedicalDiffusionDiscriminator(**TINY)
    inputs = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8, 8)
    discriminator(*inputs)  # which moves the running statistics
    discriminator.save_pretrained(tmp_path)
    loaded = MedicalDiffusionDiscriminator.from_pretrained(tmp_path)
    expected = discriminator.eval()(*inputs)
    assert torch.equal(loaded(*inputs)[1][-1], expected[1][-1])


def test_a_slice_of_each_volume():
    volumes = torch.arange(3 * 2 * 4 * 5 * 6.0).view(3, 2, 4, 5, 6)
    slices = select_slices(volumes, torch.tensor([0.0, 0.5, 0.999]))
    assert torch.equal(slices, torch.stack([volumes[0, :, 0], volumes[1, :, 2], volumes[2, :, 3]]))


def test_features_but_the_logits_are_matched():
    fake = [torch.zeros(2, 3), torch.ones(4), torch.full((5,), 9.0)]
    real = [torch.full((2, 3), 2.0), torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.zeros(5)]
    assert feature_matching_loss(fake, real) == 2.0 + 1.0
    real = [feature.requires_grad_() for feature in real]
    fake[0].requires_grad_()
    feature_matching_loss(fake, real).backward()
    assert fake[0].grad is not None and real[0].grad is None


class Difference(nn.Module):
    """Stands for LPIPS: sees three colours, says the mean difference of each picture."""

    def forward(self, fake, real):
        assert fake.shape[1] == 3
        return (fake - real).abs().mean((1, 2, 3))


def test_each_channel_is_seen_as_a_grey_picture():
    fake, real = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    real[:, 0] = 1.0
    assert perceptual_loss(Difference(), fake, real) == 0.5


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(
        ImportError, match=r'Expected the package lpips.*Run pip install "diffusers_byoc\[perceptual\]"'
    ):
        load_perceptual_network(torch.device("cpu"))


def test_without_a_network_it_says_what_to_do(monkeypatch):
    lpips = ModuleType("lpips")

    def download(net, verbose):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    lpips.LPIPS = download
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    with pytest.raises(ValueError, match="Expected the weights of VGG-16.*name resolution.*--perceptual_weight 0"):
        load_perceptual_network(torch.device("cpu"))
    lpips.LPIPS = lambda net, verbose: nn.Linear(1, 1)
    network = load_perceptual_network(torch.device("cpu"))
    assert not network.training and not network.weight.requires_grad
