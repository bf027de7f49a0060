"""Checkpoints that are whole or absent, in the layout of diffusers' examples: `DIR/checkpoint-STEP`."""

import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from ..whole_files import move_into_place, remove, remove_left_overs


_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are whole. The message says where to go on from."""


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints below `directory`, oldest first."""
    directory = Path(directory)
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The training step in a checkpoint's name.

    Raises:
        ValueError: if the name is not `checkpoint-STEP`.
    """
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"Expected a folder named checkpoint-STEP, got {path}. Name one, or say 'latest'.")
    return int(match[1])


def save_checkpoint(accelerator: Accelerator, directory: str | Path, step: int, total_limit: int | None) -> Path:
    """Save all that `accelerator` knows as `directory/checkpoint-STEP`, then delete all but the newest `total_limit`.

    Checkpoints of later steps are deleted too: they belong to an earlier run in the same folder, and `latest` would
    resume that one.

    It is written under another name and renamed when complete: a run killed meanwhile leaves the earlier checkpoints
    whole and no half one that `latest` could pick. What is deleted is renamed first, for the same reason.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full.
    """
    path = Path(directory) / f"checkpoint-{step}"
    partial = path.with_name(path.name + ".partial")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            move_into_place(partial, path)
            checkpoints = list_checkpoints(directory)
            position = checkpoints.index(path)
            oldest_kept = 0 if total_limit is None else max(0, position + 1 - total_limit)
            # later ones first: killed in between, `latest` must not find them
            for other in checkpoints[:position:-1] + checkpoints[:oldest_kept]:
                remove(other)
            remove_left_overs(Path(directory))  # of a run killed while deleting
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is how torch.save says it
        shutil.rmtree(partial, ignore_errors=True)
        whole = list_checkpoints(directory)
        remedy = f"go on from {whole[-1].name} with --resume_from_checkpoint latest" if whole else "begin anew"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} could not be written ({reason}). Make room there, or make it writable, and {remedy}."
        ) from error
    return path


def load_checkpoint(accelerator: Accelerator, directory: str | Path, name: str | None) -> int:
    """Restore `accelerator` from a checkpoint and return its step; 0 if there is nothing to restore.

    Args:
        accelerator: with everything prepared and registered as it was when saving.
        directory: folder of the checkpoints.
        name: "latest", a checkpoint's name or path, or None to begin anew.

    Raises:
        FileNotFoundError: if a checkpoint is named that does not exist.
    """
    if name is None:
        if list_checkpoints(directory):
            accelerator.print(
                f"{directory} has checkpoints of an earlier run, which this run will replace. To go on with them, "
                "stop now and add --resume_from_checkpoint latest."
            )
        return 0
    if name == "latest":
        checkpoints = list_checkpoints(directory)
        if not checkpoints:
            accelerator.print(f"No checkpoint in {directory}: starting a new run.")
            return 0
        path = checkpoints[-1]
    else:
        path = Path(directory) / Path(name).name
        if not path.is_dir():
            present = ", ".join(p.name for p in list_checkpoints(directory)) or "none"
            raise FileNotFoundError(f"Expected the checkpoint {path}, which does not exist. Present: {present}.")
    step = checkpoint_step(path)
    accelerator.load_state(str(path))
    accelerator.print(f"Resumed from {path}.")
    return step
