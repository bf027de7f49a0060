"""What any stage of training can be told, by the names of `byoc-train`'s arguments."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


# what a run that resumes may be told anew; all else decides what it computes
MAY_CHANGE = {
    *("max_train_steps", "max_train_minutes", "minutes_of", "resume_from_checkpoint"),
    *("checkpointing_steps", "checkpoints_total_limit"),
    *("report_to", "validation_steps", "num_validation_cells", "num_cpu_threads"),
    *("dataloader_num_workers", "shuffle_buffer_size"),  # of a stream they decide: an input then
    *("mixed_precision", "allow_tf32", "compile", "gradient_checkpointing"),
    *("num_inference_steps", "num_texture_steps", "inference_scheduler"),
}


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Settings of any stage; a stage adds its own in a subclass.

    Args:
        max_train_steps: optimizer steps.
        max_train_minutes: time in the steps, and in what they need first, as the encoding of cells, in all processes
            that resumed each other, after which the stage ends like after its last step; its learning-rate schedule
            knows nothing of it. None for no limit.
        minutes_of: the "clock", or the "processor": of this process, by CPU thread, whatever else the machine does;
            with a GPU, which does the work, the clock all the same.
        seed: of all that is drawn.
        resume_from_checkpoint: "latest", a checkpoint's name, or None to begin anew.
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: how many are kept; None keeps all.
        validation_steps: steps between validation losses and pictures.
        num_validation_cells: held-out cells in the validation losses.
        report_to: "tensorboard", "wandb" or "all".
        mixed_precision: "no", "fp16", "bf16", or "auto" for the fastest here.
        allow_tf32: faster float32 products on NVIDIA GPUs since Ampere, of 10 bits' precision.
        compile: torch.compile the networks.
        gradient_checkpointing: less memory for more time.
        num_cpu_threads: per process, without a GPU; None for a fair share of all cores.
        train_batch_size: cells per process and micro-step.
        gradient_accumulation_steps: micro-steps per step.
        dataloader_num_workers: processes that read cells.
        shuffle_buffer_size: cells a process draws from when streaming.
        augmentation, intensity_jitter: see `data.draw_augmentation`.
        optimizer: "adam", "adamw" or "rmsprop".
        use_8bit_adam: 8-bit optimizer states, by bitsandbytes.
        learning_rate, adam_beta1, adam_beta2, adam_weight_decay: of the optimizer; RMSprop has no betas.
        lr_scheduler: any of diffusers' schedules.
        lr_warmup_steps: of the schedule.
        max_grad_norm: gradients are clipped to it; 0 clips nothing.
    """

    max_train_steps: int
    max_train_minutes: float | None = None
    minutes_of: str = "clock"
    seed: int = 0
    resume_from_checkpoint: str | None = None
    checkpointing_steps: int = 5000
    checkpoints_total_limit: int | None = 2
    validation_steps: int = 200
    num_validation_cells: int = 16
    report_to: str = "tensorboard"
    mixed_precision: str = "auto"
    allow_tf32: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    num_cpu_threads: int | None = None
    train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    dataloader_num_workers: int = 0
    shuffle_buffer_size: int = 1000
    augmentation: str = "none"
    intensity_jitter: float = 0.0
    optimizer: str = "adam"
    use_8bit_adam: bool = False
    learning_rate: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.0
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0

    @property
    def is_augmented(self) -> bool:
        """Whether a cell differs from one epoch to the next."""
        return self.augmentation != "none" or self.intensity_jitter != 0

    def decisive(self, num_processes: int) -> dict[str, Any]:
        """What a checkpoint may only be resumed with, by name: the batch, for example, is that of all processes."""
        settings = {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}
        return settings | {"train_batch_size": self.train_batch_size * num_processes}


def configuration(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers model's or scheduler's configuration as inputs of a stage; without what training itself finds."""
    found = ("latents_mean", "latents_std", "texture_scale", "connected_cells")
    return {f"{name}.{key}": value for key, value in config.items() if key[0] != "_" and key not in found}
