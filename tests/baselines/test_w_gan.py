import pytest
import torch
from torch import nn

from diffusers_byoc import WGAN
from diffusers_byoc.baselines.w_gan import clip_weights, critic_loss, generator_loss, gradient_penalty


def test_the_critic_scores_octants():
    critic = WGAN(sample_size=16, latent_dim=8, base_channels=4).critic
    assert critic(torch.randn(3, 2, 16, 16, 16)).shape == (3, 1, 2, 2, 2)


def test_at_its_own_configuration_it_has_the_size_of_the_fields():
    """Of the public code for brain volumes, with one channel."""
    with torch.device("meta"):
        model = WGAN(num_channels=1, channel_names=("brain",))
    counts = [sum(p.numel() for p in network.parameters()) for network in (model.generator, model.critic)]
    assert counts == [37_449_280, 11_049_665]


def test_losses_are_the_wasserstein_distance():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([0.0, -1.0])
    assert critic_loss(real, fake).item() == pytest.approx(-2.5)
    assert generator_loss(fake).item() == pytest.approx(0.5)


class Linear(nn.Module):
    """f(x) = slope · Σ x, whose gradient has the norm slope · √n everywhere."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, volumes):
        return self.slope * volumes.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("shape", [(3, 2, 4, 4, 4), (3, 16)])
def test_the_penalty_of_a_linear_critic(shape):
    critic = Linear(0.5)
    penalty = gradient_penalty(critic, torch.randn(shape), torch.randn(shape), torch.rand(3))
    norm = 0.5 * torch.tensor(shape[1:]).prod().sqrt().item()
    assert penalty.item() == pytest.approx((norm - 1) ** 2, rel=1e-5)
    penalty.backward()
    assert critic.slope.grad.item() == pytest.approx(2 * (norm - 1) * norm / 0.5, rel=1e-5)


def test_the_penalty_is_taken_between_the_samples():
    seen = []

    def critic(mixed):
        seen.append(mixed.detach())
        return mixed.flatten(1).sum(1, keepdim=True)

    real, fake = torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    gradient_penalty(critic, real, fake, torch.tensor([0.25, 1.0]))
    assert torch.equal(seen[0].flatten(1)[:, 0], torch.tensor([0.25, 1.0]))


def test_the_penalty_is_computed_in_float32():
    critic = WGAN(sample_size=16, latent_dim=8, base_channels=4).critic
    real, fake, shares = torch.randn(2, 2, 16, 16, 16), torch.randn(2, 2, 16, 16, 16), torch.rand(2)
    expected = gradient_penalty(critic, real, fake, shares)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient_penalty(critic, real, fake, shares), expected)


def test_clipping_brings_all_weights_into_their_range():
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    clip_weights(network, 0.1)
    assert torch.equal(network.weight, before.clamp(-0.1, 0.1)) and not torch.equal(network.weight, before)
