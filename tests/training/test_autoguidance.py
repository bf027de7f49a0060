import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffusers_byoc.training import diffusion_loss
from diffusers_byoc.training.autoguidance import Autoguidance


class Constant(nn.Module):
    """Predicts one number everywhere."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = nn.Parameter(torch.tensor(prediction))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.seen = timestep, class_labels
        return (self.prediction.expand_as(sample),)


def test_a_prediction_moves_away_from_the_weaker_one_on_a_part_of_the_way():
    guided = Autoguidance(Constant(1.0), Constant(0.75), scale=3.0, start=0.4, stop=0.9)
    timesteps = torch.tensor([999, 600, 599, 300, 100, 99, 0])  # 0, just before 0.4, 0.4, ... of the way
    correction = guided.correction(torch.zeros(7, 4, 2, 2, 2), timesteps, 1000)
    assert correction[:, 0, 0, 0, 0].tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0]
    assert (correction == correction[:, :1, :1, :1, :1]).all()


def test_each_channel_is_moved_at_its_own_timestep():
    guided = Autoguidance(Constant(1.0), Constant(0.5), scale=2.0, start=0.4, stop=0.9)
    timesteps = torch.tensor([[500, 999], [-1, 500]])  # left out; given
    correction = guided.correction(torch.zeros(2, 6, 2, 2, 2), timesteps, 1000)
    assert correction[:, :, 0, 0, 0].tolist() == [[0.5, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_least_at_the_target_and_the_correction(prediction_type):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    latents, noise = torch.randn(2, 4, 2, 2, 2), torch.randn(2, 4, 2, 2, 2)
    timesteps, labels = torch.tensor([400, 700]), torch.tensor([1, 0])
    target = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(latents, noise, timesteps),
        "sample": latents,
    }[prediction_type]
    guided = Autoguidance(Constant(1.0), Constant(0.75), scale=2.0)

    class Exact(nn.Module):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            return (target + 0.25,)

    arguments = (scheduler, latents, noise, timesteps, labels, "l2")
    assert diffusion_loss(Exact(), *arguments, autoguidance=guided) < 1e-12
    assert diffusion_loss(Exact(), *arguments) == pytest.approx(1 / 16)
    assert guided.weak_unet.seen[0] is timesteps and guided.weak_unet.seen[1] is labels


def test_only_the_student_learns():
    guided = Autoguidance(Constant(1.0), Constant(0.75))
    guided.to(torch.device("cpu"))
    student = Constant(0.0)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    loss = diffusion_loss(
        student,
        scheduler,
        torch.randn(1, 2, 2, 2, 2),
        torch.randn(1, 2, 2, 2, 2),
        torch.tensor([300]),
        autoguidance=guided,
    )
    loss.backward()
    assert student.prediction.grad is not None
    assert not guided.unet.prediction.requires_grad and not guided.weak_unet.prediction.requires_grad
