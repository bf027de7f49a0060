"""byoc-reproduce: its arguments, and whole reproductions at tiny size."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_byoc.commands.reproduce import main, make_plan, parse_args


REPOSITORY = Path(__file__).parents[2]
TRAINING = {
    **{"max_train_steps": 2, "train_batch_size": 2, "checkpointing_steps": 1, "num_samples": 1},
    **{"mixed_precision": "no", "num_cpu_threads": 1, "validation_steps": 2},
}
W_GAN = {"arguments": TRAINING, "model": {"latent_dim": 8, "base_channels": 4}}
BYOC = {
    "arguments": TRAINING | {"num_inference_steps": 2, "discriminator_start": 2},
    "vqvae": {"block_out_channels": [4, 8], "layers_per_block": 1, "latent_channels": 2, "num_vq_embeddings": 8},
    "unet": {"block_out_channels": [8, 8], "layers_per_block": 1},
}


@pytest.fixture
def preset(tmp_path):
    """Two models, one drug, two folds."""
    for name, content in (("w_gan", W_GAN), ("byoc", BYOC)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    path = tmp_path / "reproduction.json"
    content = {
        "drugs": ["nocodazole"],
        "num_folds": 2,
        "train_each_fold": False,
        "train_minutes": 5,
        "cells": {"num_phantoms": 24, "sample_size": 32},
        "training": {"held_out": 0.2},
        "models": {
            "w_gan": {"arguments": {"preset": str(tmp_path / "w_gan.json")}},
            "byoc": {
                "arguments": {"preset": str(tmp_path / "byoc.json")},
                "shares": {"autoencoder": 0.5, "diffusion": 0.5},
            },
        },
        "ablation": {},
        "tuning": {"factors": [0.5, 1.0], "minutes": 1, "num_samples": 10, "criterion": "morphology/frechet"},
        "evaluation": {
            **{"num_samples": 10, "features": ["morphology"], "volume_classifier": False},
            **{"num_cpu_threads": 1, "neighbours": 2},
        },
    }
    path.write_text(json.dumps(content))
    return path


def start(script, preset, *arguments):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, REPOSITORY / "examples" / script, "--preset", preset, "--output_dir", "out", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], cwd=preset.parent, env=environment, **pipes)


def run(*command, check=True):
    process = start(*command)
    out, err = process.communicate(timeout=1000)
    assert not check or process.returncode == 0, out + err + "".join(logs(command[1].parent))
    return out if check else (process.returncode, err)


def logs(folder):
    return [path.read_text()[-2000:] for path in folder.rglob("log.txt")]


def plan(*arguments):
    return make_plan(parse_args([*arguments]))


# ---------------------------------------------------------------------- arguments


def test_models_that_the_preset_lacks_are_refused(tmp_path):
    entries = json.loads((REPOSITORY / "src/diffusers_byoc/commands/presets/reproduction/cpu.json").read_text())
    entries["models"] = {"w_gan": entries["models"]["w_gan"]}
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"--models of the preset \(w_gan\), got byoc"):
        plan("table1", "--preset", str(tmp_path / "mine.json"), "--models", "byoc", "w_gan")


def test_the_command_line_wins_over_the_preset():
    args = [
        "--train_minutes",
        "2",
        "--num_folds",
        "4",
        "--label",
        "a",
        "b",
        "--models",
        "byoc",
        "w_gan",
        "--seed",
        "7",
    ]
    found = plan("table1", *args, "--num_phantoms", "50", "--sample_size", "32", "--med3d", "weights")
    assert (found.train_minutes, found.num_folds, found.seed) == (2, 4, 7)
    assert found.drugs == ["a", "b"] and list(found.models) == ["w_gan", "byoc"]
    assert found.cells["num_phantoms"] == found.evaluation["num_phantoms"] == 50 and found.cells["sample_size"] == 32
    assert found.evaluation["features"] == ["med3d", "morphology", "texture"]
    assert found.evaluation["med3d"] == "weights" and not found.train_each_fold
    assert plan("table1").cells["num_phantoms"] == 480  # a default is no word of the command line
    assert plan("figure6", "--train_data_dir", "x", "--train_each_fold").train_each_fold


def test_weights_that_are_not_there_are_missed_before_the_training(tmp_path):
    arguments = ["table1", "--med3d", str(tmp_path / "none.pth"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="Expected .*none.pth"):
        main([*arguments, "--job", "0"])
    assert not (tmp_path / "out").exists()
    main([*arguments, "--list_jobs"])  # needs none


def test_help_waits_for_no_torch():
    code = "import sys; from diffusers_byoc.commands.reproduce import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\nprint({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n") and "--list_jobs" in done.stdout


def test_models_belong_to_the_table(capsys):
    with pytest.raises(SystemExit):
        parse_args(["figure6", "--models", "byoc"])
    assert "Expected no --models for figure6" in capsys.readouterr().err


def test_jobs_are_listed_with_what_they_need_and_nothing_is_run(preset):
    lines = run("reproduce_table1.py", preset, "--list_jobs", "--tune").splitlines()
    words = [line.split() for line in lines]
    assert [entry[1] for entry in words] == ["tune"] * 4 + ["train"] * 2 + ["evaluate"] * 2
    assert words[5] == ["5", "train", "waiting", "train/nocodazole/byoc/all", "after", "2", "3"]
    assert words[7][-2:] == ["after", "5"] and not (preset.parent / "out").exists()
    code, error = run("reproduce_table1.py", preset, "--job", "3", check=False)
    assert code and "Expected jobs 1 done before 3, got them open" in error and "Traceback" not in error


def test_bad_input_is_one_line(preset):
    for arguments, message in [
        (["--preset", "gpu"], "Expected --preset cpu, paper or a JSON file, got gpu"),
        (["--train_data_dir", "mine"], "Add --train_each_fold"),
        (["--job", "9"], "Expected --job from 0 to 3, got 9"),
    ]:
        code, error = run("reproduce_table1.py", preset, *arguments, check=False)
        assert code and message in error and len(error.splitlines()) == 1


SBATCH = """#!/bin/bash
echo "$*" >> sbatch.txt
wc -l < sbatch.txt
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_clusters_script_submits_each_kind_after_the_one_before(preset):
    (preset.parent / "sbatch").write_text(SBATCH)
    (preset.parent / "sbatch").chmod(0o755)
    (preset.parent / "examples").symlink_to(REPOSITORY / "examples")
    path = f"{preset.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY / "src")}
    script = [
        "bash",
        "examples/slurm/reproduce.sh",
        "table1",
        "--preset",
        str(preset),
        "--tune",
        "--output_dir",
        "a b",
    ]
    subprocess.run(script, cwd=preset.parent, env=environment, check=True, timeout=100)
    tune, train, evaluate, table = (preset.parent / "sbatch.txt").read_text().splitlines()
    for kind, line, numbers in (("tune", tune, "0,1,2,3"), ("train", train, "4,5"), ("evaluate", evaluate, "6,7")):
        assert f"--job-name table1-{kind} --array {numbers} --signal B:TERM@120" in line
        assert line.endswith(r"--output_dir a\ b  --job $SLURM_ARRAY_TASK_ID")
    assert "afterany" not in tune and "--dependency afterany:1 " in train and "--dependency afterany:2 " in evaluate
    assert "--dependency afterany:3 " in table and table.endswith("--write_only")


