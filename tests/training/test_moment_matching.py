import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_byoc import DualChannelUNet3D
from diffusers_byoc.training.distillation import noise_level
from diffusers_byoc.training.moment_matching import ancestral_step, moment_matching_losses


def make_scheduler(prediction_type="v_prediction"):
    schedule = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "trailing"}
    return DDPMScheduler(**schedule, prediction_type=prediction_type)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Clean(torch.nn.Module):
    """A network that says of any latents which clean ones they are: a parameter."""

    def __init__(self, scheduler, clean):
        super().__init__()
        self.scheduler, self.clean, self.seen = scheduler, torch.nn.Parameter(clean), []

    def forward(self, sample, timestep, return_dict=True):
        self.seen.append((sample, timestep))
        if self.scheduler.config.prediction_type == "sample":
            return (self.clean.expand_as(sample),)
        alpha, sigma = noise_level(self.scheduler, timestep if timestep.ndim == 1 else timestep.amax(1))
        return ((alpha * sample - self.clean) / sigma,)


TIMES = torch.tensor([249, 499, 999]), torch.tensor([0, 300, 998])


def losses(unet, auxiliary, teacher, scheduler, channel_timesteps=None):
    latents, noise, step_noise = (draw(3, 4, 4, 4, 4, seed=seed) for seed in (1, 2, 3))
    arguments = (latents, noise, *TIMES, step_noise, None, None, channel_timesteps)
    return moment_matching_losses(unet, auxiliary, teacher, scheduler, *arguments)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_student_is_moved_to_where_data_have_more_than_it(prediction_type):
    scheduler = make_scheduler(prediction_type)
    student, auxiliary, teacher = (Clean(scheduler, draw(3, 4, 4, 4, 4, seed=seed)) for seed in (4, 5, 6))
    loss, auxiliary_loss = losses(student, auxiliary, teacher, scheduler)
    loss.backward()
    assert auxiliary.clean.grad is None and teacher.clean.grad is None
    alpha, sigma = noise_level(scheduler, TIMES[1])
    weight = (alpha / sigma).square().clamp(max=5) + 1
    expected = weight * (auxiliary.clean - teacher.clean) / student.clean.numel()
    torch.testing.assert_close(student.clean.grad, expected.detach(), atol=1e-5, rtol=1e-3)

    student.clean.grad = None
    auxiliary_loss.backward()
    assert student.clean.grad is None and teacher.clean.grad is None
    pull = weight * (2 * auxiliary.clean - student.clean - teacher.clean) * 2 / student.clean.numel()
    torch.testing.assert_close(auxiliary.clean.grad, pull.detach(), atol=1e-5, rtol=1e-3)


def test_where_all_agree_nothing_moves():
    scheduler = make_scheduler()
    torch.manual_seed(0)
    teacher = DualChannelUNet3D(2, 2, 4, (8, 8), 1, attention_head_dim=4).eval()
    loss, auxiliary_loss = losses(teacher, teacher, teacher, scheduler)
    loss.backward()
    assert auxiliary_loss > 0 and not any(parameter.grad.any() for parameter in teacher.parameters())


@pytest.mark.parametrize(("start", "stop"), [(999, 749), (749, 499), (249, -1)])
def test_a_step_is_that_of_diffusers_ddpm(start, stop):
    scheduler = make_scheduler("sample")
    scheduler.set_timesteps(4)
    latents, clean = draw(2, 4, 4, 4, 4, seed=1), draw(2, 4, 4, 4, 4, seed=2)
    expected = scheduler.step(clean, start, latents, generator=torch.Generator().manual_seed(3)).prev_sample
    times = (torch.tensor([time, time]) for time in (start, stop))
    stepped = ancestral_step(scheduler, clean, *times, latents, draw(2, 4, 4, 4, 4, seed=3))
    torch.testing.assert_close(stepped, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("place", [-1, 999])
def test_a_channel_that_is_given_or_left_out_stays_where_it_is(channel, place):
    scheduler = make_scheduler("sample")
    channel_timesteps = TIMES[0][:, None].repeat(1, 2)
    channel_timesteps[:, channel] = place
    student, auxiliary, teacher = (Clean(scheduler, draw(3, 4, 4, 4, 4, seed=seed)) for seed in (4, 5, 6))
    loss, auxiliary_loss = losses(student, auxiliary, teacher, scheduler, channel_timesteps)
    (loss + auxiliary_loss).backward()
    given, other = (slice(0, 2), slice(2, 4)) if channel == 0 else (slice(2, 4), slice(0, 2))
    (noisy, at), (stepped, at_stops) = student.seen[0], teacher.seen[0]
    is_apart = TIMES[0] != place  # the last sample's timestep is 999
    assert torch.equal(stepped[is_apart][:, given], noisy[is_apart][:, given])
    assert at_stops[is_apart][:, channel].tolist() == at[is_apart][:, channel].tolist()
    assert at_stops[:, 1 - channel].tolist() == TIMES[1].tolist()
    assert not torch.equal(stepped[:, other], noisy[:, other])
    for network in (student, auxiliary):
        assert not network.clean.grad[is_apart][:, given].any() and network.clean.grad[:, other].all()


def test_a_teacher_of_noise_is_refused():
    scheduler = make_scheduler("epsilon")
    unet = Clean(scheduler, torch.zeros(1, 4, 4, 4, 4))
    with pytest.raises(ValueError, match="Expected prediction_type 'v_prediction' or 'sample' .*got 'epsilon'"):
        losses(unet, unet, unet, scheduler)
