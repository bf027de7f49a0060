"""Jobs in folders: what is done, what is next, how one is run, and several at a time. Nothing heavy until one runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...whole_files import lock_folder, whole_or_absent
from .plan import Command, Job


IDENTITY_NAME, RESULT_NAME, LOG_NAME = "job.json", "done.json", "log.txt"
INTERRUPTED = 143  # exit status of a training that a signal ended
HELD = 75  # exit status of a job that another process is at: EX_TEMPFAIL of sysexits.h
PAUSE = 5  # seconds between looks at what other processes do
# where a command finds and leaves things, and how fast; all else decides what it computes
NOT_DECISIVE = {
    *("output_dir", "cache_dir", "cache_gb", "resume_from_checkpoint"),
    *("num_cpu_threads", "dataloader_num_workers", "report_to", "checkpointing_steps", "checkpoints_total_limit"),
}


class Jobs:
    """All jobs of a study in a folder, which any number of processes may work on.

    ``NAME/job.json`` is what a job is made of, ``NAME/run`` what it trains, ``NAME/evaluation`` what it judges,
    ``NAME/log.txt`` what it says, and ``NAME/done.json``, at the end, what it found.

    Args:
        jobs: each after those that it needs.
        folder: of the reproduction.
    """

    def __init__(self, jobs: Sequence[Job], folder: str | os.PathLike):
        self.jobs, self.folder = list(jobs), Path(folder)
        self._by_name = {job.name: job for job in jobs}
        self._parsed: dict[tuple, dict[str, Any]] = {}

    # ------------------------------------------------------------------ what is done

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a job found; None until it is done, by the same arguments, with all that it leaves."""
        folder = self.folder / job.name
        path = folder / RESULT_NAME
        if not all(file.is_file() for file in (path, folder / IDENTITY_NAME, *self._outputs(job))):
            return None
        if self._missing(job) or self.difference(job):
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    def state(self, job: Job) -> str:
        """One of "done", "waiting" (for others), "changed" (since it was begun), "begun" and "open"."""
        if self.result(job) is not None:
            return "done"
        if self._missing(job):
            return "waiting"
        if self.difference(job):
            return "changed"
        return "begun" if (self.folder / job.name / IDENTITY_NAME).is_file() else "open"

    def difference(self, job: Job) -> str | None:
        """The first argument that is not the one that the job's folder was begun with, in words; None for none."""
        path = self.folder / job.name / IDENTITY_NAME
        if not path.is_file() or self._missing(job):
            return None
        known, wanted = json.loads(path.read_text(encoding="utf-8")), self._identity(job)
        for part, values in wanted.items():
            for name, value in values.items():
                if name in known.get(part, {}) and known[part][name] != value:
                    return f"{part} {name} {known[part][name]!r} in {path.parent}, got {value!r}"
        return None

    def check(self) -> None:
        """Refuse arguments that a command does not know, and a folder that holds results of other arguments.

        Raises:
            SystemExit: of the command.
            ValueError: naming the first argument that differs.
        """
        for job in self.jobs:
            for command in job.commands:
                self._parse(job, command)
            if difference := self.difference(job):
                raise ValueError(f"Expected {difference}. Delete that folder, or give another --output_dir.")

    def listing(self) -> list[str]:
        """A line for each job: its number, kind, state and name, and the numbers of those that it needs."""
        numbers = {job.name: number for number, job in enumerate(self.jobs)}
        lines = []
        for number, job in enumerate(self.jobs):
            needs = f"  after {' '.join(str(numbers[name]) for name in job.needs)}" if job.needs else ""
            lines.append(f"{number:4d}  {job.kind:8s}  {self.state(job):7s}  {job.name}{needs}")
        return lines

    def _missing(self, job: Job) -> list[str]:
        return [name for name in job.needs if self.result(self._by_name[name]) is None]

    def _outputs(self, job: Job) -> list[Path]:
        ends = {"train": ["run/model_index.json"], "evaluate": ["evaluation/metrics.json"]}
        return [self.folder / job.name / end for end in ends.get(job.kind, [])]

    def _identity(self, job: Job) -> dict[str, dict[str, Any]]:
        """What a job is made of: all arguments of its commands, and which runs of the jobs that it needs."""
        identity = {}
        for command in job.commands:
            identity[command.name] = self._parse(job, command)
        identity["needed"] = {name: self.result(self._by_name[name])["finished"] for name in job.needs}
        return json.loads(json.dumps(identity))  # as it is read again

    def _parse(self, job: Job, command: Command) -> dict[str, Any]:
        """All arguments that decide what a command computes, as far as they are known yet; read once."""
        more = self._more(job, command)
        key = (job.name, command.name, *map(str, more.values()))
        if key not in self._parsed:
            arguments = vars(command.parse(**more))
            # the pipeline that is judged is known by the job that trained it; one that a training begins with is not
            left_out = NOT_DECISIVE | ({"pretrained"} if command.name == "byoc-evaluate" else set())
            self._parsed[key] = {name: arguments[name] for name in sorted(arguments.keys() - left_out)}
        return self._parsed[key]

    def _more(self, job: Job, command: Command, **machine: Any) -> dict[str, Any]:
        """Arguments that depend on where things lie, and on what was found before."""
        if command.name == "byoc-evaluate":
            return machine | {
                "pretrained": self.folder / (job.trained_by or job.name) / "run",
                "output_dir": self.folder / job.name / "evaluation",
                "cache_dir": self.folder / "cache" / job.drug,
            }
        best = self.best_rates(job) if job.rates and not self._missing(job) else {}
        return machine | best | {"output_dir": self.folder / job.name / "run", "resume_from_checkpoint": "latest"}

    def best_rates(self, job: Job) -> Mapping[str, float]:
        """The learning rates whose "tune" job scored lowest; one that ended without a score does not count.

        Raises:
            ValueError: if none has a score.
        """
        scores = {name: self.result(self._by_name[name])["score"] for name in job.rates}
        scores = {name: score for name, score in scores.items() if score is not None}
        if not scores:
            raise ValueError(f"Expected a learning rate that trains {job.model}, got none. Give other tuning factors.")
        return job.rates[min(scores, key=scores.get)]

    # ------------------------------------------------------------------ running

    def run(self, number: int, num_cpu_threads: int | None = None) -> None:
        """Run one job in this process; what is done is not done again.

        Raises:
            ValueError: if it needs others first, or its folder holds results of other arguments.
            SystemExit: as its command ends; `HELD` if another process is at it.
        """
        if not 0 <= number < len(self.jobs):
            raise ValueError(f"Expected --job from 0 to {len(self.jobs) - 1}, got {number}. See --list_jobs.")
        job = self.jobs[number]
        if missing := self._missing(job):
            needed = [str(other) for other, needed in enumerate(self.jobs) if needed.name in missing]
            raise ValueError(f"Expected jobs {', '.join(needed)} done before {number}, got them open. Run them first.")
        if difference := self.difference(job):
            raise ValueError(f"Expected {difference}. Delete that folder, or give another --output_dir.")
        folder = self.folder / job.name
        with self._locked(job):
            if self.result(job) is not None:
                print(f"{job.name} is done.")
                return
            with whole_or_absent(folder / IDENTITY_NAME) as temporary:
                temporary.write_text(json.dumps(self._identity(job), indent=1), encoding="utf-8")
            from .running import run_commands  # torch

            commands = [(c, self._more(job, c, num_cpu_threads=num_cpu_threads)) for c in job.commands]
            try:
                found = run_commands(job, commands)
            except (Exception, SystemExit) as error:
                is_begun = any((folder / "run").rglob("checkpoint-*")) or (folder / "evaluation").is_dir()
                if not is_begun and getattr(error, "code", None) != INTERRUPTED:
                    (folder / IDENTITY_NAME).unlink()  # other arguments may correct what was wrong
                raise
            found |= {"finished": datetime.now(timezone.utc).isoformat(timespec="microseconds")}
            with whole_or_absent(folder / RESULT_NAME) as temporary:
                temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")

    def run_all(self, command: Sequence[str], num_processes: int = 1) -> list[str]:
        """Run all jobs that are left, each in a process of its own, as soon as those that it needs are done.

        Jobs that other processes are at are waited for.

        Args:
            command: a command line that runs one job, once its number is added.
            num_processes: at a time.

        Returns:
            What failed, a line each, with the last line of its log.
        """
        children: dict[int, subprocess.Popen] = {}
        failed: dict[int, str] = {}
        held: dict[int, float] = {}
        try:
            while True:
                for number, child in list(children.items()):
                    if child.poll() is not None:
                        del children[number]
                        self._note_end(number, child.returncode, failed, held)
                now = time.monotonic()
                ready = [
                    number
                    for number, job in enumerate(self.jobs)
                    if number not in children and number not in failed and self.state(job) in ("open", "begun")
                ]
                for number in [n for n in ready if held.get(n, 0) <= now][: num_processes - len(children)]:
                    children[number] = self._start(number, command)
                if not children and not ready:
                    self.check()  # of what was waiting until now
                    return list(failed.values())
                if children:  # until one ends, but no longer than a look at the others takes
                    _wait_for_any(children.values(), PAUSE)
                else:
                    time.sleep(PAUSE)
        finally:
            for child in children.values():
                child.terminate()  # a training saves after its step
            for child in children.values():
                child.wait()

    def _start(self, number: int, command: Sequence[str]) -> subprocess.Popen:
        job = self.jobs[number]
        print(f"Job {number}, {job.name}", flush=True)
        path = self.folder / job.name / LOG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            return subprocess.Popen([*command, str(number)], stdout=log, stderr=subprocess.STDOUT)

    def _note_end(self, number: int, status: int, failed: dict[int, str], held: dict[int, float]) -> None:
        job = self.jobs[number]
        if status == HELD:
            held[number] = time.monotonic() + 6 * PAUSE
        elif status:
            path = self.folder / job.name / LOG_NAME
            last = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            failed[number] = f"Job {number}, {job.name}, ended with status {status}: {' '.join(last)} (see {path})"
            print(failed[number], file=sys.stderr, flush=True)
        else:
            num_done = sum(self.result(job) is not None for job in self.jobs)
            print(f"Job {number}, {job.name}, is done: {num_done} of {len(self.jobs)}.", flush=True)

    @contextmanager
    def _locked(self, job: Job):
        try:
            with lock_folder(self.folder / job.name):
                yield
        except OSError as error:
            if isinstance(error.__cause__, TimeoutError):  # filelock's
                print(error, file=sys.stderr)
                raise SystemExit(HELD) from error
            raise


def _wait_for_any(children, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(child.poll() is None for child in children):
        time.sleep(0.1)
