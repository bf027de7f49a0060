"""What surrounds a step, around the smallest network."""

import dataclasses
import itertools
import signal
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_byoc.training import CheckpointError, Stage, StageSettings, hardware, list_checkpoints
from diffusers_byoc.training import stage as stage_module
from diffusers_byoc.training.optimizers import make_optimizer
from diffusers_byoc.training.settings import MAY_CHANGE, configuration
from diffusers_byoc.training.stages.autoencoder import AutoencoderSettings
from diffusers_byoc.training.stages.diffusion import DiffusionSettings


pytestmark = pytest.mark.usefixtures("fresh_state")


@pytest.fixture
def run(tmp_path, fresh_state):
    """Fits a line, in a stage with these settings; returns the weights and rates after every step."""

    def run(*, name="line", inputs=None, on_step=lambda step: None, **settings):
        fresh_state()
        defaults = {"max_train_steps": 4, "mixed_precision": "no", "num_cpu_threads": 1, "checkpointing_steps": 2}
        settings = StageSettings(**(defaults | {"learning_rate": 0.1} | settings))
        history = []
        with Stage(tmp_path, name, settings, inputs or {}) as stage:
            model = torch.nn.Linear(3, 1)
            optimizer, lr_scheduler = make_optimizer(settings, model.parameters(), settings.max_train_steps)
            model, optimizer = stage.accelerator.prepare(model, optimizer)
            stage.resume(lr_scheduler, inputs={"network": "line"})
            accumulation = settings.gradient_accumulation_steps
            batches = range(stage.first_step * accumulation, settings.max_train_steps * accumulation)
            for step, batch in stage.steps(batches):
                with stage.accelerator.accumulate(model):
                    assert batch == stage.micro_step
                    loss = model(torch.randn(5, 3, generator=stage.generator("data"))).square().mean()
                    stage.apply(loss, model, optimizer, lr_scheduler)
                if stage.is_accumulating:
                    continue
                stage.log({"loss": loss}, {"lr": lr_scheduler.get_last_lr()[0]})
                rate = optimizer.param_groups[0]["lr"]
                history.append((step, model.weight.detach().flatten().tolist(), rate, stage.is_validating))
                on_step(step)
        return history

    return run


def test_steps_logs_and_checkpoints(run, tmp_path):
    history = run(gradient_accumulation_steps=3, validation_steps=3)
    assert [step for step, *_ in history] == [1, 2, 3, 4]
    assert [step for step, *_, is_validating in history if is_validating] == [3, 4]
    assert [path.name for path in list_checkpoints(tmp_path / "line")] == ["checkpoint-2", "checkpoint-4"]
    events = EventAccumulator(str(tmp_path / "logs" / "line")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert events.Scalars("lr")[-1].value == pytest.approx(0.1)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}])
def test_a_resumed_stage_goes_on_as_the_unbroken_one(run, settings):
    unbroken = run(**settings)
    resumed = run(resume_from_checkpoint="checkpoint-2", **settings)
    assert resumed == unbroken[2:]


def test_two_stages_of_a_run_keep_apart(run, tmp_path):
    first = run()
    assert run(name="other", resume_from_checkpoint="latest") == first
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"line", "other"}


def test_a_constant_rate_is_extended_to_the_run_that_asked_for_more(run, tmp_path):
    run()
    extended = run(max_train_steps=6, resume_from_checkpoint="latest")
    assert [step for step, *_ in extended] == [5, 6]
    assert extended == run(max_train_steps=6)[4:]


def test_a_longer_schedule_takes_over_at_its_step(run):
    """The rate of step n is what the schedule of the longer run says, from the first step on."""
    run(lr_scheduler="linear")
    extended = run(lr_scheduler="linear", max_train_steps=8, resume_from_checkpoint="latest")
    assert [rate for *_, rate, _ in extended] == pytest.approx([0.1 * (1 - n / 8) for n in (5, 6, 7, 8)])


def test_the_first_step_of_an_extended_schedule_has_its_rate(run):
    before = run(lr_scheduler="linear")[-1][1]
    after = run(lr_scheduler="linear", max_train_steps=8, resume_from_checkpoint="latest")[0][1]
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) > 0.01  # Adam's steps are about the rate, 0.05


