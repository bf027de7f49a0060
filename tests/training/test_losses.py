import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_byoc.models import PatchDiscriminator3D
from diffusers_byoc.training import (
    adaptive_weight,
    adversarial_loss,
    adversarial_surrogate,
    diffusion_loss,
    discriminator_loss,
    draw_channel_timesteps,
    drop_conditions,
    reconstruction_loss,
)


SHAPE = (4, 6, 2, 3, 5)


class FixedUNet(nn.Module):
    """Predicts what it was given, and remembers what it saw."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.seen = sample, timestep, class_labels
        return (self.prediction,)


def make_batch(prediction_type="epsilon"):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    return scheduler, torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 250, 700, 999])


def alphas(scheduler, timesteps):
    """sqrt(ᾱ) and sqrt(1 - ᾱ) of eq. 9, from the schedule's β."""
    cumulative = torch.cumprod(1 - scheduler.betas, 0)[timesteps].view(-1, 1, 1, 1, 1)
    return cumulative.sqrt(), (1 - cumulative).sqrt()


def test_reconstruction_of_a_shifted_copy_is_the_squared_shift():
    volumes = torch.rand(2, 2, 4, 4, 4)
    assert reconstruction_loss(volumes, volumes) == 0
    assert reconstruction_loss(volumes + 0.5, volumes).item() == pytest.approx(0.25)


def test_reconstruction_weighs_channels_equally():
    volumes = torch.zeros(1, 2, 2, 2, 2)
    errors = [torch.zeros_like(volumes) for _ in range(2)]
    for channel, error in enumerate(errors):
        error[:, channel] = 1.0
    assert [reconstruction_loss(error, volumes).item() for error in errors] == [0.5, 0.5]


def test_reconstruction_is_computed_in_float32():
    # 1 + 2^-8 and the square of 2^-8 are lost in bfloat16, not in float32
    volumes = torch.ones(1, 2, 2, 2, 2)
    assert reconstruction_loss(volumes.bfloat16(), volumes + 2**-8).item() == pytest.approx(2**-16)


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [(1.0, -1.0, 0.0), (3.0, -2.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 1.0, 2.0), (0.5, -1.0, 0.25), (1.0, -0.5, 0.25)],
)
def test_hinge_of_the_discriminator(real, fake, expected):
    loss = discriminator_loss(torch.full((2, 1, 2, 2, 2), real), torch.full((2, 1, 2, 2, 2), fake))
    assert loss.item() == pytest.approx(expected)


