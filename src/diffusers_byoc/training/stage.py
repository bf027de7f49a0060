"""What surrounds a training step, whatever is trained: the loop and the losses stay with the stage."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from ..randomness import step_generator
from ..visualization import compare_volumes
from .checkpoints import (
    check_record,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_record,
    save_checkpoint,
)
from .hardware import fair_num_threads, fastest_precision, is_cpu_training, keep_freed_memory, processor_seconds
from .interruptions import Termination
from .settings import StageSettings


logger = get_logger(__name__, log_level="INFO")
Batch = TypeVar("Batch")


class Stage:
    """One stage of a run: its accelerator, logs, checkpoints, and the rhythm of its steps.

    ::

        with Stage(output_dir, "autoencoder", settings) as stage:
            model, optimizer = stage.accelerator.prepare(model, optimizer)
            stage.resume(lr_scheduler)
            for step, batch in stage.steps(batches):
                with stage.accelerator.accumulate(model):
                    loss = ...
                    stage.apply(loss, model, optimizer, lr_scheduler)
                if stage.is_accumulating:
                    continue
                stage.log({"loss": loss})
                if stage.is_validating:
                    ...

    Every network has its `apply`; all of them stand in the one `accumulate` of a micro-step. Every stage has an
    accelerator of its own, so that its checkpoints hold that stage alone.

    Args:
        output_dir: of the run; checkpoints go to its folder `name`, logs to its `logs`.
        name: of the stage, which must not be that of another one in the run.
        settings: of the stage.
        inputs: what else decides the stage, by name, as JSON: data, networks. It is resumed with the same only.

    Attributes:
        accelerator: from `__enter__` on.
        first_step: steps that were made before this process, from `resume` on.
        step: the current step, from 1.
        micro_step: the current batch, from 0, of all processes.
        seconds: that the steps and what they needed since `resume`, as the encoding of cells, have taken, with those
            before this process.
        progress: the bar.
    """

    def __init__(self, output_dir: str | Path, name: str, settings: StageSettings, inputs: Mapping[str, Any] = {}):
        self.output_dir, self.name, self.settings, self.inputs = Path(output_dir), name, settings, dict(inputs)
        self.directory = self.output_dir / name
        self.first_step = self.step = self.micro_step = 0
        self.seconds = 0.0
        self.progress = self._termination = None
        self._averages_gradients = False
        self._started = 0.0

    def __enter__(self) -> "Stage":
        settings = self.settings
        precision = fastest_precision() if settings.mixed_precision == "auto" else settings.mixed_precision
        if is_cpu_training():
            keep_freed_memory()
            torch.set_num_threads(settings.num_cpu_threads or fair_num_threads())
        if settings.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.accelerator = Accelerator(
            cpu=is_cpu_training(),
            # DeepSpeed would keep the weights themselves in half precision, in which a moving average stands still
            mixed_precision="no" if uses_deepspeed() else precision,
            # as a plugin, which a launcher's environment variable does not overrule
            gradient_accumulation_plugin=GradientAccumulationPlugin(settings.gradient_accumulation_steps),
            log_with=["tensorboard", "wandb"] if settings.report_to == "all" else settings.report_to,
            project_config=ProjectConfiguration(str(self.directory), logging_dir=str(self.output_dir / "logs")),
        )
        if uses_deepspeed():
            deepspeed_config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            # it wants to know before any data
            deepspeed_config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
            if precision == "bf16":
                deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        config = asdict(settings) | self.inputs
        config = {name: value for name, value in config.items() if isinstance(value, (int, float, str, bool))}
        wandb = {"dir": str(self.output_dir), "name": f"{self.output_dir.name}/{self.name}"}
        self.accelerator.init_trackers(self.name, config, {"wandb": wandb})
        set_seed(settings.seed)
        processes = f"{self.accelerator.num_processes} process(es), {self.accelerator.device}"
        logger.info(f"{self.name}: {processes}, mixed_precision={precision!r}")
        return self

    def __exit__(self, error_type, *_) -> None:
        """Close the logs; `Accelerator.end_training` would also end the process group that the next stage needs."""
        if self._termination is not None:
            self._termination.close()
            self.progress.close()
        if error_type is None:
            self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def prepare_adversaries(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> tuple:
        """What `accelerator.prepare` does, for a model of several networks that are trained through each other.

        DDP expects each backward pass to reach all that it holds. The model stays outside of it, and `apply` averages
        the gradients over the processes.
        """
        self._averages_gradients = True
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        return model, *(self.accelerator.prepare_optimizer(optimizer) for optimizer in optimizers)

    # ------------------------------------------------------------------ what a run resumes with

    def resume(self, *states: Any, inputs: Mapping[str, Any] = {}) -> None:
        """Restore what was prepared from the checkpoint that the settings name, if there is one.

        A learning-rate schedule that is longer now than when the checkpoint was written takes over at its step.

        Args:
            states: what else the checkpoints hold, with `state_dict` and `load_state_dict`: schedules, averages.
            inputs: more of them: what the stage alone knows of.

        Raises:
            CheckpointError: if the checkpoint was made with other settings or inputs, or goes beyond the last step.
            FileNotFoundError: if a checkpoint is named that does not exist.
        """
        self._started = self._now()
        self.accelerator.register_for_checkpointing(*states)
        self.inputs |= inputs
        settings, print_once = self.settings, self.accelerator.print
        path = find_checkpoint(self.directory, settings.resume_from_checkpoint)
        if path is None:
            if settings.resume_from_checkpoint is not None:
                print_once(f"No checkpoint in {self.directory}: starting a new run.")
            elif list_checkpoints(self.directory):
                print_once(
                    f"{self.directory} has checkpoints of an earlier run, which this run will replace. To go on with"
                    " them, stop now and add --resume_from_checkpoint latest."
                )
            return
        check_record(path, self._record(), settings.max_train_steps)
        self.first_step = load_checkpoint(self.accelerator, path)
        self.seconds = read_record(path).get("seconds", 0.0)
        print_once(f"Resumed from {path}.")
        for schedule in (state for state in states if isinstance(state, LambdaLR)):
            for group, base, factor in zip(
                schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(schedule.last_epoch)

    def _record(self) -> dict[str, Any]:
        return self.settings.decisive(self.accelerator.num_processes) | self.inputs

    # ------------------------------------------------------------------ steps

    def steps(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """(step, batch) of every micro-step left. Saves when it is time, or when told to end, by a signal; then ends.

        It also ends, as after the last step, when the steps have taken `max_train_minutes`.
        """
        accumulation, max_steps = self.settings.gradient_accumulation_steps, self.settings.max_train_steps
        hidden = not self.accelerator.is_local_main_process
        self.progress = tqdm(total=max_steps, initial=self.first_step, desc=self.name.capitalize(), disable=hidden)
        self._termination = Termination()  # which now waits for the end of its step
        started = self._started - self.seconds
        self.step = self.first_step
        for micro_step, batch in enumerate(batches, self.first_step * accumulation):
            if not micro_step % accumulation and self._is_time_up():
                break
            self.micro_step, self.step = micro_step, micro_step // accumulation + 1
            yield self.step, batch
            if not self.is_accumulating:
                self.progress.update()
                self.seconds = self._now() - started
                self._end_step()
        self._termination.close()
        self.accelerator.wait_for_everyone()

    @property
    def is_accumulating(self) -> bool:
        """Whether more batches belong to this step."""
        return (self.micro_step + 1) % self.settings.gradient_accumulation_steps != 0

    @property
    def is_validating(self) -> bool:
        """Whether validation losses and pictures are due at the end of this step."""
        return self.step % self.settings.validation_steps == 0 or self.step == self.settings.max_train_steps

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness of this micro-step, the same in all processes."""
        return step_generator(self.settings.seed, self.micro_step, purpose)

    def apply(
        self,
        loss: Tensor,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LambdaLR,
        name: str = "loss",
    ) -> None:
        """Differentiate `loss`; at the end of a step, clip the gradients of `model` and make the optimizer's step.

        Args:
            loss: scalar.
            model: the network of `optimizer`.
            optimizer: prepared by the accelerator.
            lr_scheduler: of the optimizer.
            name: of the loss, for the message.

        Raises:
            FloatingPointError: if the loss or a gradient is not finite in any process; the weights are as they were.
        """
        self._check_finite(loss, name)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            if self._averages_gradients and self.accelerator.num_processes > 1:
                for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
            max_norm = self.settings.max_grad_norm or float("inf")
            if self.accelerator.scaler is not None:  # of fp16: skips a step that is not finite, and lowers its scale
                # accelerate's clipping would unscale what the other optimizers have accumulated, too
                self.accelerator.unscale_gradients(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            elif torch.is_tensor(norm := self.accelerator.clip_grad_norm_(model.parameters(), max_norm)):
                self._check_finite(norm, "gradient")  # not of DeepSpeed, which has made its step already
        optimizer.step()
        optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            lr_scheduler.step()

    def _check_finite(self, number: Tensor, name: str) -> None:
        numbers = self.accelerator.gather(number.detach())
        if not torch.isfinite(numbers).all():
            raise FloatingPointError(
                f"Expected a finite {name} at step {self.step}, got {numbers.flatten().tolist()}: step {self.step} is"
                f" not made, the weights are those of step {self.step - 1}. Go on from the last checkpoint in"
                f" {self.directory} with --resume_from_checkpoint latest --mixed_precision no, or begin anew with a"
                " lower learning rate."
            )

    def _end_step(self) -> None:
        is_told_to_end = self._termination.requested(self.accelerator)
        settings = self.settings
        is_last = self.step == settings.max_train_steps or self._is_time_up()
        if is_told_to_end or is_last or self.step % settings.checkpointing_steps == 0:
            limit, record = settings.checkpoints_total_limit, self._record() | {"seconds": self.seconds}
            path = save_checkpoint(self.accelerator, self.directory, self.step, limit, record)
        if is_told_to_end:
            self._termination.close()
            self.accelerator.print(
                f"Told to end: saved {path}; go on with --resume_from_checkpoint latest", file=sys.stderr
            )
            raise SystemExit(143)

    def _now(self) -> float:
        """Seconds, of what `minutes_of` says."""
        is_clock = self.settings.minutes_of == "clock" or not is_cpu_training()
        return time.perf_counter() if is_clock else processor_seconds()

    def _is_time_up(self) -> bool:
        """Whether `max_train_minutes` have passed in any process."""
        if self.settings.max_train_minutes is None:
            return False
        seconds = torch.tensor(self.seconds, device=self.accelerator.device)
        return bool(self.accelerator.gather(seconds).max() >= 60 * self.settings.max_train_minutes)

    # ------------------------------------------------------------------ logs

    def log(self, losses: Mapping[str, Tensor], numbers: Mapping[str, float] = {}) -> dict[str, float]:
        """Log scalars of this step: `losses` averaged over the processes, and `numbers` that all processes share."""
        values = self.accelerator.reduce(torch.stack([loss.detach() for loss in losses.values()]), reduction="mean")
        logs = dict(zip(losses, values.tolist(), strict=True)) | dict(numbers)
        self.accelerator.log(logs, step=self.step)
        return logs

    def log_volumes(self, rows: Mapping[str, Tensor], channel_names: Sequence[str]) -> None:
        """Show every tracker orthogonal slices of up to four cells a row; `rows` are (B, M, D, H, W) in [-1, 1]."""
        rows = {name: (volumes[:4].float() / 2 + 0.5).clamp(0, 1).cpu() for name, volumes in rows.items()}
        figure = compare_volumes(rows, channel_names)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.tracker.add_figure("samples", figure, self.step)
            elif tracker.name == "wandb":
                from wandb import Image

                tracker.log({"samples": Image(figure)}, step=self.step)


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` was told to."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