def test_fewer_steps_than_were_made_are_refused(run):
    run()
    with pytest.raises(CheckpointError, match="checkpoint-4 has made, got 3. Give more --max_train_steps"):
        run(max_train_steps=3, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"learning_rate": 0.2}, "learning_rate"), ({"train_batch_size": 3}, "train_batch_size"), ({"seed": 1}, "seed")],
)
def test_what_decides_a_run_may_not_change(run, changed, name):
    run()
    with pytest.raises(CheckpointError, match=rf"Expected {name} .*checkpoint-4 was made, got"):
        run(resume_from_checkpoint="latest", **changed)


def test_inputs_may_not_change(run):
    run(inputs={"data": "a"})
    with pytest.raises(CheckpointError, match="Expected data 'a', with which"):
        run(inputs={"data": "b"}, resume_from_checkpoint="latest")


def test_what_may_change_are_settings():
    names = {field.name for cls in (AutoencoderSettings, DiffusionSettings) for field in dataclasses.fields(cls)}
    assert MAY_CHANGE < names


def test_the_batch_that_decides_is_that_of_all_processes():
    one, two = (StageSettings(max_train_steps=1, train_batch_size=size) for size in (4, 2))
    assert one.decisive(1) == two.decisive(2) != two.decisive(1)


def test_what_a_resumed_run_finds_itself_is_no_input():
    config = {"latents_mean": [1.0], "_name_or_path": "here", "act_fn": "silu"}
    assert configuration("vqvae", config) == {"vqvae.act_fn": "silu"}


def test_beginning_anew_beside_old_checkpoints_is_said(run, capsys):
    run()
    assert "earlier run" not in capsys.readouterr().out
    run()
    assert "add --resume_from_checkpoint latest" in capsys.readouterr().out
    run(name="other", resume_from_checkpoint="latest")
    assert "starting a new run" in capsys.readouterr().out


