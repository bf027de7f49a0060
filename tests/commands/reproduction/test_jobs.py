"""Jobs in folders: done, changed, held, interrupted; with commands that do nothing but leave their files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_byoc.commands.reproduction import jobs as jobs_module
from diffusers_byoc.commands.reproduction import running
from diffusers_byoc.commands.reproduction.jobs import HELD, Jobs
from diffusers_byoc.commands.reproduction.plan import TABLE, read_plan
from diffusers_byoc.whole_files import lock_folder


REPOSITORY = Path(__file__).parents[3]


def plan_of(models=("w_gan", "byoc"), **more):
    plan = read_plan("cpu", drugs=["nocodazole"], **more)
    return read_plan("cpu", drugs=["nocodazole"], models={name: plan.models[name] for name in models}, **more)


@pytest.fixture
def make(tmp_path):
    """Jobs 0 and 1 train, 2 and 3 evaluate what they trained."""
    return lambda *args, **more: Jobs(plan_of(*args, **more).jobs(TABLE), tmp_path)


@pytest.fixture
def ran(monkeypatch):
    """Names of the jobs that ran, in their order, with what their commands were told."""
    ran = []

    def run_commands(job, commands):
        ran.append((job.name, [command.argv(**more) for command, more in commands]))
        for command, more in commands:
            folder = Path(more["output_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ("metrics.json" if command.name == "byoc-evaluate" else "model_index.json")).write_text("{}")
        return {"score": {"0.3": 7.0, "1": None, "3": 5.0}.get(job.name.rpartition("/")[2])}

    monkeypatch.setattr(running, "run_commands", run_commands)
    return ran


def test_a_job_runs_once_after_those_that_it_needs(make, ran, tmp_path):
    jobs = make()
    assert [jobs.state(job) for job in jobs.jobs] == ["open", "open", "waiting", "waiting"]
    with pytest.raises(ValueError, match="Expected jobs 0 done before 2"):
        jobs.run(2)
    assert not ran
    jobs.run(0, num_cpu_threads=3)
    jobs.run(0)
    jobs.run(2)
    (training, (trained,)), (evaluation, (evaluated,)) = ran
    assert (training, evaluation) == ("train/nocodazole/w_gan/all", "evaluate/nocodazole/w_gan/all")
    run = str(tmp_path / training / "run")
    assert trained[trained.index("--output_dir") + 1] == run and trained[trained.index("--num_cpu_threads") + 1] == "3"
    assert trained[trained.index("--resume_from_checkpoint") + 1] == "latest"
    assert evaluated[evaluated.index("--pretrained") + 1] == run
    assert evaluated[evaluated.index("--cache_dir") + 1] == str(tmp_path / "cache" / "nocodazole")
    assert [jobs.state(job) for job in jobs.jobs] == ["done", "open", "done", "waiting"]
    assert jobs.listing()[2].split() == ["2", "evaluate", "done", evaluation, "after", "0"]
    with pytest.raises(ValueError, match="Expected --job from 0 to 3, got 4"):
        jobs.run(4)


def test_changed_arguments_are_noticed_by_name(make, ran):
    make().run(0)
    changed = make(train_minutes=90)
    assert [changed.state(job) for job in changed.jobs[:3]] == ["changed", "open", "waiting"]
    message = "Expected byoc-train-baseline max_train_minutes 15.0 in .*w_gan/all, got 90.0. Delete that folder"
    with pytest.raises(ValueError, match=message):
        changed.check()
    with pytest.raises(ValueError, match=message):
        changed.run(0)
    assert len(ran) == 1 and make().state(make().jobs[0]) == "done"


def test_a_mistake_that_nothing_was_begun_with_may_be_corrected(make, ran, monkeypatch):
    def refuse(job, commands):
        raise ValueError("Expected a folder of cells, got none.")

    with monkeypatch.context() as context:
        context.setattr(running, "run_commands", refuse)
        with pytest.raises(ValueError, match="Expected a folder of cells"):
            make().run(0)
    corrected = make(train_minutes=90)
    corrected.run(0)
    assert corrected.state(corrected.jobs[0]) == "done"


def test_a_changed_preset_of_a_model_is_noticed(make, ran, tmp_path):
    preset = tmp_path / "mine.json"
    models = {"w_gan": {"arguments": {"preset": str(preset)}}}

    def jobs(base_channels):
        preset.write_text(json.dumps({"model": {"base_channels": base_channels}}))
        return Jobs(read_plan("cpu", drugs=["nocodazole"], models=models).jobs(TABLE), tmp_path / "out")

    jobs(8).run(0)
    with pytest.raises(ValueError, match=r"model \{'base_channels': 8\} in .*, got \{'base_channels': 16\}"):
        jobs(16).check()


def test_what_only_the_machine_knows_may_change(make, ran):
    make().run(0)
    again = make(training={"checkpointing_steps": 7, "num_cpu_threads": 2} | dict(plan_of().training))
    assert again.state(again.jobs[0]) == "done"


def test_what_a_training_begins_with_may_not(make, ran):
    byoc = plan_of(["byoc"]).models["byoc"]

    def models(pipeline):
        return {"byoc": byoc | {"arguments": byoc["arguments"] | {"pretrained": pipeline}}}

    jobs = [Jobs(read_plan("cpu", drugs=["a"], models=models(name)).jobs(TABLE), make().folder) for name in "xy"]
    jobs[0].run(0)
    with pytest.raises(ValueError, match="Expected byoc-train pretrained 'x' in .*, got 'y'"):
        jobs[1].check()


def test_a_result_of_unknown_arguments_is_none(make, ran, tmp_path):
    jobs = make()
    jobs.run(0)
    (tmp_path / jobs.jobs[0].name / "job.json").unlink()
    assert jobs.state(jobs.jobs[0]) == "open"


def test_a_mistake_in_a_preset_is_found_before_any_job_runs(make, ran, capsys):
    with pytest.raises(SystemExit):
        make(evaluation={"num_celz": 3}).check()
    assert "--num_celz" in capsys.readouterr().err and not ran


def test_a_job_whose_output_is_gone_is_open_again_and_its_evaluation_of_another_run(make, ran, tmp_path):
    jobs = make()
    jobs.run(0)
    jobs.run(2)
    (tmp_path / "train/nocodazole/w_gan/all/run/model_index.json").unlink()
    assert [jobs.state(job) for job in jobs.jobs] == ["begun", "open", "waiting", "waiting"]
    jobs.run(0)
    assert jobs.state(jobs.jobs[2]) == "changed"
    with pytest.raises(ValueError, match="Expected needed train/nocodazole/w_gan/all .* in .*evaluate"):
        jobs.check()


def test_an_interrupted_job_is_begun_and_goes_on(make, ran, monkeypatch):
    jobs = make()
    with monkeypatch.context() as patch:
        patch.setattr(running, "run_commands", lambda *_: sys.exit(143))
        with pytest.raises(SystemExit) as stop:
            jobs.run(0)
    assert stop.value.code == 143 and jobs.state(jobs.jobs[0]) == "begun"
    jobs.run(0)
    assert jobs.state(jobs.jobs[0]) == "done" and len(ran) == 1


def test_a_job_that_another_process_is_at_is_left_to_it(make, ran, tmp_path):
    jobs = make()
    with lock_folder(tmp_path / jobs.jobs[0].name), pytest.raises(SystemExit) as stop:
        jobs.run(0)
    assert stop.value.code == HELD and not ran


def test_the_best_of_the_learning_rates_is_taken(make, ran):
    jobs = make(["ha_gan"], tune=True)
    for number in range(3):
        jobs.run(number)
    assert jobs.best_rates(jobs.jobs[3]) == {"learning_rate": 6e-4, "discriminator_learning_rate": 2.4e-3}
    jobs.run(3)
    trained = ran[-1][1][0]
    assert trained[trained.index("--discriminator_learning_rate") + 1] == "0.0024"
    folder = jobs.folder / jobs.jobs[3].name
    assert json.loads((folder / "job.json").read_text())["byoc-train-baseline"]["learning_rate"] == 6e-4
    for number in range(3):
        path = jobs.folder / jobs.jobs[number].name / "done.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"score": None}))
    with pytest.raises(ValueError, match="Expected a learning rate that trains ha_gan, got none"):
        jobs.best_rates(jobs.jobs[3])


# ---------------------------------------------------------------------- several at a time

# runs a job as `byoc-reproduce --job N` does, but its commands only write their files, and take a while
RUNNER = """
import json, os, signal, sys, time, types
from pathlib import Path

