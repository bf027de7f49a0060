"""The real command, in processes of its own and at tiny size."""

import contextlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import PartialState
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.commands import (
    train_arguments,
    train_checks,
    train_networks,
    train_run,
    training_runs,
)
from diffusers_byoc.commands.train import main
from diffusers_byoc.data import read_volume
from diffusers_byoc.pipelines.conditions import measure_conditions
from diffusers_byoc.training import Stage, list_checkpoints
from diffusers_byoc.training.hardware import machine_name
from diffusers_byoc.training.stages import autoencoder, diffusion, distillation
from diffusers_byoc.whole_files import lock_folder


REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "train_byoc.py"
STAGES = "diffusers_byoc.training.stages"
CHECKPOINTS = "diffusers_byoc.training.checkpoints"
REAL_CELLS = REPOSITORY.parent / "shared" / "data" / "mitotic_cells"

TINY = {
    "arguments": {
        "num_phantoms": 10,  # two of them held out
        "sample_size": 32,
        "autoencoder_max_train_steps": 4,
        "autoencoder_train_batch_size": 2,
        "autoencoder_learning_rate": 1e-3,
        "autoencoder_lr_scheduler": "cosine",
        "discriminator_start": 1,
        "diffusion_max_train_steps": 4,
        "diffusion_train_batch_size": 2,
        "diffusion_learning_rate": 1e-3,
        "diffusion_lr_scheduler": "cosine",
        "lr_warmup_steps": 1,
        "gradient_accumulation_steps": 2,
        "num_inference_steps": 3,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 1,
        "validation_steps": 3,
        "num_samples": 3,
        "num_cpu_threads": 1,
        "mixed_precision": "no",
    },
    "vqvae": {"block_out_channels": [4, 8, 8], "latent_channels": 4, "num_vq_embeddings": 16, "layers_per_block": 1},
    "unet": {"block_out_channels": [8, 16], "layers_per_block": 1, "attention_head_dim": 8},
}
FINAL_WEIGHTS = (
    "vqvae/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "autoencoder/checkpoint-4/model.safetensors",
    "autoencoder/checkpoint-4/model_1.safetensors",  # the discriminator
    "diffusion/checkpoint-4/model.safetensors",  # before the moving average
)