def test_sigterm_ends_the_stage_after_its_step(run, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(on_step=lambda step: signal.raise_signal(signal.SIGTERM) if step == 1 else None)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert [path.name for path in list_checkpoints(tmp_path / "line")] == ["checkpoint-1"]
    assert "checkpoint-1; go on with --resume_from_checkpoint latest" in capsys.readouterr().err


def test_an_error_gives_back_sigterm(run):
    handler = signal.getsignal(signal.SIGTERM)

    def fail(step):
        raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        run(on_step=fail)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_stage_ends_when_its_time_is_up(run, tmp_path, monkeypatch):
    """Four steps of 20 seconds fit into a minute and 20 seconds; its checkpoint is that of an end."""
    clock = itertools.count()
    monkeypatch.setattr(stage_module, "time", SimpleNamespace(perf_counter=lambda: 20.0 * next(clock)))
    unbroken = run(max_train_steps=9, checkpointing_steps=100, max_train_minutes=79 / 60)
    assert [step for step, *_ in unbroken] == [1, 2, 3, 4]
    assert [path.name for path in list_checkpoints(tmp_path / "line")] == ["checkpoint-4"]

    # what went before counts, and a run whose time was up before does nothing
    assert run(max_train_steps=9, max_train_minutes=1, resume_from_checkpoint="latest") == []
    more = run(max_train_steps=9, checkpointing_steps=100, max_train_minutes=2, resume_from_checkpoint="latest")
    assert [step for step, *_ in more] == [5, 6]


def test_minutes_of_the_processor_are_no_minutes_of_the_clock(run, monkeypatch):
    """Twenty seconds a step on each of two threads, while the clock stands still."""
    clock = itertools.count()
    monkeypatch.setattr(stage_module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(hardware, "time", SimpleNamespace(process_time=lambda: 40.0 * next(clock)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(stage_module, "is_cpu_training", lambda: True)
    limit = {"max_train_steps": 9, "checkpointing_steps": 100, "max_train_minutes": 79 / 60}
    assert [step for step, *_ in run(**limit, minutes_of="processor")] == [1, 2, 3, 4]
    assert len(run(**limit, minutes_of="clock")) == 9
    monkeypatch.setattr(stage_module, "is_cpu_training", lambda: False)
    assert len(run(**limit, minutes_of="processor")) == 9  # its threads hardly work


def test_without_ddp_the_gradients_of_the_processes_are_averaged(tmp_path, fresh_state, monkeypatch):
    stage, *_ = linear_stage(tmp_path)
    model = torch.nn.Linear(2, 1, bias=False)
    model, optimizer = stage.prepare_adversaries(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert type(model) is torch.nn.Linear and stage.accelerator._models[-1] is model
    before = model.weight.detach().clone()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    monkeypatch.setattr(type(stage.accelerator), "num_processes", 2)
    # as if the other process had three times this one's gradient
    monkeypatch.setattr(stage.accelerator, "reduce", lambda gradient, reduction: (gradient + 3 * gradient) / 2)
    stage.apply(model(torch.tensor([0.3, 0.4])).sum(), model, optimizer, schedule)
    assert torch.allclose(before - model.weight, 2 * torch.tensor([[0.3, 0.4]]))


def test_the_scaler_of_fp16_leaves_what_other_optimizers_accumulate(tmp_path, fresh_state, monkeypatch):
    """Two networks, two micro-steps each: a step is the mean of both gradients."""
    stage, *_ = linear_stage(tmp_path, gradient_accumulation_steps=2)
    accelerator = stage.accelerator
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**7), True
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    networks = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    optimizers = [torch.optim.SGD(network.parameters(), lr=1.0) for network in networks]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) for optimizer in optimizers]
    optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
    before = [network.weight.detach().clone() for network in networks]
    for number in (0.1, 0.3):
        with accelerator.accumulate(*networks):
            for network, optimizer, schedule in zip(networks, optimizers, schedules, strict=True):
                stage.apply(network(torch.tensor([number, 0.4])).sum(), network, optimizer, schedule)
    for network, weight in zip(networks, before, strict=True):
        torch.testing.assert_close(weight - network.weight, torch.tensor([[0.2, 0.4]]))


def linear_stage(tmp_path, **settings):
    settings = StageSettings(max_train_steps=1, mixed_precision="no", num_cpu_threads=1, **settings)
    stage = Stage(tmp_path, "line", settings).__enter__()
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return stage, *stage.accelerator.prepare(model, optimizer), schedule


@pytest.mark.parametrize(("max_grad_norm", "change"), [(2.0, 2.0), (20.0, 5.0), (0.0, 5.0)])
def test_the_gradient_is_clipped_to_its_largest_norm(tmp_path, max_grad_norm, change):
    stage, model, optimizer, schedule = linear_stage(tmp_path, max_grad_norm=max_grad_norm)
    before = model.weight.detach().clone()
    loss = model(torch.tensor([3.0, 4.0])).sum()  # a gradient of norm 5
    stage.apply(loss, model, optimizer, schedule)
    assert (model.weight - before).norm().item() == pytest.approx(change, rel=1e-5)
    assert model.weight.grad is None and schedule.last_epoch == 1


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_number_that_is_not_finite_leaves_the_weights(tmp_path, number, broken):
    stage, model, optimizer, schedule = linear_stage(tmp_path)
    stage.step, before = 3, model.weight.detach().clone()
    out = model(torch.tensor([3.0, 4.0])).sum()
    loss = out * float(number) if broken == "loss" else out + (out - out.detach()).abs().sqrt()  # of infinite slope
    with pytest.raises(FloatingPointError, match=f"Expected a finite {broken} at step 3, got .*those of step 2") as e:
        stage.apply(loss, model, optimizer, schedule)
    assert str(tmp_path / "line") in str(e.value) and torch.equal(model.weight, before)


def test_large_numbers_are_numbers(tmp_path):
    stage, model, optimizer, schedule = linear_stage(tmp_path)
    stage.apply(model(torch.zeros(2)).sum() - 1e38, model, optimizer, schedule)


def test_losses_come_back_as_numbers(tmp_path):
    stage, *_ = linear_stage(tmp_path)
    losses = {"a": torch.tensor(0.5, requires_grad=True), "b": torch.tensor(-2.0)}
    assert stage.log(losses, {"c": 3.0}) == {"a": 0.5, "b": -2.0, "c": 3.0}
