"""Cells from a pipeline: any of diffusers whose call returns `volumes`."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..data import write_ome_tiff
from ..models import MultiCodebookVQModel
from ..training.latents import fingerprint_weights
from ..volumes import check_unit_range
from ..whole_files import whole_or_absent


RECORD_NAME = "generation.json"


def generate_cells(
    pipeline: DiffusionPipeline,
    num_samples: int,
    folder: Path,
    seed: int = 0,
    num_inference_steps: int | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 16,
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> list[Path]:
    """Generate what is missing of `num_samples` cells, shared over the processes.

    Cell i depends on the seed and i alone, so that neither batches, processes nor interruptions change it. The
    pipeline is called as ``pipeline(num_samples, generator=[...])`` (or ``batch_size`` for the number, where its call
    has that name), with ``num_inference_steps`` and ``class_labels`` only where they are given here.

    Args:
        pipeline: on this process's device; its output has `volumes` (B, M, D, H, W) in [0, 1].
        num_samples: how many cells there shall be.
        folder: holds an OME-TIFF a cell.
        seed: of all cells.
        num_inference_steps: None leaves them to the pipeline.
        class_names: the class of each cell, repeated as needed; None for a pipeline without classes.
        batch_size: cells at a time.
        channel_names: M names, recorded in the files.
        voxel_size_um: recorded in the files.

    Returns:
        The files.

    Raises:
        ValueError: if the folder holds cells of another pipeline or of other settings, or the pipeline returns no
            such volumes.
    """
    state = PartialState()
    settings = {"seed": seed, "num_inference_steps": num_inference_steps, "pipeline": fingerprint(pipeline)}
    if class_names is not None:
        settings["classes"] = hashlib.blake2b(json.dumps(class_names).encode(), digest_size=16).hexdigest()
    record = folder / RECORD_NAME
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"Expected cells of this pipeline and these settings in {folder}, got those of {record}. Delete it, or "
            "change --output_dir."
        )
    paths = [folder / f"cell_{index:06}.ome.tif" for index in range(num_samples)]
    # before any process writes: all must share out the same list
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    state.wait_for_everyone()
    if state.is_main_process:
        with whole_or_absent(record) as temporary:
            temporary.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    number = "num_samples" if "num_samples" in inspect.signature(pipeline.__call__).parameters else "batch_size"
    mine = missing[state.process_index :: state.num_processes]
    for start in tqdm(range(0, len(mine), batch_size), "Generating", disable=not state.is_local_main_process):
        batch = mine[start : start + batch_size]
        seeds = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] for index in batch]
        arguments |= {number: len(batch), "generator": [torch.Generator().manual_seed(int(s)) for s in seeds]}
        if class_names is not None:
            arguments["class_labels"] = [class_names[index % len(class_names)] for index in batch]
        volumes = pipeline(**arguments).volumes
        volumes = volumes.float().cpu().numpy() if isinstance(volumes, torch.Tensor) else np.asarray(volumes)
        if volumes.ndim != 5 or volumes.shape[:2] != (len(batch), len(channel_names)):
            raise ValueError(
                f"Expected {len(batch)} volumes of the channels {', '.join(channel_names)} from"
                f" {type(pipeline).__name__}, got shape {volumes.shape}. Give --channel_names."
            )
        check_unit_range(volumes, f"volumes of {type(pipeline).__name__}")
        for index, volume in zip(batch, volumes.clip(0, 1), strict=True):
            write_ome_tiff(paths[index], volume, voxel_size_um, channel_names)
    state.wait_for_everyone()
    return paths


def channel_names_of(pipeline: DiffusionPipeline) -> tuple[str, ...] | None:
    """The `channel_names` that the pipeline's configuration, or that of one of its parts, states."""
    names = (getattr(config, "channel_names", None) for config in _configs(pipeline))
    return next((tuple(found) for found in names if found), None)


def has_classes(pipeline: DiffusionPipeline) -> bool:
    """Whether a part of the pipeline is conditioned on classes (`num_class_embeds`, as in diffusers' U-Nets)."""
    return any(getattr(config, "num_class_embeds", None) for config in _configs(pipeline))


def autoencoder_of(pipeline: DiffusionPipeline) -> MultiCodebookVQModel | None:
    """The pipeline's autoencoder, if it has one of ours."""
    return next((part for part in pipeline.components.values() if isinstance(part, MultiCodebookVQModel)), None)


def fingerprint(pipeline: DiffusionPipeline) -> str:
    """Changes with the class, the configuration and the weights of a pipeline and its parts, not with its folder."""
    digest = hashlib.blake2b(digest_size=16)
    for name, part in sorted({"": pipeline, **pipeline.components}.items()):
        config = getattr(part, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        if isinstance(part, torch.nn.Module):
            digest.update(fingerprint_weights(part, name, config).encode())
        else:
            digest.update(f"{name} {type(part).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    return digest.hexdigest()


def _configs(pipeline: DiffusionPipeline) -> list:
    owners = (pipeline, *pipeline.components.values())
    return [owner.config for owner in owners if hasattr(owner, "config")]
