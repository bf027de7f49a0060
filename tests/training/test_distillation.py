import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_byoc import DualChannelUNet3D
from diffusers_byoc.training.distillation import ddim_step, distillation_loss, noise_level


SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "trailing"}


def make_scheduler(prediction_type, scheduler_class=DDPMScheduler):
    return scheduler_class(**SCHEDULE, prediction_type=prediction_type)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Constant(torch.nn.Module):
    """Predicts the same for any latents: a parameter."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = torch.nn.Parameter(prediction)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return (self.prediction,)


class OneCell(torch.nn.Module):
    """Knows one cell: the exact prediction for data that are nothing else. Its paths to it are straight."""

    def __init__(self, scheduler, cell):
        super().__init__()
        self.scheduler, self.cell = scheduler, cell

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        if self.scheduler.config.prediction_type == "sample":
            return (self.cell.expand_as(sample),)
        alpha, sigma = noise_level(self.scheduler, timestep)
        return (alpha * (sample - alpha * self.cell) / sigma - sigma * self.cell,)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("num_substeps", [1, 2, 5])
def test_a_teacher_with_straight_paths_has_nothing_to_teach(prediction_type, num_substeps):
    scheduler = make_scheduler(prediction_type)
    cell = draw(1, 4, 4, 4, 4)
    teacher = OneCell(scheduler, cell)
    arguments = (scheduler, cell.expand(4, -1, -1, -1, -1), draw(4, 4, 4, 4, 4, seed=1))
    timesteps = torch.tensor([249, 499, 749, 999])
    assert distillation_loss(teacher, teacher, *arguments, timesteps, 250, num_substeps) < 1e-6
    student = Constant(torch.zeros(4, 4, 4, 4, 4))
    assert distillation_loss(student, teacher, *arguments, timesteps, 250, num_substeps) > 0.1


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("start", [249, 999])
def test_the_target_is_where_diffusers_ddim_takes_the_teacher(prediction_type, start):
    """The loss is a square, so its gradient tells the target; a step with that ends where two of the teacher's do."""
    torch.manual_seed(0)
    teacher = DualChannelUNet3D(2, 2, 4, (8, 8), 1, attention_head_dim=4).eval()
    scheduler = make_scheduler(prediction_type)
    latents, noise = draw(2, 4, 4, 4, 4, seed=1), draw(2, 4, 4, 4, 4, seed=2)
    timesteps = torch.tensor([start, start])
    student = Constant(draw(2, 4, 4, 4, 4, seed=3))
    distillation_loss(student, teacher, scheduler, latents, noise, timesteps, 250, 2).backward()
    target = student.prediction.detach() - student.prediction.grad * latents.numel() / 2

    ddim = make_scheduler(prediction_type, DDIMScheduler)
    noisy = ddim.add_noise(latents, noise, timesteps)
    expected = noisy
    ddim.set_timesteps(8)
    with torch.no_grad():
        for timestep in (start, start - 125):
            prediction = teacher(expected, timestep).sample
            expected = ddim.step(prediction, timestep, expected).prev_sample
    torch.testing.assert_close(
        ddim_step(scheduler, target, timesteps, timesteps - 250, noisy), expected, atol=1e-3, rtol=1e-3
    )
    ddim.set_timesteps(4)
    torch.testing.assert_close(ddim.step(target, start, noisy).prev_sample, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("place", [-1, 999])
def test_a_channel_that_is_given_or_left_out_stays_where_it_is(channel, place):
    """And has no error; the other one goes the teacher's steps."""
    scheduler, cell = make_scheduler("v_prediction"), draw(1, 4, 4, 4, 4)
    latents, noise = cell.expand(3, -1, -1, -1, -1), draw(3, 4, 4, 4, 4, seed=1)
    timesteps, seen = torch.tensor([249, 499, 749]), []
    channel_timesteps = timesteps[:, None].repeat(1, 2)
    channel_timesteps[:, channel] = place
    given, other = (slice(0, 2), slice(2, 4)) if channel == 0 else (slice(2, 4), slice(0, 2))

    class Seen(OneCell):
        def forward(self, sample, timestep, return_dict=True):
            seen.append((sample, timestep))
            return super().forward(sample, timestep[:, 1 - channel], return_dict=return_dict)

    teacher = Seen(scheduler, cell)
    arguments = (scheduler, latents, noise, timesteps, 250, 2, None, None, channel_timesteps)
    assert distillation_loss(teacher, teacher, *arguments) < 1e-6
    for sample, times in seen:
        assert times[:, channel].tolist() == 3 * [place]
        assert torch.equal(sample[:, given], seen[0][0][:, given])
    assert torch.equal(seen[0][0][:, given], latents[:, given]) == (place == -1)
    assert [times[:, 1 - channel].tolist() for _, times in seen] == [
        timesteps.tolist(),
        (timesteps - 125).tolist(),
        timesteps.tolist(),
    ]
    student = Constant(draw(3, 4, 4, 4, 4, seed=2))
    distillation_loss(student, teacher, *arguments).backward()
    assert not student.prediction.grad[:, given].any() and student.prediction.grad[:, other].all()


def test_a_teacher_of_noise_is_refused():
    scheduler, unet = make_scheduler("epsilon"), Constant(torch.zeros(1, 4, 4, 4, 4))
    latents = torch.zeros(1, 4, 4, 4, 4)
    with pytest.raises(ValueError, match="Expected prediction_type 'v_prediction' or 'sample' .*got 'epsilon'"):
        distillation_loss(unet, unet, scheduler, latents, latents, torch.tensor([999]), 250, 2)


def test_the_scheduler_may_lie_on_another_device_already():
    """Where diffusers' `add_noise` has put its numbers: on that of the latents, which stands for a GPU here."""
    scheduler, timesteps = make_scheduler("v_prediction"), torch.tensor([249, -1], device="meta")
    unet, latents = Constant(torch.zeros(2, 4, 4, 4, 4, device="meta")), torch.zeros(2, 4, 4, 4, 4, device="meta")
    loss = distillation_loss(unet, unet, scheduler, latents, latents, timesteps, 250, 2)
    assert scheduler.alphas_cumprod.device == loss.device == timesteps.device
