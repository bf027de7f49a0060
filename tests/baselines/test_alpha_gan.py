import pytest
import torch
import torch.nn.functional as F

from diffusers_byoc import AlphaGAN
from diffusers_byoc.baselines.alpha_gan import critic_loss, discriminator_loss, ratio_loss, reconstruction_loss


def test_codes_logits_and_code_logits():
    model = AlphaGAN(sample_size=16, latent_dim=8, base_channels=4, code_hidden_size=16)
    volumes = torch.randn(3, 2, 16, 16, 16)
    codes = model.encoder(volumes)
    assert codes.shape == (3, 8) and model.discriminator(volumes).shape == (3, 1)
    assert model.code_discriminator(codes).shape == (3, 1) and model(codes).sample.shape == volumes.shape


def test_at_its_own_configuration_it_has_the_size_of_the_fields():
    with torch.device("meta"):
        model = AlphaGAN(num_channels=1, channel_names=("brain",))
    networks = (model.generator, model.encoder, model.discriminator, model.code_discriminator)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [
        37_416_512,
        43_785_896,
        11_049_665,
        20_901_889,
    ]


def test_the_ratio_is_that_of_the_discriminators_probabilities():
    logits = torch.tensor([0.3, -2.0])
    probability = logits.sigmoid()
    expected = (-probability.log() + (1 - probability).log()).mean()
    assert ratio_loss(logits).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_discriminator_is_asked_for_two_kinds_of_fakes():
    real, first, second = torch.randn(3, 4)
    bce = F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(4), torch.zeros(4)
    expected = 2 * bce(real, ones) + bce(first, zeros) + bce(second, zeros)
    assert discriminator_loss(real, first, second).item() == pytest.approx(expected.item(), rel=1e-5)
    assert discriminator_loss(real, first).item() == pytest.approx((bce(real, ones) + bce(first, zeros)).item())


def test_a_critic_measures_two_distances():
    real, first, second = torch.tensor([1.0, 2.0]), torch.tensor([0.0]), torch.tensor([-3.0])
    assert critic_loss(real, first, second).item() == pytest.approx(-3 - 3)


def test_reconstruction_is_a_mean_over_voxels():
    assert reconstruction_loss(torch.zeros(2, 1, 2, 2, 2), torch.full((2, 1, 2, 2, 2), -0.5)).item() == 0.5