# ---------------------------------------------------------------------- whole reproductions


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_table_1_is_made_after_interruptions_and_nothing_twice(preset):
    """Killed in the middle of a training; one job alone; the rest by two processes; then nothing is left."""
    out = preset.parent / "out"
    process, trained = start("reproduce_table1.py", preset), out / "train" / "nocodazole" / "byoc" / "all" / "run"
    deadline = time.monotonic() + 500
    while not list(trained.glob("*/checkpoint-1")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 143 and not (trained / "model_index.json").exists()

    run("reproduce_table1.py", preset, "--job", "0")  # is done: nothing happens
    text = run("reproduce_table1.py", preset, "--num_processes", "2")
    assert "Job 0," not in text and "is done: 4 of 4." in text
    page = (out / "table1.md").read_text()
    assert "| nocodazole | W-GAN |" in page and "| nocodazole | BYOC |" in page and "| nocodazole | *real* |" in page
    rows = {row["model"]: row for row in json.loads((out / "table1.json").read_text())["rows"]}
    assert [len(row["folds"]) for row in rows.values()] == [2, 2]
    assert rows["byoc"]["efforts"][0]["diffusion"]["samples"] == 4  # 2 steps of 2
    assert rows["w_gan"]["speed"]["parameters"] < rows["byoc"]["speed"]["parameters"]
    assert all(row["speed"]["seconds_per_cell"] > 0 for row in rows.values())

    assert list((out / "cache" / "nocodazole").iterdir()) and not list(out.rglob("evaluation/cache"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in ("done.json", "metrics.json")}
    text = run("reproduce_table1.py", preset)
    assert "Job" not in text and len(before) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, error = run("reproduce_table1.py", preset, "--train_minutes", "6", check=False)
    assert code and "Expected byoc-train-baseline max_train_minutes 5.0 in " in error and "got 6.0" in error


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_figure_6_is_made_of_two_trainings(preset):
    run("reproduce_figure6.py", preset, "--num_processes", "2")
    out = preset.parent / "out"
    assert (out / "figure6.png").stat().st_size > 1000
    rows = {row["model"]: row for row in json.loads((out / "figure6.json").read_text())["rows"]}
    assert list(rows) == ["unimodal", "absolute", "cell", "nucleus", "byoc"]
    assert len(list(out.glob("train/*/*/all/run/model_index.json"))) == 2
    records = [json.loads((out / f"evaluate/nocodazole/{name}/all/evaluation/generated/generation.json").read_text())
               for name in ("byoc", "cell", "absolute")]  # fmt: skip
    assert [record["latent_range"] for record in records] == [None, "cell", "absolute"]
    assert records[0]["weights"] == records[1]["weights"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_learning_rates_are_tuned_by_short_runs(preset):
    run("reproduce_table1.py", preset, "--models", "w_gan", "--tune")
    out = preset.parent / "out"
    record = json.loads((out / "table1.json").read_text())
    scores = record["learning_rates"]["w_gan"]
    assert list(scores) == ["0.5", "1"]
    best = min(scores, key=scores.get)
    trained = json.loads((out / "train/nocodazole/w_gan/all/job.json").read_text())["byoc-train-baseline"]
    assert trained["learning_rate"] == pytest.approx(1e-4 * float(best))