def run_commands(job, commands):
    with open("ran.txt", "a") as file:
        file.write(f"begin {job.name}\\n")
    time.sleep(float(os.environ["BYOC_TEST_SECONDS"]))
    if job.name == os.environ.get("BYOC_TEST_FAILS"):
        sys.exit("Expected luck, got none.")
    for command, more in commands:
        folder = Path(more["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("metrics.json" if command.name == "byoc-evaluate" else "model_index.json")).write_text("{}")
    with open("ran.txt", "a") as file:
        file.write(f"end {job.name}\\n")
    return {}

name = "diffusers_byoc.commands.reproduction.running"
sys.modules[name] = types.SimpleNamespace(run_commands=run_commands)
from diffusers_byoc.commands.reproduction import jobs as jobs_module
from diffusers_byoc.commands.reproduction.plan import TABLE, read_plan
jobs_module.PAUSE = 0.5
plan = read_plan("cpu", drugs=["nocodazole"])
plan = read_plan("cpu", drugs=["nocodazole"], models={name: plan.models[name] for name in ("w_gan", "byoc")})
jobs = jobs_module.Jobs(plan.jobs(TABLE), "out")
if sys.argv[1] == "all":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command does
    print(jobs.run_all([sys.executable, __file__], int(sys.argv[2])))
else:
    jobs.run(int(sys.argv[1]))
"""
NAMES = [f"{kind}/nocodazole/{model}/all" for kind in ("train", "evaluate") for model in ("w_gan", "byoc")]


@pytest.fixture
def runner(tmp_path):
    script = tmp_path / "runner.py"
    script.write_text(RUNNER)

    def start(*arguments, seconds=0.5, fails=""):
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "BYOC_TEST_SECONDS": str(seconds)}
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=tmp_path,
            env=environment | {"BYOC_TEST_FAILS": fails},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def lines(tmp_path):
    path = tmp_path / "ran.txt"
    return path.read_text().splitlines() if path.is_file() else []


def test_two_processes_share_the_jobs_in_their_order(runner, tmp_path):
    """Each job once; an evaluation after its training."""
    first, second = runner("all", "1"), runner("all", "1")
    assert [process.communicate(timeout=200)[0].splitlines()[-1] for process in (first, second)] == ["[]", "[]"]
    found = lines(tmp_path)
    assert sorted(found) == sorted(f"{when} {name}" for when in ("begin", "end") for name in NAMES)
    for training, evaluation in zip(NAMES[:2], NAMES[2:], strict=True):
        assert found.index(f"end {training}") < found.index(f"begin {evaluation}")


def test_a_failure_is_told_and_the_others_go_on(runner, tmp_path):
    out, err = runner("all", "2", fails=NAMES[0]).communicate(timeout=200)
    assert "Job 0, train/nocodazole/w_gan/all, ended with status 1: Expected luck, got none. (see " in err
    assert "done: 2 of 4" in out and "Expected luck" in out.splitlines()[-1]
    assert {name for name in NAMES if f"end {name}" in lines(tmp_path)} == {NAMES[1], NAMES[3]}


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_after_an_interruption_it_goes_on(runner, tmp_path, stop):
    """A job that outlives its parent is waited for, not run beside."""
    process = runner("all", "1", seconds=3)
    deadline = time.monotonic() + 100
    while not lines(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(stop)
    process.communicate(timeout=100)
    out, err = runner("all", "2", seconds=0.2).communicate(timeout=200)
    assert out.splitlines()[-1] == "[]", err
    found = lines(tmp_path)
    assert [found.count(f"end {name}") for name in NAMES] == [1, 1, 1, 1]


def test_all_that_is_done_is_not_run_again(make, ran, monkeypatch):
    jobs = make()
    for number in range(4):
        jobs.run(number)
    monkeypatch.setattr(jobs_module.subprocess, "Popen", None)
    assert jobs.run_all(["none"]) == [] and len(ran) == 4