# kills its own process, as `kill -9` would, at the n-th call of a function of a module or a class
KILLED = """
import os, pkgutil, runpy, signal, sys
owner, name, last_call, *sys.argv = sys.argv[1:]
owner = pkgutil.resolve_name(owner)
original, calls = getattr(owner, name), []
def counted(*args, **kwargs):
    calls.append(name)
    if len(calls) == int(last_call):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, counted)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# says how many graphs torch.compile has made of the networks
COMPILED = """
import runpy, sys
import torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("compiled graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""

# trains the autoencoder and writes down what each process then holds
EVERY_RANK = """
import sys
import torch
from accelerate import PartialState
from diffusers_byoc.commands import cells, train_arguments, train_run
from diffusers_byoc.training import Stage
from diffusers_byoc.training.stages.autoencoder import train_autoencoder
folder, *arguments = sys.argv[1:]
args = train_arguments.parse_args("", arguments)
rank = PartialState(cpu=True).process_index
with Stage(args.output_dir, "autoencoder", train_run.settings_of(args, "autoencoder")) as stage:
    vqvae = train_run.make_autoencoder(args)
    train, _ = cells.split_for_training(args, cells.read_cells(args, vqvae.config.channel_names))
    vqvae = train_autoencoder(stage, vqvae, train)
torch.save(vqvae.state_dict(), f"{folder}/rank-{rank}.pt")
"""


@pytest.fixture(scope="session")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def run_process(command, check=True, timeout=240):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "60"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def train(fresh_state, preset, tmp_path):
    def run(*arguments, output_dir=tmp_path / "out"):
        fresh_state()
        main(["--preset", str(preset), "--output_dir", str(output_dir), *map(str, arguments)])
        return output_dir

    return run


def parse(*arguments):
    return train_arguments.parse_args("", [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def unbroken(preset, tmp_path_factory):
    """A whole run, by the command of the README: both stages, accumulation, discriminator, moving average."""
    output_dir = tmp_path_factory.mktemp("unbroken")
    launch = ["-m", "accelerate.commands.launch", SCRIPT, "--preset", preset, "--output_dir", output_dir]
    done = run_process(launch)
    return output_dir, done.stdout + done.stderr


@pytest.fixture
def no_report(monkeypatch):
    """For runs that are looked into themselves: half of a tiny run's time."""
    monkeypatch.setattr(training_runs, "write_report", lambda *args, **options: None)
    monkeypatch.setattr(Stage, "log_volumes", lambda *args: None)


def scalars(output_dir, stage):
    """{tag: {step: value}} of a stage's log."""
    events = EventAccumulator(str(Path(output_dir) / "logs" / stage)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def assert_same_weights(output_dir, expected_dir, files=FINAL_WEIGHTS):
    for file in files:
        weights, expected = load_file(output_dir / file), load_file(expected_dir / file)
        assert weights.keys() == expected.keys()
        different = [name for name in weights if not torch.equal(weights[name], expected[name])]
        assert not different, f"{file}: {different}"


# ---------------------------------------------------------------------- a whole run


def test_a_run_leaves_a_pipeline_a_report_and_pictures(unbroken):
    output_dir, output = unbroken
    for name in ("model_index.json", "vqvae/config.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (output_dir / name).is_file(), name
    assert not list(output_dir.rglob("*.bin")) or all("checkpoint-" in str(p) for p in output_dir.rglob("*.bin"))
    assert (output_dir / "cells.png").read_bytes().startswith(b"\x89PNG")
    report = (output_dir / "report.md").read_text()
    assert "8 phantoms (nocodazole)" in report and "cells.png" in report and "nan" not in report.lower()
    volumes = sorted((output_dir / "volumes").iterdir())
    assert [path.name for path in volumes] == [f"cell_00{index}.ome.tif" for index in range(3)]
    volume = read_volume(volumes[0])
    assert volume.data.shape == (2, 32, 32, 32) and volume.channel_names == ("cell", "nucleus")
    assert "8 cells, 2 more held out: nocodazole" in output and "latent_std/cell" in output


def test_a_run_logs_what_tells_its_health(unbroken):
    output_dir, _ = unbroken
    steps, channels = [1, 2, 3, 4], ("cell", "nucleus")

    autoencoder = scalars(output_dir, "autoencoder")
    for name in ("loss/reconstruction", "loss/commitment", "lr", *(f"usage/{c}" for c in channels)):
        assert sorted(autoencoder[name]) == steps, name
    for name in ("loss/adversarial", "loss/discriminator"):
        assert sorted(autoencoder[name]) == [2, 3, 4]  # from discriminator_start on
    for channel in channels:
        assert all(0 < value <= 1 for value in autoencoder[f"usage/{channel}"].values())
        assert all(1 <= value <= 16 for value in autoencoder[f"perplexity/{channel}"].values())
        assert sorted(autoencoder[f"validation/usage/{channel}"]) == [3, 4]

    diffusion = scalars(output_dir, "diffusion")
    assert sorted(diffusion["loss/diffusion"]) == sorted(diffusion["lr"]) == steps
    for channel in channels:
        assert diffusion[f"latent_std/{channel}"][0] > 0
        assert 0 <= diffusion[f"latent_outside/{channel}"][0] <= 1

    for stage, loss in (("autoencoder", "reconstruction"), ("diffusion", "diffusion")):
        events = EventAccumulator(str(output_dir / "logs" / stage)).Reload()
        assert [event.step for event in events.Images("samples")] == [3, 4]  # validation_steps, and the last
        assert sorted(scalars(output_dir, stage)[f"validation/{loss}"]) == [3, 4]


def test_the_discriminator_learns(unbroken):
    """Its schedule warms up like the autoencoder's; one that is never stepped would leave its rate at zero."""
    output_dir, _ = unbroken
    state = torch.load(output_dir / "autoencoder" / "checkpoint-4" / "optimizer_1.bin", weights_only=True)
    assert state["param_groups"][0]["initial_lr"] == pytest.approx(1e-3)
    steps = {int(moments["step"]) for moments in state["state"].values()}
    assert steps == {3}
    schedule = torch.load(output_dir / "autoencoder/checkpoint-4/custom_checkpoint_1.pkl", weights_only=False)
    assert schedule["last_epoch"] == 3


def test_the_saved_pipeline_loads_and_generates(unbroken):
    output_dir, _ = unbroken
    pipeline = BYOCPipeline.from_pretrained(output_dir)
    generic = DiffusionPipeline.from_pretrained(output_dir)
    assert type(generic) is BYOCPipeline
    cells = [p(2, generator=torch.manual_seed(1)).volumes for p in (pipeline, generic)]
    assert cells[0].shape == (2, 2, 32, 32, 32) and np.array_equal(*cells)
    assert pipeline.num_timesteps == 3  # the preset's default
    assert pipeline.volume_processor.config.sample_size == 32
    assert pipeline.volume_processor.voxel_size_um == (1.0, 1.0, 1.0)  # the phantoms'
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_the_saved_unet_is_the_moving_average(unbroken):
    output_dir, _ = unbroken
    averages = torch.load(output_dir / "diffusion/checkpoint-4/custom_checkpoint_1.pkl", weights_only=False)
    unet = DualChannelUNet3D.from_pretrained(output_dir, subfolder="unet")
    for parameter, average in zip(unet.parameters(), averages["shadow_params"], strict=True):
        assert torch.equal(parameter, average)
    last = load_file(output_dir / "diffusion/checkpoint-4/model.safetensors")
    assert not torch.equal(unet.conv_in.weight, last["conv_in.weight"])


def test_only_so_many_checkpoints_are_kept(unbroken):
    output_dir, _ = unbroken
    for stage in ("autoencoder", "diffusion"):
        assert [path.name for path in (output_dir / stage).iterdir()] == ["checkpoint-4"]


def test_the_stages_one_by_one_are_both_at_once(unbroken, train):
    output_dir = train("--stage", "autoencoder")
    assert not (output_dir / "model_index.json").exists() and not (output_dir / "diffusion").exists()
    train("--stage", "diffusion")
    assert_same_weights(output_dir, unbroken[0])
    assert (output_dir / "report.md").is_file()


def test_a_run_killed_in_either_stage_resumes_to_the_same_end(unbroken, preset, tmp_path):
    """Killed within step 4 of each stage, with a checkpoint of step 2, between two accumulated batches."""
    output_dir = tmp_path / "broken"
    command = [SCRIPT, "--preset", preset, "--output_dir", output_dir, "--resume_from_checkpoint", "latest"]
    for function, last_call, stage in (
        ("reconstruction_loss", 8, "autoencoder"),
        ("diffusion_loss", 8, "diffusion"),
    ):
        killed = run_process(["-c", KILLED, f"{STAGES}.{stage}", function, last_call, *command], check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert [path.name for path in (output_dir / stage).iterdir()] == ["checkpoint-2"]
        assert not (output_dir / "model_index.json").exists()
    done = run_process(command)
    assert "Resumed from" in done.stdout

    for stage in ("autoencoder", "diffusion"):
        expected, got = scalars(unbroken[0], stage), scalars(output_dir, stage)
        assert got == expected, stage
    assert_same_weights(output_dir, unbroken[0])


# ---------------------------------------------------------------------- choices


def test_three_phenotypes_in_bfloat16(train):
    """One conditional model of all phenotypes, with the options that the other tests leave alone."""
    phenotypes = ("nocodazole", "blebbistatin", "binimetinib")
    output_dir = train(
        *("--class_conditional", "--label", *phenotypes, "--mixed_precision", "bf16", "--optimizer", "adamw"),
        *("--gradient_checkpointing", "--use_ema_warmup", "--loss_type", "l2", "--gradient_accumulation_steps", 1),
        *("--max_grad_norm", 0, "--num_phantoms", 7, "--dataloader_num_workers", 1),
    )
    pipeline = BYOCPipeline.from_pretrained(output_dir)
    assert pipeline.config.label2id == {name: index for index, name in enumerate(sorted(phenotypes))}
    assert pipeline.unet.config.num_class_embeds == 3 and pipeline.unet.dtype == torch.float32
    by_name, by_index, other = (
        pipeline(1, class_labels=label, generator=torch.manual_seed(0), output_type="latent").volumes
        for label in ("blebbistatin", 1, "nocodazole")
    )
    assert torch.equal(by_name, by_index) and not torch.equal(by_name, other)


def test_drugs_and_doses_in_one_model(train, tmp_path):
    conditional = ("--class_conditional", "--condition_columns", "dose_um", "--conditioning_dropout_prob", 0.2)
    output_dir = train(
        *("--label", "nocodazole", "blebbistatin", "--phantom_doses", 0, 2, 8, "--num_phantoms", 12),
        *conditional,
    )
    pipeline = BYOCPipeline.from_pretrained(output_dir)
    (dose,) = pipeline.config.conditions
    assert (dose["name"], dose["min"], dose["max"]) == ("dose_um", [0.0], [8.0])
    assert pipeline.unet.config.conditioning_dropout_prob == 0.2
    assert pipeline.unet.condition_embedding.linear_2.weight.abs().sum() > 0  # it began at nothing
    given = {"class_labels": "nocodazole", "conditions": {"dose_um": 20.0}}
    assert pipeline(**given, guidance_scale=2.0).extrapolated == {"dose_um": [True]}
    assert pipeline.interpolate(2, "nocodazole", {"dose_um": [0, 8]}).volumes.shape == (2, 2, 32, 32, 32)
    # a run that begins with it knows the doses by the same scale
    arguments = ("--stage", "diffusion", "--pretrained", output_dir, "--phantom_doses", 1, 3)
    again = train(*conditional, *arguments, output_dir=tmp_path / "again")
    assert BYOCPipeline.from_pretrained(again).config.conditions == pipeline.config.conditions


def test_three_channels_of_which_some_are_given(train, tmp_path):
    """One command trains on three channels; its pipeline takes any of them, and so does one distilled from it."""
    config = json.loads(json.dumps(TINY))
    config["vqvae"] |= {"num_channels": 3, "channel_names": ["cell", "nucleus", "mitochondria"]}
    preset = tmp_path / "three.json"
    preset.write_text(json.dumps(config))
    arguments = ("--preset", preset, "--gradient_accumulation_steps", 1, "--prediction_type", "v_prediction")
    output_dir = train(*arguments, "--channel_timesteps_prob", 0.5)
    few = ("--stage", "distillation", "--pretrained", output_dir, "--distillation_max_train_steps", 2)
    distilled = train(*arguments, *few, output_dir=tmp_path / "few")
    given = {"nucleus": np.zeros((2, 32, 32, 32)), "mitochondria": np.zeros((32, 32, 32))}
    for folder in (output_dir, distilled):
        pipeline = BYOCPipeline.from_pretrained(folder)
        assert pipeline.unet.config.channel_timesteps_prob == 0.5
        assert pipeline(given_channels=given, keep_given=True).volumes.shape == (2, 3, 32, 32, 32)
        assert pipeline().volumes.shape == (1, 3, 32, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--condition_columns", "dose_um"], "Give --phantom_doses with dose_um"),
        (["--condition_columns", "dose_um", "--phantom_doses", 2], "different dose_um, got"),
        (["--phantom_doses", 2, 4, "--train_data_dir", "cells"], "phantoms for --phantom_doses"),
    ],
)
def test_conditions_that_no_cell_has_are_refused(train, arguments, message):
    with pytest.raises(SystemExit, match=message):
        train(*arguments)


def test_a_folder_of_arrays(train, tmp_path):
    folder = tmp_path / "cells"
    folder.mkdir()
    for index in range(3):
        np.save(folder / f"{index}.npy", make_cell(index))
    output_dir = train("--train_data_dir", folder, "--sample_size", 16)
    assert "Trained on 2 cells (cell)" in (output_dir / "report.md").read_text()
    assert BYOCPipeline.from_pretrained(output_dir)(1).volumes.shape == (1, 2, 16, 16, 16)


@pytest.mark.parametrize(
    ("num_channels", "names", "others"),
    [
        (1, ["nucleus"], {"use_ema_codebook": False}),
        (3, ["channel_0", "channel_1", "channel_2"], {"share_encoder": False, "latent_scaling": "standardize"}),
    ],
)
def test_any_number_of_channels_is_a_matter_of_the_preset(train, tmp_path, num_channels, names, others):
    cells = {f"cell_{index}": make_cell(index, num_channels) for index in range(2)}
    folder = make_folder(tmp_path / "cells", **cells)
    vqvae = TINY["vqvae"] | {"num_channels": num_channels} | others
    if num_channels == 1:
        vqvae["channel_names"] = names
    preset = tmp_path / "channels.json"
    preset.write_text(json.dumps(TINY | {"vqvae": vqvae}))
    output_dir = train("--train_data_dir", folder, "--sample_size", 16, "--preset", preset)
    assert set(scalars(output_dir, "autoencoder")) >= {f"usage/{name}" for name in names}
    pipeline = BYOCPipeline.from_pretrained(output_dir)
    assert list(pipeline.vqvae.config.channel_names) == names
    assert pipeline(2).volumes.shape == (2, num_channels, 16, 16, 16)
    assert read_volume(output_dir / "volumes" / "cell_000.ome.tif").channel_names == tuple(names)
    if "latent_scaling" in others:
        statistics = scalars(output_dir, "diffusion")
        assert all(statistics[f"latent_std/{name}"][0] == pytest.approx(1, abs=0.02) for name in names)


@pytest.mark.skipif(not REAL_CELLS.is_dir(), reason="real cells lie outside the repository")
def test_real_cells(train):
    output_dir = train("--train_data_dir", REAL_CELLS, "--label", "metaphase", "--oversize", "rescale")
    assert "Trained on 10 cells (metaphase)" in (output_dir / "report.md").read_text()
    pipeline = BYOCPipeline.from_pretrained(output_dir)
    assert pipeline.config.volume_processor_config["oversize"] == "rescale"
    # each cell was shrunk by a factor of its own, so that generated ones have no voxel size
    assert pipeline.volume_processor.voxel_size_um is None
    assert read_volume(output_dir / "volumes" / "cell_000.ome.tif").voxel_size_um is None
    assert "lengths are in voxels" in (output_dir / "report.md").read_text()


# ---------------------------------------------------------------------- what stops a run


def make_cell(seed, num_channels=2, size=12):
    cell = np.zeros((num_channels, size, size, size), np.float32)
    cell[:, 2:-2, 2:-2, 2:-2] = np.random.default_rng(seed).random((num_channels, *(size - 4,) * 3)) + 0.1
    return cell


def make_folder(root, **cells):
    root.mkdir()
    for name, cell in cells.items():
        np.save(root / f"{name}.npy", cell)
    return root


def holed(cell):
    cell[0, 5, 5, 5] = np.nan
    return cell


@pytest.mark.parametrize(
    ("cells", "arguments", "named", "remedy"),
    [
        ({}, [], "folder", "Expected metadata.csv, or files ending in"),
        ({"good": make_cell(0)}, ["--label", "anaphase"], "folder", "got cell. Choose among these."),
        ({"good": make_cell(0), "hole": holed(make_cell(1))}, [], "hole.npy", "Replace them"),
        ({"three": make_cell(0, num_channels=3)}, [], "three.npy", "Keep these channels only"),
        ({"flat": make_cell(0)[:, 5]}, [], "flat.npy", "channel"),
        ({"large": make_cell(0, size=44)}, [], "large.npy", "oversize='rescale'"),
        ({"good": make_cell(0)}, ["--sample_size", 30], "--sample_size", "Give 24 or 32, or"),
        ({"good": make_cell(0)}, ["--sample_size", 8], "--sample_size", "Give 16, or"),  # the U-Net's, not stage one's
        ({"good": make_cell(0)}, ["--mixed_precision", "fp16"], "fp16", "Say bf16, no or auto"),
        ({"good": make_cell(0)}, ["--stage", "diffusion"], "vqvae", "--stage autoencoder first"),
    ],
    ids="empty label nan channels flat large size deep fp16 stage".split(),
)
def test_bad_input_is_one_line_before_any_training(train, tmp_path, cells, arguments, named, remedy):
    if "fp16" in arguments and torch.accelerator.is_available():
        pytest.skip("fp16 runs here")
    folder = make_folder(tmp_path / "folder", **cells)
    with pytest.raises(SystemExit) as stop:
        train("--train_data_dir", folder, *arguments)
    message = str(stop.value)
    assert named in message and remedy in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_the_report_is_made_on_the_device(fresh_state, preset, unbroken, tmp_path, monkeypatch):
    """Where the thousand steps of its cells take minutes, not hours."""
    output_dir = tmp_path / "out"
    shutil.copytree(unbroken[0], output_dir)
    for stage in ("train_autoencoder", "train_diffusion"):
        monkeypatch.setattr(train_run, stage, lambda stage, network, *args: network)
    pipelines = []
    monkeypatch.setattr(training_runs, "write_report", lambda pipeline, *args, **options: pipelines.append(pipeline))
    args = parse("--preset", preset, "--output_dir", output_dir)
    state = types.SimpleNamespace(num_processes=1, is_main_process=True, device=torch.device("meta"))
    PartialState(cpu=True)
    train_run.run(args, state, train_run.check_arguments(args, torch.device("cpu")))
    assert [pipeline.device.type for pipeline in pipelines] == ["meta"]


@pytest.mark.parametrize(
    ("backend", "has_gpu", "arguments", "message"),
    [
        ("FSDP", True, [], "got FSDP"),
        ("DEEPSPEED", False, ["--stage", "diffusion"], "Expected GPUs for DeepSpeed"),
        ("DEEPSPEED", True, [], "the two of the autoencoder. Use it with --stage diffusion"),
        ("DEEPSPEED", True, ["--stage", "distillation", "--pretrained", "x"], "the two of moment matching. Use it"),
        ("DEEPSPEED", True, ["--stage", "diffusion", "--mixed_precision", "fp16"], "Say --mixed_precision bf16 or no"),
    ],
)
def test_what_a_launcher_may_not_ask_for(preset, monkeypatch, backend, has_gpu, arguments, message):
    monkeypatch.setenv(f"ACCELERATE_USE_{backend}", "true")
    monkeypatch.setattr(train_checks, "is_cpu_training", lambda: not has_gpu)
    with pytest.raises(ValueError, match=message):
        train_checks.check_arguments(parse("--preset", preset, *arguments), torch.device("cuda"))


def test_bad_input_ends_the_process_without_a_traceback(preset, tmp_path):
    folder = make_folder(tmp_path / "folder", hole=holed(make_cell(0)))
    command = [SCRIPT, "--preset", preset, "--output_dir", tmp_path / "out", "--train_data_dir", folder]
    done = run_process(command, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert line.startswith(f"train_byoc.py: error: Expected finite intensities in {folder / 'hole.npy'}, got NaN")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "papre"], "phantom_lora or a JSON file, got papre."),
        (["--num_samples", "0"], "--num_samples: expected at least 1, got 0"),
        (["--checkpoints_total_limit", "0"], "--checkpoints_total_limit: expected at least 1"),
        (["--stage", "both"], "invalid choice"),
        (["--resume_from_checkpoint", "checkpoint-3"], "got checkpoint-3, which is of one. Say its --stage"),
        (["--push_to_hub", "--stage", "autoencoder"], "Expected a run that ends with a pipeline"),
        (
            ["--num_augmented_copies", "3", "--augmentation", "none"],
            "for --num_augmented_copies 3, got none: the copies would be equal.",
        ),
        (["--autoencoder_latent_noise", "-1"], "Expected an --autoencoder_latent_noise of at least 0, got -1.0."),
        (["--lerning_rate", "1"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"arguments": {"lerning_rate": 1}}', "Expected arguments of this command, got ['lerning_rate'] in PATH."),
        (
            '{"vqvea": {}}',
            "Expected arguments, vqvae, texture_unet, unet, scheduler in a preset, got ['vqvea'] in PATH.",
        ),
        ("{,}", "Expected a preset in JSON, got PATH ("),
    ],
)
def test_bad_presets(tmp_path, text, message, capsys):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse("--preset", path)
    assert message.replace("PATH", str(path)) in capsys.readouterr().err


def test_help_and_mistakes_do_not_wait_for_torch():
    code = "import sys; from diffusers_byoc.commands.train import main\n" + (
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    assert run_process(["-c", code, "--help"]).stdout.endswith("\n0 False\n")
    assert run_process(["-c", code, "--stage", "both"]).stdout == "2 False\n"


def test_the_command_line_outranks_the_preset(preset):
    args = parse("--preset", preset, "--num_samples", 5)
    assert args.num_samples == 5 and args.num_phantoms == 10 and args.ema_decay == 0.995


def test_a_diverging_run_stops_and_leaves_the_last_checkpoint_whole(preset, tmp_path):
    command = [SCRIPT, "--preset", preset, "--output_dir", tmp_path, "--stage", "autoencoder"]
    limit = ["--checkpointing_steps", 1, "--gradient_accumulation_steps", 1, "--autoencoder_max_train_steps", 9]
    done = run_process([*command, *limit, "--autoencoder_learning_rate", 1e30], check=False)
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("FloatingPointError: ")]
    assert "Expected a finite " in message and "begin anew with a lower learning rate" in message

    (checkpoint,) = (tmp_path / "autoencoder").iterdir()
    assert f"those of step {checkpoint.name.split('-')[1]}." in message
    assert all(weight.isfinite().all() for weight in load_file(checkpoint / "model.safetensors").values())
    assert not (tmp_path / "vqvae").exists()


@pytest.mark.parametrize(("module", "function"), [(autoencoder, "reconstruction_loss"), (diffusion, "diffusion_loss")])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_number_that_is_none_never_reaches_the_weights(train, monkeypatch, tmp_path, module, function, broken):
    stage = module.__name__.rpartition(".")[2]
    if stage == "diffusion":
        train("--stage", "autoencoder", "--autoencoder_max_train_steps", 1)
    original, calls = getattr(module, function), []

    def break_down(*arguments, **options):
        loss = original(*arguments, **options)
        calls.append(loss)
        if len(calls) < 6:  # the second half of step 3
            return loss
        # the square root's slope at zero is infinite: a finite loss with a gradient that is not
        return loss * float("nan") if broken == "loss" else loss + (loss - loss.detach()).abs().sqrt()

    monkeypatch.setattr(module, function, break_down)
    with pytest.raises(FloatingPointError, match="step 3 is not made, the weights are those of step 2"):
        train("--stage", stage, "--discriminator_start", 9)
    checkpoint = tmp_path / "out" / stage / "checkpoint-2"
    assert all(weight.isfinite().all() for weight in load_file(checkpoint / "model.safetensors").values())

    monkeypatch.setattr(module, function, original)  # the remedy in the message works
    train("--stage", stage, "--discriminator_start", 9, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "out" / stage / "checkpoint-4").is_dir()


# ---------------------------------------------------------------------- interruptions


def test_sigterm_saves_a_checkpoint_and_says_how_to_go_on(unbroken, preset, tmp_path):
    """Sent within the first half of step 3, which has no checkpoint of its own; a second run is refused meanwhile."""
    command = [SCRIPT, "--preset", preset, "--output_dir", tmp_path, "--stage", "autoencoder"]
    code = KILLED.replace("signal.SIGKILL", "signal.SIGTERM")
    done = run_process(["-c", code, f"{STAGES}.autoencoder", "reconstruction_loss", 5, *command], check=False)
    assert done.returncode == 143, done.stderr[-3000:]
    assert "checkpoint-3; go on with --resume_from_checkpoint latest" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    run_process([*command, "--resume_from_checkpoint", "latest"])
    assert_same_weights(tmp_path, unbroken[0], ["vqvae/diffusion_pytorch_model.safetensors"])
    assert scalars(tmp_path, "autoencoder") == scalars(unbroken[0], "autoencoder")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_for_all", [False, True], ids=["launcher", "group"])
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "accelerate.commands.launch"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_sigterm_to_a_launcher_saves_a_checkpoint(preset, tmp_path, launcher, is_for_all):
    arguments = ["--max_train_steps", 10_000, "--validation_steps", 10_000, "--checkpointing_steps", 10_000]
    command = [sys.executable, *launcher, SCRIPT, "--preset", preset, "--output_dir", tmp_path, *arguments]
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [*map(str, command)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=errors,
            start_new_session=True,
        )
        try:
            wait_for(lambda: scalars(tmp_path, "autoencoder")["lr"], process)  # it has made a step
            (os.killpg if is_for_all else os.kill)(process.pid, signal.SIGTERM)
            process.wait(120)
            wait_for(lambda: not (tmp_path / "run.lock").exists())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        (checkpoint,) = list_checkpoints(tmp_path / "autoencoder")
        errors.seek(0)
        assert f"{checkpoint.name}; go on with --resume_from_checkpoint latest" in errors.read()


def wait_for(condition, process=None, seconds=300):
    """Until `condition()` is true; what it does not find yet, it may raise."""
    for _ in range(seconds * 2):
        with contextlib.suppress(OSError, KeyError, DirectoryDeletedError):
            if condition():
                return
        assert process is None or process.poll() is None
        time.sleep(0.5)
    raise TimeoutError


def test_a_second_run_into_one_folder_is_refused(train, tmp_path):
    with lock_folder(tmp_path / "out"), pytest.raises(SystemExit, match="is writing into it"):
        train()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_while_saving_and_between_the_stages_lose_nothing(unbroken, preset, tmp_path):
    command = [SCRIPT, "--preset", preset, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest"]
    for owner, function, call, last in (
        ("torch", "save", 2, None),  # half of the first checkpoint is written
        (CHECKPOINTS, "move_into_place", 1, None),  # all of it, but it has no name yet
        (CHECKPOINTS, "remove", 1, "autoencoder/checkpoint-4"),  # the earlier one is about to be removed
        ("diffusers_byoc:MultiCodebookVQModel", "save_pretrained", 1, "autoencoder/checkpoint-4"),
        (f"{STAGES}.diffusion", "cache_latents", 1, "autoencoder/checkpoint-4"),
        # latents are encoded, but have no name yet; the run's record is the first to get one
        ("diffusers_byoc.whole_files", "move_into_place", 2, "autoencoder/checkpoint-4"),
        (f"{STAGES}.diffusion", "diffusion_loss", 1, "autoencoder/checkpoint-4"),
        ("torch", "save", 2, "autoencoder/checkpoint-4"),  # half of the second stage's first checkpoint
        (CHECKPOINTS, "remove", 1, "diffusion/checkpoint-4"),
        ("diffusers_byoc:BYOCPipeline", "save_pretrained", 1, "diffusion/checkpoint-4"),
    ):
        killed = run_process(["-c", KILLED, owner, function, call, *command], check=False)
        assert killed.returncode == -signal.SIGKILL, (owner, function, call, killed.stderr[-3000:])
        whole = [p for stage in ("diffusion", "autoencoder") for p in list_checkpoints(tmp_path / stage)[::-1]]
        assert whole[:1] == ([tmp_path / last] if last else []), (owner, function, call)
        assert not (tmp_path / "model_index.json").exists()
    run_process(command)
    for stage in ("autoencoder", "diffusion"):
        assert scalars(tmp_path, stage) == scalars(unbroken[0], stage), stage
    assert_same_weights(tmp_path, unbroken[0])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_random_moments_lose_nothing(unbroken, preset, tmp_path):
    output_dir, moments = tmp_path / "killed", random.Random(0)
    command = [SCRIPT, "--preset", preset, "--output_dir", output_dir, "--resume_from_checkpoint", "latest"]
    command += ["--checkpointing_steps", 1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    run_process([*command[:4], tmp_path / "timed", *command[5:]])
    whole = time.monotonic() - started
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(moments.uniform(0.2, 0.9) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    run_process(command)
    for stage in ("autoencoder", "diffusion"):
        assert scalars(output_dir, stage) == scalars(unbroken[0], stage), stage
    assert_same_weights(output_dir, unbroken[0])


# ---------------------------------------------------------------------- a run records itself


def test_a_run_records_itself(unbroken, preset):
    stages = json.loads((unbroken[0] / "arguments.json").read_text())
    assert list(stages) == ["autoencoder", "diffusion"]
    for record in stages.values():
        args = vars(parse("--preset", preset, "--output_dir", unbroken[0]))
        assert {**record["arguments"], **record["networks"]} == args
        assert record["networks"]["vqvae"] == TINY["vqvae"]
        assert record["versions"].keys() >= {"python", "diffusers_byoc", "torch", "diffusers", "accelerate"}
        assert record["versions"]["torch"] == importlib.metadata.version("torch")
        assert record["data"]["num_cells"] == 8 and len(record["data"]["fingerprint"]) == 64
        assert record["num_processes"] == 1


def test_the_record_keeps_a_stage_that_another_run_made(train, no_report):
    output_dir = train("--stage", "autoencoder", "--learning_rate", 0.5, "--max_train_steps", 1)
    train("--stage", "diffusion", "--learning_rate", 0.25, "--max_train_steps", 1, "--num_cpu_threads", 2)
    stages = json.loads((output_dir / "arguments.json").read_text())
    rates = [stages[stage]["arguments"][f"{stage}_learning_rate"] for stage in ("autoencoder", "diffusion")]
    assert rates == [0.5, 0.25]
    hardware = [stages[stage]["hardware"] for stage in ("autoencoder", "diffusion")]
    assert hardware == [machine_name(1), machine_name(2)]  # what trains, not what this process began with


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--learning_rate", 0.5], "learning_rate 0.001"),
        (["--train_batch_size", 1], "train_batch_size 2"),
        (["--gradient_accumulation_steps", 1], "gradient_accumulation_steps 2"),
        (["--discriminator_start", 3], "discriminator_start 1"),
        (["--seed", 1], "seed 0"),
        (["--num_phantoms", 12], "num_phantoms 10"),
        (["--augmentation", "axial"], "augmentation 'none'"),
        (["--stage", "diffusion", "--snr_gamma", 5], "snr_gamma None"),
        (["--stage", "diffusion", "--class_conditional"], "class_conditional False"),
        (["--stage", "diffusion", "--prediction_type", "sample"], "scheduler.prediction_type 'epsilon'"),
        (["--stage", "diffusion", "--latent_scaling", "standardize"], "vqvae.latent_scaling 'codebook_range'"),
        (["--held_out", 0.3], "held-out cells"),
        (["--stage", "diffusion", "--max_train_steps", 3], "as many steps"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_resume_with_other_arguments_is_refused_by_name(unbroken, train, no_report, tmp_path, arguments, name):
    output_dir = shutil.copytree(unbroken[0], tmp_path / "copy")
    kept = [*output_dir.rglob("*.safetensors"), output_dir / "arguments.json", output_dir / "split.json"]
    contents = [path.read_bytes() for path in kept]
    with pytest.raises(SystemExit, match=f"Expected .*{name}.*[.]$"):
        train("--resume_from_checkpoint", "latest", *arguments, output_dir=output_dir)
    assert [path.read_bytes() for path in kept] == contents


def test_a_preset_of_other_networks_is_refused_by_name(unbroken, train, tmp_path):
    output_dir = shutil.copytree(unbroken[0], tmp_path / "copy")
    preset = tmp_path / "larger.json"
    preset.write_text(json.dumps(TINY | {"vqvae": TINY["vqvae"] | {"num_vq_embeddings": 32}}))
    with pytest.raises(SystemExit, match="Expected vqvae.num_vq_embeddings 16, with which"):
        train("--preset", preset, "--resume_from_checkpoint", "latest", output_dir=output_dir)


def test_a_finished_run_is_extended(unbroken, train, no_report, tmp_path):
    """Its diffusion alone: the autoencoder is done, and stays; the arguments that may change are others too."""
    output_dir = shutil.copytree(unbroken[0], tmp_path / "copy")
    may_change = ["--checkpointing_steps", 1, "--validation_steps", 2, "--num_inference_steps", 2]
    train("--resume_from_checkpoint", "latest", "--diffusion_max_train_steps", 6, *may_change, output_dir=output_dir)
    assert_same_weights(output_dir, unbroken[0], ["vqvae/diffusion_pytorch_model.safetensors"])
    losses, before = (scalars(folder, "diffusion")["loss/diffusion"] for folder in (output_dir, unbroken[0]))
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and {step: losses[step] for step in before} == before
    assert BYOCPipeline.from_pretrained(output_dir).config.default_num_inference_steps == 2
    record = json.loads((output_dir / "arguments.json").read_text())["diffusion"]["arguments"]
    assert record["diffusion_max_train_steps"] == 6


def test_another_precision_may_go_on(unbroken, train, no_report, tmp_path):
    output_dir = shutil.copytree(unbroken[0], tmp_path / "copy")
    more = ["--diffusion_max_train_steps", 5, "--mixed_precision", "bf16", "--dataloader_num_workers", 1]
    train("--resume_from_checkpoint", "latest", *more, output_dir=output_dir)
    assert sorted(scalars(output_dir, "diffusion")["loss/diffusion"]) == [1, 2, 3, 4, 5]


def test_a_longer_autoencoder_has_its_diffusion_trained_anew(unbroken, train, no_report, tmp_path, caplog):
    """Also where a kill comes in between; its checkpoints are of other latents."""
    output_dir = shutil.copytree(unbroken[0], tmp_path / "copy")
    arguments = ["--max_train_steps", 6, "--resume_from_checkpoint", "latest"]
    train("--stage", "autoencoder", *arguments, output_dir=output_dir)
    assert sorted(scalars(output_dir, "autoencoder")["loss/reconstruction"]) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(SystemExit, match="Expected autoencoder '[0-9a-f]*', with which"):
        train("--stage", "diffusion", *arguments, output_dir=output_dir)
    train(*arguments, output_dir=output_dir)
    assert "the diffusion begins anew" in caplog.text
    train("--stage", "diffusion", "--max_train_steps", 6, "--vqvae_path", output_dir / "vqvae")
    assert_same_weights(output_dir, tmp_path / "out", ["unet/diffusion_pytorch_model.safetensors"])


def test_a_checkpoint_of_an_earlier_version_is_resumed(unbroken, train, no_report, tmp_path):
    output_dir = shutil.copytree(unbroken[0], tmp_path / "copy")
    for stage in ("autoencoder", "diffusion"):
        (output_dir / stage / "checkpoint-4" / "settings.json").unlink()
    (output_dir / "arguments.json").unlink()
    train("--resume_from_checkpoint", "latest", output_dir=output_dir)
    assert_same_weights(output_dir, unbroken[0])


# ---------------------------------------------------------------------- from another pipeline's networks


def test_a_run_begins_with_the_networks_of_a_pipeline(unbroken, train, no_report, tmp_path, monkeypatch):
    """A rate of zero leaves them as they are: the autoencoder in its stage, the U-Net in its own."""
    monkeypatch.chdir(unbroken[0].parents[1])
    still = ["--max_train_steps", 1, "--learning_rate", 0, "--no-use_ema", "--diffusion_train_batch_size", 2]
    as_on_the_hub = "/".join(unbroken[0].parts[-2:])
    output_dir = train("--pretrained", as_on_the_hub, "--stage", "diffusion", *still)
    assert_same_weights(output_dir, unbroken[0], FINAL_WEIGHTS[:2])
    assert BYOCPipeline.from_pretrained(output_dir).config.prediction_type == "epsilon"
    record = json.loads((output_dir / "arguments.json").read_text())["diffusion"]
    assert record["arguments"]["pretrained"] == str(unbroken[0].resolve())  # no name of the Hub, on any card
    assert record["networks"]["unet"]["block_out_channels"] == TINY["unet"]["block_out_channels"]
    train("--pretrained", unbroken[0], *still, output_dir=tmp_path / "all")
    decoder = "vqvae/diffusion_pytorch_model.safetensors"
    weights, before = load_file(tmp_path / "all" / decoder), load_file(unbroken[0] / decoder)
    assert all(torch.equal(weights[name], before[name]) for name in weights if name.startswith("decoder"))


def test_a_pipeline_that_predicts_something_else_is_refused(unbroken, train):
    with pytest.raises(SystemExit, match="Expected a scheduler with .*'epsilon'.* got .*'v_prediction'"):
        train("--pretrained", unbroken[0], "--prediction_type", "v_prediction")


def test_a_pipeline_of_other_channels_than_the_preset_names_is_refused(unbroken, train, tmp_path):
    config = json.loads(json.dumps(TINY))
    config["vqvae"] |= {"num_channels": 3, "channel_names": ["cell", "nucleus", "mitochondria"]}
    (tmp_path / "three.json").write_text(json.dumps(config))
    with pytest.raises(
        SystemExit, match=r"preset's channels \(cell, nucleus, mitochondria\), got .* with cell, nucleus"
    ):
        train("--preset", tmp_path / "three.json", "--pretrained", unbroken[0])


def test_the_codebooks_of_a_pipeline_are_not_made_one(unbroken, train):
    with pytest.raises(SystemExit, match="Expected a pipeline with one codebook for --share_codebook, got .*each cha"):
        train("--pretrained", unbroken[0], "--share_codebook")
    with pytest.raises(SystemExit, match="Expected latent_range among per_channel, absolute, cell, nucleus, got 'er'"):
        train("--pretrained", unbroken[0], "--stage", "diffusion", "--latent_range", "er")


# ---------------------------------------------------------------------- an adapter of another pipeline's U-Net


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A pipeline of two classes that predicts v, as it might have been trained; its weights are random."""
    torch.manual_seed(0)
    vqvae = MultiCodebookVQModel(sample_size=32, **TINY["vqvae"])
    vqvae.initialize_codebooks(torch.randn(4, 8, 8, 8, 8))
    unet = DualChannelUNet3D(2, 4, 8, num_class_embeds=2, **TINY["unet"])
    schedule = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "prediction_type": "v_prediction"}
    label2id = {"blebbistatin": 0, "nocodazole": 1}
    folder = tmp_path_factory.mktemp("base")
    BYOCPipeline(vqvae, unet, DDPMScheduler(**schedule), label2id=label2id).save_pretrained(folder)
    return folder


@pytest.fixture
def continue_base(train, base_dir, no_report):
    """Two steps of a stage on top of `base_dir`."""
    short = ("--max_train_steps", 2, "--gradient_accumulation_steps", 1, "--checkpointing_steps", 1)
    short = (*short, "--checkpoints_total_limit", 2, "--prediction_type", "v_prediction", "--held_out", 0)

    def run(*arguments, pretrained=base_dir, **options):
        return train("--num_phantoms", 4, *short, "--pretrained", pretrained, *arguments, **options)

    return run


LORA = ("--train_lora", "--stage", "diffusion", "--rank", 2, "--lora_class", "nocodazole", "--label", "binimetinib")


def test_an_adapter_is_trained_of_the_class_it_was_told(continue_base, base_dir, monkeypatch, tmp_path):
    """All but the adapter stays as it is; the report shows the pipeline with it, of that class."""
    reports = []
    monkeypatch.setattr(training_runs, "write_report", lambda *args, **options: reports.append(args))
    labels = []
    loss = diffusion.diffusion_loss
    monkeypatch.setattr(diffusion, "diffusion_loss", lambda *args: labels.append(args[5]) or loss(*args))
    output_dir = continue_base(*LORA, "--no-use_ema")
    assert all(label.tolist() == [1, 1] for label in labels) and len(labels) == 2
    (pipeline, cells, _, opening), *_ = reports
    assert "(binimetinib)" in opening and f"adapter of {base_dir} from its class nocodazole" in opening
    assert cells.class_names == ["blebbistatin", "binimetinib"] and set(cells.labels) == {1}
    assert pipeline.get_active_adapters() == ["default_0"]
    assert not list(output_dir.glob("*/diffusion_pytorch_model.safetensors"))

    trained = load_file(output_dir / "diffusion/checkpoint-2/model.safetensors")
    base = load_file(base_dir / "unet/diffusion_pytorch_model.safetensors")
    kept = [name for name in trained if "lora_" not in name]
    assert kept and all(torch.equal(trained[name], base[name.replace("base_layer.", "")]) for name in kept)
    adapter = load_file(output_dir / "pytorch_lora_weights.safetensors")
    changed = [name for name, tensor in adapter.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(changed) == len(adapter) / 2

    shutil.copytree(output_dir / "diffusion/checkpoint-1", tmp_path / "broken/diffusion/checkpoint-1")
    resumed = ("--no-use_ema", "--resume_from_checkpoint", "latest")
    continue_base(*LORA, *resumed, output_dir=tmp_path / "broken")
    assert_same_weights(tmp_path / "broken", output_dir, ["pytorch_lora_weights.safetensors"])
    with pytest.raises(SystemExit, match="Expected lora_class 'nocodazole', with which .*, got 'blebbistatin'"):
        continue_base(*LORA, *resumed, "--lora_class", "blebbistatin", output_dir=tmp_path / "broken")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 4], "Expected --train_lora for --rank, got none"),
        (["--lora_class", "x"], "Expected --train_lora for --lora_class, got none"),
        (["--train_lora", "--stage", "diffusion"], "Expected a pipeline to adapt in --pretrained for --train_lora"),
        (["--train_lora", "--pretrained", "x"], "Expected --stage diffusion for --train_lora, got --stage all"),
        (
            ["--train_lora", "--pretrained", "x", "--stage", "diffusion", "--latent_scaling", "cell"],
            "Expected no --latent_scaling with --train_lora",
        ),
        (["--num_distilled_steps", 4], "Expected --stage distillation for --num_distilled_steps, got --stage all"),
        (["--stage", "distillation"], "Expected a teacher in --pretrained for --stage distillation, got none"),
        (
            ["--stage", "distillation", "--pretrained", "x", "--num_teacher_steps", 8],
            "Expected --distillation_method progressive for --num_teacher_steps, got moment_matching",
        ),
        (["--weak_unet", "x"], "Expected a --pretrained pipeline and --stage diffusion for --weak_unet"),
        (
            ["--reset_unet", "--pretrained", "x", "--stage", "diffusion", "--vqvae_path", "y"],
            "Expected a --pretrained pipeline and --stage diffusion for --reset_unet, without --train_lora and",
        ),
        (
            ["--reset_unet", "--weak_unet", "x", "--pretrained", "x", "--stage", "diffusion"],
            "Expected --reset_unet, which makes a weak U-Net, or --weak_unet, which names it, got both",
        ),
        (["--autoguidance_scale", 2], "Expected a --weak_unet for --autoguidance_scale, got none"),
        (
            ["--weak_unet", "x", "--pretrained", "x", "--stage", "diffusion", "--autoguidance_start", 1],
            "Expected 0 <= --autoguidance_start < --autoguidance_stop <= 1, got 1 and 1",
        ),
        (
            ["--stage", "distillation", "--pretrained", "x", "--num_inference_steps", 4],
            "Expected no --num_inference_steps with --stage distillation",
        ),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(preset, arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse("--preset", preset, *arguments)
    assert message in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_its_pipeline_is_refused(continue_base, base_dir):
    with pytest.raises(SystemExit, match="Expected --lora_class among blebbistatin, nocodazole for .*, got None"):
        continue_base(*LORA[:3])
    with pytest.raises(SystemExit, match="Expected --lora_class among blebbistatin, nocodazole, got binimetinib"):
        continue_base(*LORA, "--lora_class", "binimetinib")
    with pytest.raises(SystemExit, match="Expected --sample_size 32, as .* has, got 40"):
        continue_base(*LORA, "--sample_size", 40)
    with pytest.raises(SystemExit, match="Expected an --output_dir of its own for the adapter, got .*holds a pipel"):
        continue_base(*LORA, output_dir=base_dir)


def test_what_a_training_from_a_pipeline_drops_is_said(continue_base, caplog):
    of_one = ("--stage", "diffusion", "--label", "nocodazole")
    continue_base(*of_one)
    assert "was told its class, this one will not be: --class_conditional keeps it" in caplog.text
    caplog.clear()
    continue_base(*of_one, "--class_conditional")
    assert "was told" not in caplog.text


# ---------------------------------------------------------------------- autoguidance


def test_a_pipeline_learns_to_move_away_from_a_weaker_one(continue_base, base_dir, monkeypatch, tmp_path):
    drugs = ("--stage", "diffusion", "--label", "blebbistatin", "nocodazole", "--class_conditional")
    weak = continue_base(*drugs, "--reset_unet", output_dir=tmp_path / "weak")
    of_weak, of_base = (load_file(folder / FINAL_WEIGHTS[1]) for folder in (weak, base_dir))
    assert not any(torch.allclose(of_weak[name], of_base[name]) for name in of_base if name.endswith("conv1.weight"))
    assert_same_weights(weak, base_dir, FINAL_WEIGHTS[:1])

    guides, loss = [], diffusion.diffusion_loss
    monkeypatch.setattr(diffusion, "diffusion_loss", lambda *args: guides.append(args[-1]) or loss(*args))
    guided = (*drugs, "--weak_unet", weak, "--autoguidance_scale", 2, "--autoguidance_stop", 0.8)
    whole = continue_base(*guided, output_dir=tmp_path / "guided")
    assert [(guide.scale, guide.start, guide.stop) for guide in guides] == [(2, 0, 0.8)] * 2
    for name, weight in guides[1].unet.state_dict().items():  # as it was at first, whatever has been learnt since
        torch.testing.assert_close(weight, of_base[name])
    assert BYOCPipeline.from_pretrained(whole)(1, class_labels="nocodazole").volumes.shape == (1, 2, 32, 32, 32)
    record = json.loads((whole / "arguments.json").read_text())
    assert record["diffusion"]["arguments"]["weak_unet"] == str(weak)

    shutil.copytree(whole / "diffusion/checkpoint-1", tmp_path / "broken/diffusion/checkpoint-1")
    resumed = ("--resume_from_checkpoint", "latest")
    continue_base(*guided, *resumed, output_dir=tmp_path / "broken")
    assert_same_weights(tmp_path / "broken", whole, FINAL_WEIGHTS[:2])
    for name, value in (("autoguidance_scale", 3), ("autoguidance_start", 0.1)):
        with pytest.raises(SystemExit, match=name):
            continue_base(*guided, f"--{name}", value, *resumed, output_dir=tmp_path / "broken")

    noise = continue_base(*drugs, "--reset_unet", "--prediction_type", "epsilon", output_dir=tmp_path / "noise")
    assert BYOCPipeline.from_pretrained(noise).config.prediction_type == "epsilon"
    with pytest.raises(SystemExit, match="Expected a --weak_unet with a scheduler as this run has, got others"):
        continue_base(*drugs, "--weak_unet", noise, output_dir=tmp_path / "w")
    with pytest.raises(SystemExit, match="Expected a --weak_unet with inputs as this run has, got others"):
        continue_base("--stage", "diffusion", "--label", "nocodazole", "--weak_unet", weak, output_dir=tmp_path / "x")
    other = ("--label", "binimetinib", "nocodazole")
    with pytest.raises(SystemExit, match="Expected a --weak_unet with classes as this run has, got others"):
        continue_base(*drugs[:2], *other, "--class_conditional", "--weak_unet", weak, output_dir=tmp_path / "y")


def test_the_scale_of_the_latents_stays_with_the_unet_that_knows_it(continue_base, base_dir, tmp_path):
    pipeline = BYOCPipeline.from_pretrained(base_dir)
    pipeline.vqvae.register_to_config(latent_scaling="cell")
    pipeline.vqvae.set_latent_statistics(None, torch.full((8,), 0.5))
    pipeline.save_pretrained(tmp_path / "base")
    diffusion_alone = ("--stage", "diffusion", "--label", "nocodazole", "--class_conditional")

    def statistics(*arguments, name):
        folder = continue_base(*arguments, pretrained=tmp_path / "base", output_dir=tmp_path / name)
        return BYOCPipeline.from_pretrained(folder).vqvae.config.latents_std

    assert statistics(*diffusion_alone, name="kept") == [0.5] * 8
    assert statistics("--label", "nocodazole", "--class_conditional", name="all") != [0.5] * 8
    vqvae_path = ("--vqvae_path", tmp_path / "base/vqvae")
    assert statistics(*diffusion_alone, *vqvae_path, name="path") != [0.5] * 8
    assert statistics(*diffusion_alone, "--latent_scaling", "standardize", name="scaled") != [0.5] * 8


# ---------------------------------------------------------------------- few steps


def test_a_pipeline_is_distilled_by_moment_matching(continue_base, base_dir, monkeypatch, tmp_path):
    few = ("--stage", "distillation", "--label", "nocodazole")
    calls, losses = [], distillation.moment_matching_losses
    monkeypatch.setattr(
        distillation, "moment_matching_losses", lambda *args: calls.append(args[6:10]) or losses(*args)
    )
    four = continue_base(*few, output_dir=tmp_path / "four")
    for timesteps, stops, _, class_labels in calls:
        assert set(timesteps.tolist()) <= {249, 499, 749, 999}
        assert ((0 < timesteps - stops) & (timesteps - stops <= 250) & (stops >= 0)).all()
        assert class_labels.tolist() == [1, 1]  # of the teacher's classes
    pipeline = BYOCPipeline.from_pretrained(four)
    assert (pipeline.config.num_distilled_steps, pipeline.config.default_num_inference_steps) == (4, 4)
    assert pipeline.config.distilled_scheduler == type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert pipeline(1, class_labels="nocodazole").volumes.shape == (1, 2, 32, 32, 32)
    assert_same_weights(four, base_dir, FINAL_WEIGHTS[:1])
    assert sorted(scalars(four, "distillation")["loss/auxiliary"]) == [1, 2]

    shutil.copytree(four / "distillation/checkpoint-1", tmp_path / "broken/distillation/checkpoint-1")
    continue_base(*few, "--resume_from_checkpoint", "latest", output_dir=tmp_path / "broken")
    assert_same_weights(tmp_path / "broken", four, FINAL_WEIGHTS[1:2])

    for method in ("moment_matching", "progressive"):
        message = f"Expected a teacher .* for --distillation_method {method}, got .*, distilled to 4 of DDPMScheduler"
        with pytest.raises(SystemExit, match=message):
            continue_base(*few, "--distillation_method", method, "--num_distilled_steps", 1, pretrained=four)


def test_a_pipeline_is_distilled_and_distilled_again(continue_base, base_dir, monkeypatch, tmp_path):
    few = ("--stage", "distillation", "--label", "nocodazole", "--distillation_method", "progressive")
    calls, loss = [], distillation.distillation_loss
    monkeypatch.setattr(distillation, "distillation_loss", lambda *args: calls.append(args[5:]) or loss(*args))
    four = continue_base(*few, "--num_teacher_steps", 8, output_dir=tmp_path / "four")
    for timesteps, stride, num_substeps, class_labels, *_ in calls:
        assert (stride, num_substeps) == (250, 2) and set(timesteps.tolist()) <= {249, 499, 749, 999}
        assert class_labels.tolist() == [1, 1]  # of the teacher's classes
    pipeline = BYOCPipeline.from_pretrained(four)
    assert (pipeline.config.num_distilled_steps, pipeline.config.default_num_inference_steps) == (4, 4)
    assert pipeline.config.label2id == {"blebbistatin": 0, "nocodazole": 1}
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline(1, class_labels="nocodazole").volumes.shape == (1, 2, 32, 32, 32)
    assert_same_weights(four, base_dir, FINAL_WEIGHTS[:1])
    unets = [load_file(folder / FINAL_WEIGHTS[1]) for folder in (base_dir, four)]
    assert any(not torch.equal(unets[0][name], unets[1][name]) for name in unets[0])
    assert sorted(scalars(four, "distillation")["loss/distillation"]) == [1, 2]

    shutil.copytree(four / "distillation/checkpoint-1", tmp_path / "broken/distillation/checkpoint-1")
    resumed = ("--num_teacher_steps", 8, "--resume_from_checkpoint", "latest")
    continue_base(*few, *resumed, output_dir=tmp_path / "broken")
    assert_same_weights(tmp_path / "broken", four, FINAL_WEIGHTS[1:2])

    with pytest.raises(SystemExit, match="Expected --num_teacher_steps 4, which .* was distilled to, got 8"):
        continue_base(*few, "--num_distilled_steps", 2, "--num_teacher_steps", 8, pretrained=four)
    with pytest.raises(SystemExit, match="Expected a teacher of a multiple of --num_distilled_steps 4, got one of 4"):
        continue_base(*few, pretrained=four)
    with pytest.raises(SystemExit, match="Expected --num_distilled_steps that divide the 1000 timesteps, got 3"):
        continue_base(*few, "--num_distilled_steps", 3)
    with pytest.raises(SystemExit, match="Expected cells of blebbistatin, nocodazole, which .*got binimetinib"):
        continue_base(*few[:2], "--label", "binimetinib", output_dir=tmp_path / "unknown")
    with pytest.raises(SystemExit, match="Expected a pipeline that takes any number of steps for --train_lora"):
        continue_base(*LORA, pretrained=four, output_dir=tmp_path / "adapter")
    one = continue_base(*few, "--num_distilled_steps", 1, pretrained=four, output_dir=tmp_path / "one")
    assert BYOCPipeline.from_pretrained(one).config.num_distilled_steps == 1
    assert json.loads((one / "arguments.json").read_text())["distillation"]["arguments"]["num_teacher_steps"] == 4


def test_few_steps_and_adapters_keep_the_conditions(continue_base, base_dir, monkeypatch, tmp_path):
    """The student learns under the doses of its teacher, and without them for the same share."""
    base = BYOCPipeline.from_pretrained(base_dir)
    unet = DualChannelUNet3D(
        *(2, 4, 8),
        class_embed_type="projection",
        projection_class_embeddings_input_dim=1,
        conditioning_dropout_prob=0.5,
        **TINY["unet"],
    )
    doses = measure_conditions({"dose_um": np.array([[0.0], [8.0]])})
    BYOCPipeline(base.vqvae, unet, base.scheduler, conditions=doses).save_pretrained(tmp_path / "doses")
    calls, losses = [], distillation.moment_matching_losses
    monkeypatch.setattr(distillation, "moment_matching_losses", lambda *args: calls.append(args[10]) or losses(*args))
    few = ("--stage", "distillation", "--phantom_doses", 2, "--train_batch_size", 8)
    four = continue_base(*few, pretrained=tmp_path / "doses", output_dir=tmp_path / "four")
    vectors = torch.cat(calls)
    given = vectors[vectors.isfinite()]
    assert 0 < len(given) < len(vectors) and given.tolist() == [-0.5] * len(given)
    pipeline = BYOCPipeline.from_pretrained(four)
    assert pipeline.config.conditions == doses
    pipeline(conditions={"dose_um": 3.0}, guidance_scale=2.0)

    adapter = (*LORA[:5], "--phantom_doses", 2)
    pipeline = BYOCPipeline.from_pretrained(tmp_path / "doses")
    pipeline.load_lora_weights(continue_base(*adapter, pretrained=tmp_path / "doses"))
    pipeline(conditions={"dose_um": 3.0}, num_inference_steps=1)
    with pytest.raises(SystemExit, match=r"Expected --condition_columns \['dose_um'\], as .*, got \['time_h'\]"):
        continue_base(*adapter, "--condition_columns", "time_h", pretrained=tmp_path / "doses")


def test_noise_predictions_are_not_distilled(train, base_dir, tmp_path):
    pipeline = BYOCPipeline.from_pretrained(base_dir)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon")
    BYOCPipeline(pipeline.vqvae, pipeline.unet, scheduler).save_pretrained(tmp_path / "epsilon")
    with pytest.raises(SystemExit, match="Expected a U-Net that predicts v or the sample for few steps, got .*noise"):
        train("--stage", "distillation", "--pretrained", tmp_path / "epsilon")


# ---------------------------------------------------------------------- arguments and their effects


def test_minutes_are_those_of_a_stage_or_of_all():
    def minutes(*arguments):
        args = parse(*arguments)
        return [train_run.settings_of(args, stage).max_train_minutes for stage in train_run.stages_of(args)]

    assert minutes() == [None, None, None]
    assert minutes("--max_train_minutes", 3) == [3, 3, 3]
    assert minutes("--max_train_minutes", 3, "--texture_max_train_minutes", 1) == [3, 1, 3]
    assert minutes("--diffusion_max_train_minutes", 1) == [None, None, 1]


def test_common_arguments_reach_both_stages_and_a_stages_own_wins(preset):
    common = ["--max_train_steps", 7, "--learning_rate", 0.5, "--train_batch_size", 3, "--lr_scheduler", "linear"]
    args = parse("--preset", preset, *common, "--diffusion_learning_rate", 0.25)
    assert args.autoencoder_max_train_steps == args.diffusion_max_train_steps == 7
    assert args.autoencoder_train_batch_size == args.diffusion_train_batch_size == 3
    assert args.autoencoder_lr_scheduler == args.diffusion_lr_scheduler == "linear"
    assert (args.autoencoder_learning_rate, args.diffusion_learning_rate) == (0.5, 0.25)


def test_the_ablations_are_trained_by_arguments(train, no_report, tmp_path):
    train("--share_codebook", output_dir=tmp_path / "unimodal")
    unimodal = BYOCPipeline.from_pretrained(tmp_path / "unimodal")
    assert unimodal.vqvae.config.share_codebook and len(unimodal.vqvae.codebooks) == 1
    assert scalars(tmp_path / "unimodal", "autoencoder")["validation/usage/shared"]

    arguments = ("--stage", "diffusion", "--vqvae_path", tmp_path / "unimodal" / "vqvae")
    train(*arguments, "--latent_range", "absolute", output_dir=tmp_path / "absolute")
    assert BYOCPipeline.from_pretrained(tmp_path / "absolute").vqvae.config.latent_range == "absolute"
    with pytest.raises(SystemExit, match="Expected vqvae.latent_range 'absolute', with which .*, got 'cell'"):
        arguments = (*arguments, "--resume_from_checkpoint", "latest")
        train(*arguments, "--latent_range", "cell", output_dir=tmp_path / "absolute")


def test_what_the_command_line_leaves_out_is_what_the_settings_leave_out():
    """The defaults stand in both, as the parser must not import torch."""
    args = train_arguments._make_parser("").parse_args([])
    for stage, settings in train_networks.SETTINGS.items():
        assert train_run.settings_of(args, stage) == settings(max_train_steps=100_000)
    assert list(train_networks.SETTINGS) == list(train_arguments.STAGES)


def test_epochs_become_steps_unless_steps_are_given(preset):
    args = parse("--preset", preset, "--num_train_epochs", 3, "--diffusion_max_train_steps", 9)
    train_arguments.set_train_steps(args, num_cells=10, num_processes=2)
    assert args.autoencoder_max_train_steps == 4  # 30 cells in batches of 2 processes x 2 cells x 2 accumulated
    assert args.diffusion_max_train_steps == 9


@pytest.mark.parametrize(
    ("arguments", "decays"),
    [
        # min(0.3, 1 - (1 + t / 2) ** -0.5), and 0 in the first step
        (["--use_ema_warmup", "--ema_inv_gamma", 2, "--ema_power", 0.5, "--ema_decay", 0.3], [0.1835, 0.2929, 0.3]),
        # min(0.2, (1 + t) / (10 + t))
        (["--ema_decay", 0.2], [2 / 11, 0.2, 0.2]),
    ],
)
def test_the_moving_average_of_the_weights(unbroken, train, no_report, arguments, decays):
    """Worked out again from every step's weights, to the average that the saved U-Net is."""
    every_step = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 4, "--gradient_accumulation_steps", 1]
    vqvae = ["--vqvae_path", unbroken[0] / "vqvae"]
    output_dir = train("--stage", "diffusion", *vqvae, *every_step, *arguments)
    weights = [load_file(output_dir / f"diffusion/checkpoint-{step}/model.safetensors") for step in range(1, 5)]
    unet = DualChannelUNet3D.from_pretrained(output_dir, subfolder="unet")
    for name, got in unet.named_parameters():
        average = weights[0][name]
        for decay, weight in zip(decays, weights[1:], strict=True):
            average = decay * average + (1 - decay) * weight[name]
        torch.testing.assert_close(got.detach(), average, rtol=1e-4, atol=1e-5)


def test_an_autoencoder_serves_cubes_of_another_size(unbroken, train, no_report):
    arguments = ["--vqvae_path", unbroken[0] / "vqvae", "--sample_size", 40, "--max_train_steps", 1]
    pipeline = BYOCPipeline.from_pretrained(train("--stage", "diffusion", *arguments))
    assert pipeline(num_inference_steps=1).volumes.shape == (1, 2, 40, 40, 40)
    assert pipeline.volume_processor.config.sample_size == pipeline.vqvae.config.sample_size == 40


def test_accumulated_batches_are_one_large_batch(unbroken, train, no_report, monkeypatch, tmp_path):
    """Two batches of two make the step of a batch of four, with a loss that draws nothing per batch."""
    monkeypatch.setattr(
        diffusion,
        "diffusion_loss",
        lambda unet, scheduler, clean, noise, *_: (
            unet(clean, torch.zeros(len(clean)), return_dict=False)[0].square().mean()
        ),
    )
    monkeypatch.setattr(diffusion, "validate_diffusion", lambda *_: {})
    common = ["--stage", "diffusion", "--vqvae_path", unbroken[0] / "vqvae", "--max_grad_norm", 0]
    accumulated = train(*common, "--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    at_once = [*common, "--train_batch_size", 4, "--gradient_accumulation_steps", 1]
    at_once = train(*at_once, output_dir=tmp_path / "at_once")
    weights, expected = (
        load_file(folder / "diffusion/checkpoint-4/model.safetensors") for folder in (accumulated, at_once)
    )
    error = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    assert torch.quantile(error, 0.995) < 1e-5  # Adam makes steps out of rounding errors where there is no gradient


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--loss_type", "l1"], lambda noise, clean, signal, spread: noise.abs().mean()),
        (["--loss_type", "l2"], lambda noise, clean, signal, spread: noise.square().mean()),
        (["--prediction_type", "sample"], lambda noise, clean, signal, spread: clean.abs().mean()),
        (
            ["--prediction_type", "v_prediction"],
            lambda noise, clean, s, spread: (s * noise - spread * clean).abs().mean(),
        ),
        (
            ["--loss_type", "l2", "--snr_gamma", 5],
            lambda noise, clean, s, spread: (
                (s / spread).square().clamp(max=5) * (spread / s * noise).square()
            ).mean(),
        ),
    ],
    ids=["l1", "l2", "sample", "v_prediction", "snr_gamma"],
)
def test_the_loss_that_was_asked_for(unbroken, train, monkeypatch, arguments, expected):
    """Of a network that predicts zeros, in closed form from the noise, the latents and the schedule of a step."""
    original = diffusion.diffusion_loss

    class Seen(Exception):
        pass

    def zeros(sample, timestep, class_labels=None, return_dict=True):
        return (torch.zeros_like(sample),)

    def compare(unet, scheduler, clean, noise, timesteps, *options):
        cumulative = torch.cumprod(1 - scheduler.betas, 0)[timesteps].view(-1, 1, 1, 1, 1)
        loss = original(zeros, scheduler, clean, noise, timesteps, *options)
        wanted = expected(noise, clean, cumulative.sqrt(), (1 - cumulative).sqrt())
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
        raise Seen

    monkeypatch.setattr(diffusion, "diffusion_loss", compare)
    with pytest.raises(Seen):
        train("--stage", "diffusion", "--vqvae_path", unbroken[0] / "vqvae", *arguments)


def test_arguments_that_must_not_change_the_run(unbroken, train, monkeypatch, tmp_path):
    """Gradient checkpointing, loaders, TF32 where there is none, and Weights & Biases beside TensorBoard."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    checkpoint, calls = torch.utils.checkpoint.checkpoint, []
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *args, **kwargs: calls.append(args) or checkpoint(*args, **kwargs)
    )
    output_dir = train(
        *("--gradient_checkpointing", "--dataloader_num_workers", 1, "--allow_tf32", "--report_to", "all")
    )
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    assert {type(args[0].__self__).__name__ for args in calls} == {"Sequential", "UNetBlock"}  # of both networks
    for stage in ("autoencoder", "diffusion"):
        for tag, expected in scalars(unbroken[0], stage).items():
            assert scalars(output_dir, stage)[tag] == pytest.approx(expected, rel=1e-4, abs=1e-5), tag
    runs = sorted((output_dir / "wandb").glob("offline-run-*"))
    for run, loss in zip(runs, (b"loss/reconstruction", b"loss/diffusion"), strict=True):
        (log,) = run.glob("*.wandb")
        assert loss in log.read_bytes()
        assert [path.name[:10] for path in sorted(run.glob("files/media/images/*"))] == ["samples_3_", "samples_4_"]


def test_eight_bit_adam(unbroken, train, no_report, tmp_path):
    """The larger weights' moments are bytes, and come back from a checkpoint."""
    pytest.importorskip("bitsandbytes")
    arguments = ["--stage", "diffusion", "--vqvae_path", unbroken[0] / "vqvae", "--use_8bit_adam"]
    train(*arguments, "--checkpoints_total_limit", 2)
    file = tmp_path / "out/diffusion/checkpoint-4/optimizer.bin"
    states = torch.load(file, weights_only=False)["state"].values()
    moments = [state["__bnb_optimizer_quant_state__"]["state1"] for state in states]
    assert {m.dtype for m in moments if m.numel() >= 4096} == {torch.uint8}
    (weights := tmp_path / "out/unet/diffusion_pytorch_model.safetensors").rename(expected := tmp_path / "expected")
    train(*arguments, "--resume_from_checkpoint", "checkpoint-2")
    assert_same_weights(weights, expected, [""])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_networks_train_to_the_same_end(unbroken, preset, tmp_path):
    """To rounding, which moves single vectors to other codes; hence the losses that no one code decides."""
    command = [SCRIPT, "--preset", preset, "--output_dir", tmp_path, "--compile"]
    output = run_process(["-c", COMPILED, *command], timeout=1700).stdout
    assert int(output.rsplit("compiled graphs: ", 1)[1]) >= 3  # autoencoder, discriminator, U-Net
    for stage, tag in (("autoencoder", "loss/reconstruction"), ("diffusion", "loss/diffusion")):
        assert scalars(tmp_path, stage)[tag] == pytest.approx(scalars(unbroken[0], stage)[tag], rel=5e-3), tag
    for file in FINAL_WEIGHTS:
        assert load_file(tmp_path / file).keys() == load_file(unbroken[0] / file).keys(), file
    assert BYOCPipeline.from_pretrained(tmp_path)(1).volumes.shape == (1, 2, 32, 32, 32)
    # and on without compiling
    again = ["--resume_from_checkpoint", "checkpoint-4", "--stage", "diffusion"]
    run_process([SCRIPT, "--preset", preset, "--output_dir", tmp_path, *again])


def test_a_private_repository_is_filled(preset, hub):
    """Pipeline, card, report; no checkpoint, no log, no latent."""
    arguments = ["--preset", str(preset), "--max_train_steps", "1", "--push_to_hub"]
    arguments += ["--hub_model_id", "org/phantoms", "--hub_private_repo"]
    loaded = 'print(BYOCPipeline.from_pretrained("org/phantoms")(1).volumes.shape)'
    code = "from diffusers_byoc import BYOCPipeline; from diffusers_byoc.commands.train import main"
    assert hub.run(f"{code}; main({arguments!r}); {loaded}").endswith("\n(1, 2, 32, 32, 32)\n")
    assert hub.repos["models/org/phantoms"]["private"]
    files = hub.files("org/phantoms")
    weights = [
        f"{part}/diffusion_pytorch_model{end}.safetensors" for part in ("unet", "vqvae") for end in ("", ".fp16")
    ]
    configs = ["scheduler/scheduler_config.json", "unet/config.json", "vqvae/config.json"]
    pages = ["README.md", "cells.png", "model_index.json", "report.md", "surfaces.png"]
    assert sorted(files) == sorted([*pages, *weights, *configs])
    card = files["README.md"].decode()
    assert "# phantoms" in card and "They are not microscopy" in card and "| autoencoder | 1 | " in card
    assert "license: apache-2.0" in card and "phantoms (nocodazole), drawn by a formula" in card
    assert 'from_pretrained("org/phantoms")' in card


def test_diffusion_arguments_are_in_the_pipeline(train):
    """Without a moving average, the saved U-Net is the last one; the card of a phantoms' model says phantoms."""
    output_dir = train(
        *("--no-use_ema", "--prediction_type", "sample", "--latent_scaling", "standardize", "--snr_gamma", 5),
        *("--max_train_steps", 2, "--allow_tf32"),
    )
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    pipeline = BYOCPipeline.from_pretrained(output_dir)
    assert pipeline.scheduler.config.prediction_type == "sample"
    assert pipeline.vqvae.config.latent_scaling == "standardize" and pipeline.vqvae.config.latents_std is not None
    last = load_file(output_dir / "diffusion/checkpoint-2/model.safetensors")
    assert all(torch.equal(weight, last[name]) for name, weight in pipeline.unet.state_dict().items())
    assert sorted(scalars(output_dir, "diffusion")["validation/diffusion"]) == [2]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples/configs/accelerate").iterdir()), ids=lambda p: p.stem)
def test_accelerate_reads_the_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    assert config.distributed_type == yaml.safe_load(path.read_text())["distributed_type"]


# ---------------------------------------------------------------------- the paper's configuration


def test_the_paper_preset_is_tables_2_and_3():
    args = parse("--preset", "paper", "--train_data_dir", "my_cells")
    table_2 = {
        "autoencoder_learning_rate": 3e-4,
        "autoencoder_train_batch_size": 2,
        "autoencoder_max_train_steps": 100_000,
    }
    table_3 = {"diffusion_learning_rate": 1e-4, "diffusion_train_batch_size": 2, "loss_type": "l1", "ema_decay": 0.995}
    both = {"optimizer": "adam", "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_weight_decay": 0.0}
    text = {"gradient_checkpointing": True, "mixed_precision": "auto"}  # fp16 on a GPU
    constant = {"autoencoder_lr_scheduler": "constant", "diffusion_lr_scheduler": "constant", "lr_warmup_steps": 0}
    expected = table_2 | table_3 | both | text | constant | {"use_ema_warmup": False, "sample_size": 64}
    assert {name: getattr(args, name) for name in expected} == expected

    with torch.device("meta"):
        vqvae = train_run.make_autoencoder(args)
        unet = train_run.make_unet(args, vqvae, num_classes=1)
    assert vqvae.config.latent_channels == unet.config.latent_channels == 16
    assert vqvae.config.num_vq_embeddings == 1024 and vqvae.config.commitment_cost == 0.25
    assert vqvae.config.use_ema_codebook and vqvae.config.latent_scaling == "codebook_range"
    assert len(vqvae.codebooks) == 2 and len(vqvae.encoders) == 1
    assert tuple(vqvae.config.channel_names) == ("cell", "nucleus") and unet.config.num_channels == 2
    assert unet.config.sample_size == 16  # 64 / 4

    widths = unet.config.block_out_channels
    assert [width // widths[0] for width in widths] == [1, 2, 4, 8]
    assert unet.config.num_class_embeds is None
    kernels = {name: m.kernel_size for name, m in unet.named_modules() if isinstance(m, torch.nn.Conv3d)}
    assert {size for name, size in kernels.items() if "shortcut" not in name} == {(3, 3, 3)}
    norms = [m for name, m in unet.named_modules() if type(m).__name__ == "InstanceNorm"]
    assert norms and all(norm.num_groups == len(norm.weight) for norm in norms)  # one group per feature
    attentions = [
        [x.axes for x in block.attentions] for block in (*unet.down_blocks, *unet.mid_blocks, *unet.up_blocks)
    ]
    both = ["spatial", "depth"]  # at the end of each level down, in the middle, at the end of each level up
    assert attentions == [*([[], both] * 4), both, [], *([[], both] * 4)]
    assert args.scheduler == {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "epsilon",
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_paper_preset_starts(tmp_path):
    folder = make_folder(tmp_path / "cells", **{f"cell_{index}": make_cell(index, size=40) for index in range(4)})
    steps = ["--autoencoder_max_train_steps", 1, "--diffusion_max_train_steps", 1]
    command = [SCRIPT, "--preset", "paper", "--train_data_dir", folder, "--output_dir", tmp_path / "out", *steps]
    run_process([*command, "--num_samples", 1, "--num_inference_steps", 2], timeout=840)
    pipeline = BYOCPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.unet.config.block_out_channels == [64, 128, 256, 512]
    assert pipeline(1, num_inference_steps=1).volumes.shape == (1, 2, 64, 64, 64)


# ---------------------------------------------------------------------- two processes


def torchrun(*command):
    return run_process(["-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone", *command])


def test_two_processes_of_half_the_batch_are_the_unbroken_run(unbroken, preset, tmp_path):
    """The unbroken run's batch of two, one cell a process, with accumulation, codebooks and revival."""
    half_batch = ["--train_batch_size", 1]
    torchrun(SCRIPT, "--preset", preset, "--output_dir", tmp_path, *half_batch)
    for stage in ("autoencoder", "diffusion"):
        for tag, expected in scalars(unbroken[0], stage).items():
            assert scalars(tmp_path, stage)[tag] == pytest.approx(expected, rel=1e-3, abs=1e-5), tag


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "others",
    [
        ["--gradient_accumulation_steps", 1],
        # and a number of cells that no batch divides
        ["--gradient_accumulation_steps", 2, "--gradient_checkpointing", "--num_phantoms", 9],
    ],
    ids=["plain", "accumulated"],
)
def test_two_processes_of_half_the_batch_train_as_one(preset, tmp_path, others):
    """To rounding: sums over processes are added up in another order.

    Adam divides by the gradient's own size, so where the true gradient is zero (a bias before an instance norm) it
    makes steps of the learning rate out of rounding errors; hence a bound on 99.5 % of the numbers.
    """
    arguments = ["--preset", preset, *others]
    one, two = tmp_path / "one", tmp_path / "two"
    whole_batch = ["--autoencoder_train_batch_size", 4, "--diffusion_train_batch_size", 4]
    run_process([SCRIPT, *arguments, *whole_batch, "--output_dir", one])
    output = torchrun(SCRIPT, *arguments, "--output_dir", two).stderr
    assert "autoencoder: 2 process(es)" in output and "diffusion: 2 process(es)" in output

    for stage in ("autoencoder", "diffusion"):
        for tag, expected in scalars(one, stage).items():
            got = scalars(two, stage)[tag]
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6), tag
    for file in FINAL_WEIGHTS:
        weights, expected = load_file(two / file), load_file(one / file)
        error = torch.cat([(weights[name].float() - expected[name].float()).abs().flatten() for name in expected])
        assert torch.quantile(error, 0.995) < 1e-5, file
    for m in range(2):
        codes = [MultiCodebookVQModel.from_pretrained(d, subfolder="vqvae").codebooks[m].embedding for d in (one, two)]
        torch.testing.assert_close(*codes, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("others", [{}, {"use_ema_codebook": False, "share_encoder": False}])
def test_two_processes_hold_the_same_autoencoder(tmp_path, others):
    preset = tmp_path / "others.json"
    preset.write_text(json.dumps(TINY | {"vqvae": TINY["vqvae"] | others}))
    recorder = tmp_path / "every_rank.py"
    recorder.write_text(EVERY_RANK)
    torchrun(recorder, tmp_path, "--preset", preset, "--output_dir", tmp_path / "out")
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
