"""byoc-train-baseline: its arguments, and whole runs at tiny size."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_byoc import (
    HAGAN,
    WGAN,
    AlphaGAN,
    BaselinePipeline,
    MedicalDiffusionUNet3D,
    MedicalDiffusionVQModel,
)
from diffusers_byoc.commands import generate
from diffusers_byoc.commands.train_baseline import main
from diffusers_byoc.commands.train_baseline_arguments import BASELINES, parse_args
from diffusers_byoc.commands.train_baseline_run import GANS, STAGES, make_model, make_unet, settings_of
from diffusers_byoc.commands.training_arguments import PRESETS
from diffusers_byoc.data import read_volume
from diffusers_byoc.training import StageSettings
from diffusers_byoc.training.settings import configuration
from diffusers_byoc.training.stage import Stage


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_baseline.py"
ARGUMENTS = {
    "num_phantoms": 6,
    "sample_size": 32,
    "held_out": 0.34,
    "max_train_steps": 4,
    "train_batch_size": 2,
    "checkpointing_steps": 2,
    "validation_steps": 4,
    "num_samples": 2,
    "num_cpu_threads": 1,
    "mixed_precision": "no",
}
MODELS = {
    "w_gan": {"latent_dim": 8, "base_channels": 4},
    "alpha_gan": {"latent_dim": 8, "base_channels": 4, "code_hidden_size": 16},
    "ha_gan": {"latent_dim": 8, "base_channels": 16},
    "medical_diffusion": {
        **{"latent_channels": 3, "num_vq_embeddings": 16},
        **{"block_out_channels": [4, 8, 8], "norm_num_groups": 4},
    },
}
# what MedicalDiffusion has beside
OWN_ARGUMENTS = {"discriminator_start": 1, "ema_start": 0, "num_inference_steps": 2}
OWN_NETWORKS = {
    "discriminator": {"base_channels": 4, "num_layers": 2},
    "unet": {
        **{"block_out_channels": [8, 16], "norm_num_groups": 4},
        **{"num_attention_heads": 2, "attention_head_dim": 4},
    },
}


@pytest.fixture
def preset_of(tmp_path):
    def write(baseline):
        path = tmp_path / f"{baseline}.json"
        preset = {"arguments": ARGUMENTS, "model": MODELS[baseline]}
        if baseline == "medical_diffusion":
            preset |= {"arguments": ARGUMENTS | OWN_ARGUMENTS} | OWN_NETWORKS
        path.write_text(json.dumps(preset))
        return path

    return write


@pytest.fixture
def train(fresh_state, preset_of):
    def run(baseline, output_dir, *arguments):
        fresh_state()
        main(
            ["--baseline", baseline, "--preset", str(preset_of(baseline)), "--output_dir", str(output_dir)]
            + [str(argument) for argument in arguments]
        )

    return run


def parse(*arguments):
    return parse_args("", [str(argument) for argument in arguments])


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize("baseline", GANS)
def test_the_papers_preset_is_the_papers_settings_and_model(baseline):
    args = parse("--baseline", baseline)
    assert args.preset == "paper" and args.output_dir == f"outputs/{baseline}"
    settings, expected = settings_of(args)[baseline], GANS[baseline][1](max_train_steps=args.max_train_steps)
    assert settings.train_batch_size == 4 and settings.checkpointing_steps == 5000
    for name in type(settings).__dataclass_fields__.keys() - {"train_batch_size"}:
        assert getattr(settings, name) == getattr(expected, name), name
    with torch.device("meta"):
        configs = [configuration("model", model.config) for model in (make_model(args), GANS[baseline][0]())]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "path",
    [path for name in BASELINES for path in sorted((PRESETS / name).glob("*.json"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_preset_can_be_trained(path):
    args = parse("--baseline", path.parent.name, "--preset", path.stem)
    assert all(isinstance(settings, StageSettings) for settings in settings_of(args).values())
    with torch.device("meta"):
        assert make_model(args).config.sample_size == 64


def test_every_setting_has_its_argument_or_no_effect():
    without = {"compile", "gradient_checkpointing", "num_validation_cells"}  # of what the GANs do not do
    for baseline, stages in STAGES.items():
        args = vars(parse("--baseline", baseline))
        for settings in stages.values():
            assert settings.__dataclass_fields__.keys() - args.keys() == without


def test_the_papers_preset_of_medical_diffusion_is_its_settings_and_networks():
    args = parse("--baseline", "medical_diffusion")
    for stage, settings in settings_of(args).items():
        expected = STAGES["medical_diffusion"][stage](max_train_steps=100_000)
        for name in type(settings).__dataclass_fields__.keys() - {"train_batch_size"}:
            assert getattr(settings, name) == pytest.approx(getattr(expected, name)), name
    with torch.device("meta"):
        model = make_model(args)
        unet = make_unet(args, model)
        networks = (model, MedicalDiffusionVQModel()), (unet, MedicalDiffusionUNet3D())
    for pair in networks:
        one, other = (json.loads(json.dumps(configuration("network", network.config))) for network in pair)
        assert one == other
    assert unet.latent_shape == (8, 32, 32, 32)


def test_a_stages_own_argument_wins_over_that_of_both():
    args = parse("--baseline", "medical_diffusion", "--learning_rate", 0.5, "--diffusion_learning_rate", 0.25)
    settings = settings_of(args)
    assert settings["autoencoder"].learning_rate == 0.5 and settings["diffusion"].learning_rate == 0.25
    args = parse("--baseline", "medical_diffusion", "--max_train_minutes", 3, "--autoencoder_max_train_minutes", 1)
    assert [settings.max_train_minutes for settings in settings_of(args).values()] == [1, 3]
    assert [settings.adam_beta2 for settings in settings_of(args).values()] == [0.9, 0.999]  # the preset's


def test_a_baseline_has_its_own_arguments_alone(capsys):
    assert parse("--baseline", "w_gan", "--num_critic_steps", 2).num_critic_steps == 2
    with pytest.raises(SystemExit):
        parse("--baseline", "ha_gan", "--num_critic_steps", 2)
    with pytest.raises(SystemExit):
        parse("--baseline", "d_gan")
    assert "invalid choice: 'd_gan'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--num_phantoms", 3)
    assert "required: --baseline" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        parse("--baseline", "w_gan", "--help")
    assert stop.value.code == 0 and "--num_critic_steps" in capsys.readouterr().out


def test_an_unknown_preset_names_the_known(capsys):
    with pytest.raises(SystemExit):
        parse("--baseline", "w_gan", "--preset", "gpu")
    assert "Expected --preset clipping, cpu, paper or a JSON file, got gpu" in capsys.readouterr().err


def test_help_waits_for_no_torch():
    code = "import sys; from diffusers_byoc.commands.train_baseline import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "--baseline" in done.stdout


# ---------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(("baseline", "model_class"), [("w_gan", WGAN), ("alpha_gan", AlphaGAN), ("ha_gan", HAGAN)])
def test_a_run_leaves_a_pipeline_a_report_a_record_and_cells(train, baseline, model_class, tmp_path):
    train(baseline, tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline) is BaselinePipeline and type(pipeline.model) is model_class
    assert pipeline.volume_processor.voxel_size_um == (1.0, 1.0, 1.0)  # the phantoms'
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"4 phantoms (nocodazole): 4 steps of {baseline} " in report and "Phantoms are synthetic" in report
    assert f"{model_class.__name__}." in report and "autoencoder" not in report
    assert (tmp_path / "out" / "cells.png").is_file() and (tmp_path / "out" / "split.json").is_file()
    record = json.loads((tmp_path / "out" / "arguments.json").read_text())[baseline]
    assert record["networks"]["model"] == MODELS[baseline] and record["arguments"]["num_phantoms"] == 6
    assert record["data"]["num_cells"] == 4 and record["data"]["num_held_out"] == 2

    generate.main(
        ["--pretrained", str(tmp_path / "out"), "--output_dir", str(tmp_path / "cells"), "--num_samples", "2"]
        + ["--format", "npz", "--device", "cpu"]
    )
    volume = read_volume(tmp_path / "cells" / "cell_000001.npz")
    assert volume.data.shape == (2, 32, 32, 32) and volume.channel_names == ("cell", "nucleus")
    with pytest.raises(SystemExit, match="Expected no --class_labels for BaselinePipeline"):
        generate.main(
            ["--pretrained", str(tmp_path / "out"), "--output_dir", str(tmp_path / "other")]
            + ["--class_labels", "nocodazole", "--device", "cpu"]
        )


def test_an_interrupted_run_goes_on_to_the_same_end(train, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_byoc.commands.training_runs.write_report", lambda *args, **options: None)
    train("alpha_gan", tmp_path / "whole")
    log, steps = Stage.log, []

    def interrupted(stage, *args):
        steps.append(stage.step)
        if stage.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return log(stage, *args)

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(Stage, "log", interrupted)
        train("alpha_gan", tmp_path / "parts")
    assert steps == [1, 2, 3] and not (tmp_path / "parts" / "model_index.json").exists()
    train("alpha_gan", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    name = "model/diffusion_pytorch_model.safetensors"
    whole, parts = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_medical_diffusion_is_trained_in_two_stages_and_goes_on_in_either(train, tmp_path, monkeypatch):
    reports = []
    report = "diffusers_byoc.commands.training_runs.write_report"
    monkeypatch.setattr(report, lambda *args, **options: reports.append(args))
    train("medical_diffusion", tmp_path / "whole")
    pipeline, _, _, opening = reports[0]
    assert type(pipeline) is BaselinePipeline and type(pipeline.model) is MedicalDiffusionVQModel
    assert "(nocodazole): 4 steps of autoencoder (" in opening and "4 steps of diffusion (" in opening
    generated = DiffusionPipeline.from_pretrained(tmp_path / "whole")(2, generator=torch.manual_seed(0)).volumes
    assert generated.shape == (2, 2, 32, 32, 32)
    np.testing.assert_array_equal(pipeline(2, generator=torch.manual_seed(0)).volumes, generated)
    record = json.loads((tmp_path / "whole" / "arguments.json").read_text())
    assert record.keys() == {"autoencoder", "diffusion"}
    assert record["diffusion"]["networks"] == OWN_NETWORKS | {"model": MODELS["medical_diffusion"], "scheduler": {}}

    log, names = Stage.log, ["autoencoder", "diffusion"]

    def interrupted(stage, *args):
        if names and stage.name == names[0] and stage.step == 3:
            names.pop(0)
            signal.raise_signal(signal.SIGTERM)
        return log(stage, *args)

    monkeypatch.setattr(Stage, "log", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit):
            train("medical_diffusion", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    assert not names and not (tmp_path / "parts" / "model_index.json").exists()
    train("medical_diffusion", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    for part in ("model", "unet"):
        whole, parts = (
            load_file(tmp_path / run / part / "diffusion_pytorch_model.safetensors") for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole), part


def test_what_cannot_be_resumed_is_said_before_the_cells_are_read(train, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_byoc.commands.training_runs.write_report", lambda *args, **options: None)
    train("w_gan", tmp_path, "--max_train_steps", 2)
    monkeypatch.setattr("diffusers_byoc.commands.training_runs.read_cells", None)
    with pytest.raises(SystemExit, match="Expected num_critic_steps 5, with which .*, got 2"):
        train("w_gan", tmp_path, "--resume_from_checkpoint", "latest", "--num_critic_steps", 2)


@pytest.mark.parametrize(
    ("baseline", "arguments", "message"),
    [
        ("ha_gan", ["--sample_size", 48], "Expected a sample_size of 32, 64, 128, 256, got 48"),
        ("alpha_gan", ["--train_batch_size", 1], "Expected a train_batch_size of at least 2"),
        ("w_gan", ["--train_data_dir", "nowhere"], "nowhere"),
        ("medical_diffusion", ["--sample_size", 34], r"Expected a sample_size divisible by 4 .* got \(34, 34, 34\)"),
        ("medical_diffusion", ["--perceptual_weight", 4], "Expected the package lpips"),
    ],
)
def test_bad_input_is_one_line(train, baseline, arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as stop:
        train(baseline, tmp_path / "out", *arguments)
    assert "\n" not in str(stop.value)


@pytest.mark.slow
def test_two_processes_make_one_model(preset_of, tmp_path):
    """The script under torchrun: the gradients are averaged, so every process holds the same weights."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT), "--baseline", "ha_gan"]
    arguments = ["--preset", str(preset_of("ha_gan")), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *launch, *arguments, "--train_batch_size", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = tmp_path / "one"
    subprocess.run(
        [sys.executable, str(SCRIPT), "--baseline", "ha_gan", *arguments[:-1], str(one)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=280,
    )
    volumes = [
        BaselinePipeline.from_pretrained(folder)(2, generator=torch.Generator().manual_seed(0)).volumes
        for folder in (tmp_path / "out", one)
    ]
    np.testing.assert_allclose(*volumes, atol=1e-2)
