"""What is noted of a job's commands."""

import json
from pathlib import Path

import pytest
import torch

from diffusers_byoc import WGAN, BaselinePipeline, BYOCPipeline
from diffusers_byoc.commands.reproduction import running
from diffusers_byoc.commands.reproduction.plan import Command, Job
from diffusers_byoc.commands.reproduction.running import (
    count_parameters,
    measure_speed,
    run_commands,
    training_effort,
)


TRAINING, EVALUATION = Command("byoc-train", {}), Command("byoc-evaluate", {"num_samples": 10})


@pytest.fixture
def w_gan(tmp_path):
    BaselinePipeline(WGAN(sample_size=32, latent_dim=8, base_channels=4)).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_a_rate_that_leaves_the_finite_numbers_has_no_score(tmp_path, monkeypatch):
    def diverges(argv):
        raise FloatingPointError("Expected a finite loss at step 3, got nan.")

    monkeypatch.setitem(running.MAINS, "byoc-train", diverges)
    monkeypatch.setitem(running.MAINS, "byoc-evaluate", None)
    commands = [(TRAINING, {"output_dir": tmp_path}), (EVALUATION, {"output_dir": tmp_path})]
    tune = Job("tune", "tune/byoc/3", "nocodazole", "byoc", (TRAINING, EVALUATION), criterion="morphology/frechet")
    assert run_commands(tune, commands) == {"score": None, "reason": "Expected a finite loss at step 3, got nan."}
    with pytest.raises(FloatingPointError):
        run_commands(Job("train", "train/a/byoc/all", "a", "byoc", (TRAINING,)), commands[:1])


def test_the_score_is_the_criterion_of_generated_cells(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(running.MAINS, "byoc-train", calls.append)
    monkeypatch.setitem(running.MAINS, "byoc-evaluate", calls.append)
    monkeypatch.setattr(running, "training_effort", lambda run: {"run": run.name})
    summary = {"generated": {"morphology/frechet": {"mean": 7.0}}, "real": {"morphology/frechet": {"mean": 1.0}}}
    (tmp_path / "metrics.json").write_text(json.dumps({"summary": summary}))
    tune = Job("tune", "tune/byoc/3", "nocodazole", "byoc", (TRAINING, EVALUATION), criterion="morphology/frechet")
    found = run_commands(tune, [(TRAINING, {"output_dir": "run"}), (EVALUATION, {"output_dir": tmp_path})])
    assert found == {"effort": {"run": "run"}, "score": 7.0}
    assert calls == [["--output_dir", "run"], ["--num_samples", "10", "--output_dir", str(tmp_path)]]


def test_effort_is_read_from_the_last_checkpoints_in_the_order_of_the_stages(tmp_path):
    (tmp_path / "arguments.json").write_text(json.dumps({"texture": {}, "diffusion": {}}))
    for stage, step in (("diffusion", 5), ("diffusion", 30), ("texture", 8)):
        folder = tmp_path / stage / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        record = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "seconds": 9.0, "learning_rate": 0.1}
        (folder / "settings.json").write_text(json.dumps(record | {"seed": 0}))
    effort = training_effort(tmp_path)
    assert list(effort) == ["texture", "diffusion"]
    assert effort["diffusion"] == {"steps": 30, "samples": 240, "seconds": 9.0, "learning_rate": 0.1}


def test_a_gan_is_as_large_as_its_generator(w_gan):
    pipeline = BaselinePipeline.from_pretrained(w_gan)
    generator = sum(parameter.numel() for parameter in pipeline.model.generator.parameters())
    assert count_parameters(pipeline) == generator < sum(p.numel() for p in pipeline.model.parameters())
    ours = BYOCPipeline.from_pretrained(Path(__file__).parents[2] / "pipelines" / "saved" / "plain")
    assert count_parameters(ours) == sum(p.numel() for part in (ours.vqvae, ours.unet) for p in part.parameters())


def test_speed_is_that_of_a_batch(w_gan, monkeypatch):
    batches = []
    call = BaselinePipeline.__call__

    def noted(pipeline, num_samples, **arguments):
        batches.append(num_samples)
        return call(pipeline, num_samples, **arguments)

    monkeypatch.setattr(BaselinePipeline, "__call__", noted)
    speed = measure_speed(EVALUATION, {"pretrained": w_gan, "output_dir": "unused"})
    assert batches == [10, 10] and speed["batch_size"] == 10 and 0 < speed["seconds_per_cell"] < 60
    assert f"{torch.get_num_threads()} thread" in speed["device"] or torch.cuda.is_available()