def test_discriminator_learns_to_call_reconstructions_false():
    """Eq. 8 as printed, ReLU(1 - D(x̂)), has the other sign for the second term."""
    real, fake = torch.zeros(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    discriminator_loss(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()  # descent raises D(x) and lowers D(x̂)


def test_generator_wants_what_the_discriminator_does_not():
    fake = torch.randn(8, requires_grad=True)
    loss = adversarial_loss(fake)
    loss.backward()
    assert loss.item() == pytest.approx(-fake.mean().item())
    torch.testing.assert_close(fake.grad, torch.full((8,), -1 / 8))


def test_surrogate_gives_everyone_the_gradients_of_their_own_losses():
    """As if the discriminator had been asked twice: by the autoencoder, frozen, and for its own loss."""
    torch.manual_seed(0)
    autoencoder, discriminator = nn.Conv3d(2, 2, 3, padding=1), PatchDiscriminator3D(2, (4, 8))
    volumes = torch.randn(2, 2, 16, 16, 16)
    networks = (autoencoder, discriminator)

    reconstruction = autoencoder(volumes)
    adversarial = adversarial_loss(discriminator(reconstruction))
    expected = list(torch.autograd.grad(adversarial, autoencoder.parameters()))
    loss = discriminator_loss(discriminator(volumes), discriminator(reconstruction.detach()))
    expected += torch.autograd.grad(loss, discriminator.parameters())

    reconstruction = autoencoder(volumes)
    with FlopCounterMode(display=False):  # whose hooks take no leaf
        surrogate, fake_logits = adversarial_surrogate(reconstruction, discriminator)
    assert all(p.grad is None for m in networks for p in m.parameters())
    surrogate.backward()
    assert all(p.grad is None for p in discriminator.parameters())
    discriminator_loss(discriminator(volumes), fake_logits).backward()
    for parameter, grad in zip((p for m in networks for p in m.parameters()), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_surrogate_keeps_gradients_too_small_for_half_precision():
    reconstruction = torch.zeros(4096, requires_grad=True)
    # the mean's gradient, 2.4e-8, is below float16's smallest number
    surrogate, _ = adversarial_surrogate(reconstruction, lambda fake: (fake.half() * 1e-4).repeat(16))
    surrogate.backward()
    torch.testing.assert_close(reconstruction.grad, torch.full((4096,), -1e-4 / 4096), rtol=1e-3, atol=0)


def test_adaptive_weight_is_the_ratio_of_the_gradients_norms():
    weight = nn.Parameter(torch.zeros(2))
    reconstruction = (weight * torch.tensor([3.0, 4.0])).sum()  # gradient of norm 5
    adversarial = (weight * torch.tensor([0.0, -2.0])).sum()  # gradient of norm 2
    assert adaptive_weight(reconstruction, adversarial, weight).item() == pytest.approx(2.5, rel=1e-5)


def test_adaptive_weight_leaves_gradients_and_graph_alone():
    weight = nn.Parameter(torch.ones(3))
    reconstruction, adversarial = weight.square().sum(), weight.sum()
    factor = adaptive_weight(reconstruction, adversarial, weight)
    assert not factor.requires_grad and weight.grad is None
    (reconstruction + factor * adversarial).backward()  # the graph is still there
    torch.testing.assert_close(weight.grad, 2.0 + factor.expand(3))


def test_adaptive_weight_sees_gradients_that_fp16_cannot_hold():
    """Those of means over a batch of voxels, going back through a layer that computes in fp16."""
    layer = nn.Parameter(torch.tensor(0.5))
    voxels = (layer.half() * torch.linspace(0.1, 1, 100).half()).float()
    reconstruction, adversarial = voxels.square().sum() * 1e-8, voxels.sum() * 1e-7
    exact = 1e-8 * (torch.linspace(0.1, 1, 100) ** 2).sum() / (1e-7 * torch.linspace(0.1, 1, 100).sum() + 1e-6)
    torch.testing.assert_close(adaptive_weight(reconstruction, adversarial, layer), exact, rtol=0.02, atol=0)


def test_adaptive_weight_is_bounded_where_the_adversary_is_silent():
    weight = nn.Parameter(torch.ones(3))
    assert adaptive_weight(weight.sum() * 1e3, weight.sum() * 0, weight) == 1e4
    assert adaptive_weight(weight.sum() * 0, weight.sum(), weight) == 0


def test_noisy_latents_follow_equation_9():
    scheduler, latents, noise, timesteps = make_batch()
    unet = FixedUNet(noise)
    diffusion_loss(unet, scheduler, latents, noise, timesteps, class_labels := torch.arange(4))
    signal, spread = alphas(scheduler, timesteps)
    torch.testing.assert_close(unet.seen[0], signal * latents + spread * noise)
    assert unet.seen[1] is timesteps and unet.seen[2] is class_labels


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_right_predictions_have_no_loss(prediction_type):
    scheduler, latents, noise, timesteps = make_batch(prediction_type)
    signal, spread = alphas(scheduler, timesteps)
    target = {"epsilon": noise, "v_prediction": signal * noise - spread * latents, "sample": latents}[prediction_type]
    for loss_type in ("l1", "l2"):
        loss = diffusion_loss(FixedUNet(target), scheduler, latents, noise, timesteps, loss_type=loss_type)
        assert loss.item() == pytest.approx(0, abs=1e-6)
        off_by_three = FixedUNet(target + 3)
        loss = diffusion_loss(off_by_three, scheduler, latents, noise, timesteps, loss_type=loss_type)
        assert loss.item() == pytest.approx({"l1": 3, "l2": 9}[loss_type], rel=1e-5)


def test_the_default_is_the_papers_l1():
    scheduler, latents, noise, timesteps = make_batch()
    loss = diffusion_loss(FixedUNet(torch.zeros(SHAPE)), scheduler, latents, noise, timesteps)
    assert loss.item() == pytest.approx(noise.abs().mean().item())


def test_a_prediction_in_half_precision_is_compared_in_float32():
    scheduler, latents, noise, timesteps = make_batch()
    loss = diffusion_loss(FixedUNet(torch.zeros(SHAPE).bfloat16()), scheduler, latents, noise, timesteps)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(noise.abs().mean().item())


def test_unknown_choices_are_named():
    scheduler, latents, noise, timesteps = make_batch()
    with pytest.raises(ValueError, match="'l1' or 'l2', got 'huber'"):
        diffusion_loss(FixedUNet(noise), scheduler, latents, noise, timesteps, loss_type="huber")
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="got 'flow'"):
        diffusion_loss(FixedUNet(noise), scheduler, latents, noise, timesteps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_gives_the_clean_sample_the_weight_min_of_snr_and_gamma(prediction_type):
    """The network's error, turned into that of the sample it implies, has the same weight whatever it predicts."""
    scheduler, latents, noise, timesteps = make_batch(prediction_type)
    signal, spread = alphas(scheduler, timesteps)
    target = {"epsilon": noise, "v_prediction": signal * noise - spread * latents, "sample": latents}[prediction_type]
    wrong = torch.randn(SHAPE)
    # x = (noisy - spread * noise) / signal = signal * noisy - spread * v
    slope = {"epsilon": spread / signal, "v_prediction": spread, "sample": torch.ones_like(spread)}[prediction_type]
    snr = (signal / spread).square().flatten()
    expected = (snr.clamp(max=5) * (wrong * slope).square().flatten(1).mean(1)).mean()
    loss = diffusion_loss(
        FixedUNet(target + wrong), scheduler, latents, noise, timesteps, loss_type="l2", snr_gamma=5.0
    )
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_conditions_are_dropped_together_and_each_alone():
    labels, vectors, chances = torch.arange(5) % 3, torch.ones(5, 2), torch.tensor([0.05, 0.15, 0.25, 0.35, 0.95])
    weights, dropped = drop_conditions(labels, vectors, 3, chances, 0.1)
    has_class, has_vector = weights.sum(1).bool(), dropped.isfinite().all(1)
    assert has_class.tolist() == [False, False, True, True, True]
    assert has_vector.tolist() == [False, True, False, True, True]
    assert weights[has_class].argmax(1).tolist() == labels[has_class].tolist()
    assert torch.equal(dropped[has_vector], vectors[has_vector]) and dropped[~has_vector].isnan().all()


def test_one_kind_of_condition_is_dropped_for_its_share():
    chances = torch.tensor([0.05, 0.15, 0.25])
    weights, nothing = drop_conditions(torch.tensor([1, 1, 0]), None, 2, chances, 0.1)
    assert weights.tolist() == [[0, 0], [0, 1], [1, 0]] and nothing is None
    nothing, dropped = drop_conditions(None, torch.ones(3, 1), None, chances, 0.1)
    assert dropped.isnan().flatten().tolist() == [True, False, False] and nothing is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_channels_apart_have_the_losses_of_their_timesteps_and_none_where_they_are_clean(prediction_type, snr_gamma):
    scheduler, latents, noise, timesteps = make_batch(prediction_type)
    unet = FixedUNet(torch.randn(SHAPE))
    options = {"loss_type": "l2", "snr_gamma": snr_gamma}
    other = timesteps.flip(0)
    alone = [
        diffusion_loss(
            FixedUNet(unet.prediction[:, part]), scheduler, latents[:, part], noise[:, part], times, **options
        )
        for part, times in ((slice(0, 3), timesteps), (slice(3, 6), other))
    ]
    times = torch.stack([timesteps, other], 1)
    loss = diffusion_loss(unet, scheduler, latents, noise, times, **options)
    torch.testing.assert_close(loss, (alone[0] + alone[1]) / 2)
    assert unet.seen[1] is times
    loss = diffusion_loss(
        unet, scheduler, latents, noise, torch.stack([timesteps, torch.full_like(other, -1)], 1), **options
    )
    torch.testing.assert_close(loss, alone[0] / 2)
    assert torch.equal(unet.seen[0][:, 3:], latents[:, 3:])


def test_channels_go_apart_for_their_share():
    timesteps, generator = torch.randint(1, 900, (4000,)), torch.Generator().manual_seed(0)
    drawn = draw_channel_timesteps(timesteps, torch.rand(4000, 5, generator=generator), 0.4, 999)
    is_with = drawn == timesteps[:, None]
    assert is_with.any(1).all() and set(drawn[~is_with].tolist()) == {-1, 999}
    # of the share, two of three channels may go: a quarter to noise, half to clean
    assert (drawn == -1).float().mean(0).tolist() == pytest.approx([0.4 * 2 / 3 / 2] * 3, abs=0.02)
    assert (drawn == 999).float().mean(0).tolist() == pytest.approx([0.4 * 2 / 3 / 4] * 3, abs=0.02)
    assert is_with.all(1).float().mean().item() == pytest.approx(0.6 + 0.4 / 16, abs=0.02)
