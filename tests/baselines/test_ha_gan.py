import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_byoc import HAGAN
from diffusers_byoc.baselines.ha_gan import (
    SIZES,
    discriminator_loss,
    feature_encoder_loss,
    generator_loss,
    reconstruction_loss,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HAGAN(sample_size=32, latent_dim=8, base_channels=16).eval()


@pytest.mark.parametrize("size", SIZES)
def test_every_size_goes_through_all_networks(size):
    with torch.device("meta"):
        model = HAGAN(sample_size=size, latent_dim=8, base_channels=16)
        volumes = torch.zeros(2, 2, size, size, size)
        features = model.generator.make_features(torch.zeros(2, 8))
        assert features.shape == (2, 32, size // 4, size // 4, size // 4)
        low = model.generator.low(features)
        assert low.shape == (2, 2, size // 4, size // 4, size // 4)
        slices = model.generator.high(model.select_features(features, model.num_positions - 1))
        assert slices.shape == model.select(volumes, 0).shape == (2, 2, size // 8, size, size)
        assert model.encoder(slices).shape == model.select_features(features, 0).shape
        assert model.encode(volumes).shape == (2, 8)
        assert model.discriminator(slices, low, 0.5).shape == (2, 1)


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        (128, [52_518_210, 7_241_442, 161_152, 19_663_168]),
        (256, [52_518_210, 7_402_258, 161_152, 19_663_264]),
    ],
)
def test_at_its_own_configuration_it_has_the_size_of_the_authors(size, counts):
    with torch.device("meta"):
        model = HAGAN(num_channels=1, channel_names=("lung",), sample_size=size)
    networks = (model.generator, model.discriminator, model.encoder, model.feature_encoder)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == counts


def test_positions_reach_from_the_first_slice_to_the_last(model):
    volumes = torch.arange(32.0).view(1, 1, 32, 1, 1)
    assert model.crop_size == 4 and model.num_positions == 8
    assert model.select(volumes, 0).flatten().tolist() == [0, 1, 2, 3]
    assert model.select(volumes, model.num_positions - 1).flatten().tolist() == [28, 29, 30, 31]
    features = F.avg_pool1d(volumes.view(1, 1, 32), 4).view(1, 1, 8, 1, 1)
    for place in range(model.num_positions):
        mean = model.select(volumes, place).mean()
        assert model.select_features(features, place).mean() == mean


@torch.no_grad()
def test_the_discriminator_looks_at_slices_volume_and_position(model):
    slices, low = torch.randn(2, 2, 4, 32, 32), torch.randn(2, 2, 8, 8, 8)
    logits = model.discriminator(slices, low, 0.5)
    for changed in ((slices + 1, low, 0.5), (slices, low + 1, 0.5), (slices, low, 0.9)):
        assert not torch.allclose(model.discriminator(*changed), logits, atol=1e-6)


def test_the_discriminators_weights_are_bounded(model):
    model.discriminator.train()
    for _ in range(20):  # of the power iteration
        model.discriminator(torch.randn(1, 2, 4, 32, 32), torch.randn(1, 2, 8, 8, 8), 0.5)
    model.discriminator.eval()
    layers = [layer for layer in model.discriminator.modules() if isinstance(layer, (nn.Conv3d, nn.Linear))]
    assert len(layers) == 10
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_the_encoder_sees_the_parts_one_by_one(model):
    volumes = torch.randn(1, 2, 32, 32, 32)
    changed = volumes.clone()
    changed[:, :, :4] += 1
    difference = (model.encode_features(changed) - model.encode_features(volumes)).abs().amax((0, 1, 3, 4))
    assert difference[0] > 1e-3 and (difference[1:] == 0).all()


def test_losses():
    real, fake = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0])
    bce = F.binary_cross_entropy_with_logits
    expected = bce(real, torch.ones(2)) + bce(fake, torch.zeros(2))
    assert discriminator_loss(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)
    assert generator_loss(fake).item() == pytest.approx(bce(fake, torch.ones(2)).item(), rel=1e-5)
    zeros, ones = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    assert reconstruction_loss(zeros, ones).item() == 1
    assert feature_encoder_loss(zeros, ones, ones, ones).item() == 0.5


def test_widths_that_group_norm_cannot_part_are_refused():
    with pytest.raises(ValueError, match="Expected base_channels as a multiple of 16, .*, got 24. Choose one"):
        HAGAN(base_channels=24)
