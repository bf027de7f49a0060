"""Checkpoints that are whole or absent, in the layout of diffusers' examples: `DIR/checkpoint-STEP`."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import SCALER_NAME
from safetensors import SafetensorError

from ..whole_files import move_into_place, remove, remove_left_overs


RECORD_NAME = "settings.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint could not be written (those before it are whole), or is not of this run. The message says which."""


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


def save_checkpoint(
    accelerator: Accelerator,
    directory: str | Path,
    step: int,
    total_limit: int | None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Save all that `accelerator` knows as `directory/checkpoint-STEP`, then delete all but the newest `total_limit`.

    With it lies `record`, what the run must be resumed with, by name, for `check_record`.

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
            (partial / RECORD_NAME).write_text(json.dumps(record or {}, indent=1), encoding="utf-8")
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
            f"Expected to write {path}, got {reason!r}. Make room there, or make it writable, and {remedy}."
        ) from error
    return path


def find_checkpoint(directory: str | Path, name: str | None) -> Path | None:
    """The checkpoint to resume from, if any.

    Args:
        directory: folder of the checkpoints.
        name: "latest", a checkpoint's name or path, or None to begin anew.

    Raises:
        FileNotFoundError: if a checkpoint is named that does not exist.
        ValueError: if it is called otherwise than checkpoint-STEP.
    """
    if name is None:
        return None
    checkpoints = list_checkpoints(directory)
    if name == "latest":
        return checkpoints[-1] if checkpoints else None
    path = Path(directory) / Path(name).name
    if not path.is_dir():
        present = ", ".join(p.name for p in checkpoints) or "none"
        raise FileNotFoundError(f"Expected the checkpoint {path}, got none of this name. Name one of: {present}.")
    checkpoint_step(path)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given with a checkpoint; empty if a version made it that kept none."""
    file = path / RECORD_NAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_record(path: Path, record: Mapping[str, Any], max_steps: int | None = None) -> None:
    """Refuse to resume with what would make it another run; of names that only one side has, nothing is known.

    Args:
        path: of the checkpoint.
        record: as `save_checkpoint` would be given now.
        max_steps: of the run, if known.

    Raises:
        CheckpointError: naming the first that differs, or if the checkpoint goes beyond the last step.
    """
    saved, record = read_record(path), json.loads(json.dumps(record))
    for name in record:
        if name in saved and record[name] != saved[name]:
            raise CheckpointError(
                f"Expected {name} {saved[name]!r}, with which {path} was made, got {record[name]!r}. Give the same, or"
                " begin a new run in another --output_dir."
            )
    if max_steps is not None and checkpoint_step(path) > max_steps:
        raise CheckpointError(
            f"Expected at least as many steps as {path} has made, got {max_steps}. Give more --max_train_steps, or"
            " resume an earlier checkpoint by its name."
        )


def load_checkpoint(accelerator: Accelerator, path: Path) -> int:
    """Restore `accelerator`, with everything prepared and registered as when saving; return the checkpoint's step.

    The scaler of fp16 begins anew where the checkpoint was made in another precision.
    """
    scaler = accelerator.scaler
    if not (path / SCALER_NAME).is_file():
        accelerator.scaler = None
    try:
        accelerator.load_state(str(path))
    finally:
        accelerator.scaler = scaler
    return checkpoint_step(path)
