"""Many cells from one pipeline: the same ones in any batch, on any number of processes, after any interruption."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from ..data import prepare_channel, read_volume
from ..models.fingerprint import fingerprint_weights
from ..whole_files import whole_or_absent
from .memory import MemoryMeter
from .series import cell_generator, cell_seed, files_of_series, write_table


RECORD_NAME = "generation.json"


def generate_cells(
    pipeline: DiffusionPipeline,
    folder: Path,
    num_samples: int,
    class_labels: Sequence[int | str] | None = None,
    num_inference_steps: int | None = None,
    num_texture_steps: int | None = None,
    seed: int = 0,
    batch_size: int | None = 8,
    suffix: str = ".ome.tif",
    voxel_size_um: tuple[float, float, float] | None = None,
    share: tuple[int, int] = (0, 1),
    conditions: Mapping[str, float] | None = None,
    guidance_scale: float | None = None,
    only: Sequence[int] | None = None,
    given_channels: Mapping[str, Sequence[Path]] | None = None,
) -> list[Path]:
    """Generate what is missing of a series of cells in `folder`.

    Cell i depends on the pipeline, its class, the steps, the seed and i alone: neither processes nor interruptions
    change it, batches change it by rounding, and a file that is deleted comes again. The folder remembers in
    ``generation.json`` what its cells were made with, and in ``metadata.csv``, or columns of the Parquet files, the
    number, the class and the seed of each, with which it can be made alone.

    Args:
        pipeline: a `BYOCPipeline`, or another whose call takes `num_samples` and `generator` and returns `volumes`
            (num_samples, M, D, H, W) in [0, 1].
        folder: made if missing; see `files_of_series` for the names of its files.
        num_samples: how many cells there shall be; more than before adds to them.
        class_labels: the classes that the cells have in turn; None without classes.
        num_inference_steps: denoising steps; None for the pipeline's own.
        num_texture_steps: steps of the texture, of a `BYOCPipeline` that draws it; None likewise, 0 for no texture.
        seed: of the series, at least 0.
        batch_size: cells at a time; None for as many as memory holds (see `MemoryMeter`). Half as many, and half of
            these, where they do not fit.
        suffix: of the files, one that `write_volume` knows, or ".parquet" for tables of many cells.
        voxel_size_um: for the files; None for what the pipeline's `volume_processor` says.
        share: (process, number of processes); each makes its own cells of the series.
        conditions: of a `BYOCPipeline` that takes some: name -> value in its own unit, of all cells.
        guidance_scale: of a `BYOCPipeline`; None for the pipeline's own.
        only: numbers of the cells to make, in place of the first `num_samples`; not for Parquet.
        given_channels: of a `BYOCPipeline` that completes cells: name of a channel -> files that the cells have in
            turn, read by `prepare_channel`.

    Returns:
        All files of the series, those of the other processes too.

    Raises:
        ValueError: if the folder holds cells that other weights or settings made, if the pipeline refuses these, or
            if not even one cell fits into memory.
    """
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    schedulers = {name: getattr(pipeline, name, None) for name in ("scheduler", "texture_scheduler")}
    vqvae = getattr(pipeline, "vqvae", None)
    latent_range = vqvae and vqvae.config.get("latent_range")
    labels = class_labels and [label if isinstance(label, str) else int(label) for label in class_labels]
    record = {
        "weights": {name: fingerprint_weights(network) for name, network in networks.items()},
        "latent_range": None if latent_range == "per_channel" else latent_range,  # which no weight tells
        **{
            name: scheduler and {"name": type(scheduler).__name__} | _public(scheduler.config)
            for name, scheduler in schedulers.items()
        },
        "num_inference_steps": num_inference_steps or pipeline.config.get("default_num_inference_steps"),
        "num_texture_steps": (
            pipeline.config.get("default_num_texture_steps") if num_texture_steps is None else num_texture_steps
        ),
        "class_labels": labels,
        "seed": seed,
        "suffix": suffix,
    }
    arguments_of_all = {"conditions": conditions and dict(conditions), "guidance_scale": guidance_scale}
    arguments_of_all = {name: value for name, value in arguments_of_all.items() if value is not None}
    record |= arguments_of_all
    given_channels = given_channels or {}
    if given_channels:
        record["given_channels"] = {name: list(map(_fingerprint, paths)) for name, paths in given_channels.items()}
    if guidance_scale is None and pipeline.config.get("default_guidance_scale", 1.0) != 1.0:
        record["guidance_scale"] = pipeline.config["default_guidance_scale"]
    if guider := getattr(pipeline, "guider", None):
        record["guider"] = {"name": type(guider).__name__} | _public(guider.config)
    record = json.loads(json.dumps(record, default=str))  # as it is read again
    _check(record, folder / RECORD_NAME)
    processor = getattr(pipeline, "volume_processor", None)
    voxel_size_um = voxel_size_um or (processor and processor.voxel_size_um)

    files = files_of_series(folder, range(num_samples) if only is None else sorted(set(only)), suffix)
    class_names = {number: name for name, number in (pipeline.config.get("label2id") or {}).items()}

    def columns_of(cell: int) -> dict:
        label = {"label": class_names.get(labels[cell % len(labels)], labels[cell % len(labels)])} if labels else {}
        # text, as many readers of tables have no integers of 64 bits
        given = {f"given_{name}": str(paths[cell % len(paths)]) for name, paths in given_channels.items()}
        return label | (conditions or {}) | given | {"cell": cell, "seed": str(cell_seed(seed, cell))}

    def ask(cells: Sequence[int]) -> np.ndarray:
        arguments = {"num_samples": len(cells), "generator": [cell_generator(seed, cell) for cell in cells]}
        arguments |= arguments_of_all
        if num_inference_steps is not None:
            arguments["num_inference_steps"] = num_inference_steps
        if num_texture_steps is not None:
            arguments["num_texture_steps"] = num_texture_steps
        for name, paths in given_channels.items():
            own = (read_volume(paths[cell % len(paths)]) for cell in cells)
            volumes = np.stack([prepare_channel(volume, processor, name) for volume in own])
            arguments.setdefault("given_channels", {})[name] = volumes
        if labels:
            arguments["class_labels"] = [labels[cell % len(labels)] for cell in cells]
        return pipeline(**arguments).volumes

    def note() -> None:
        with whole_or_absent(folder / RECORD_NAME) as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        if share[0] == 0 and suffix != ".parquet":
            write_table(folder, files, [columns_of(*file.cells) for file in files])

    missing = [file for file in files[share[0] :: share[1]] if not file.is_whole]
    cells, made, is_noted = [cell for file in missing for cell in file.cells], {}, False
    size, device = batch_size or 1, pipeline._execution_device
    meter = MemoryMeter(device) if batch_size is None and cells else None
    title = f"Generating (process 1 of {share[1]})" if share[1] > 1 else "Generating"
    with tqdm(total=len(cells), desc=title, unit="volume", disable=share[0] > 0) as bar:
        while cells:
            batch, volumes = cells[:size], None
            try:
                volumes = ask(batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise ValueError(
                        f"Expected memory for one cell on {device}, got less ({error}). Take bfloat16, another device,"
                        " or a pipeline that is offloaded or decodes in tiles."
                    ) from error
            if volumes is None:  # after the handler, which holds on to what was computed
                size = len(batch) // 2
                torch.cuda.empty_cache()
                continue
            if not is_noted:  # the pipeline has taken the arguments
                note()
                is_noted = True
            made |= zip(batch, volumes, strict=True)
            cells = cells[len(batch) :]
            while missing and all(cell in made for cell in missing[0].cells):
                file = missing.pop(0)
                own = [made.pop(cell) for cell in file.cells]
                names = processor.config.channel_names if processor else [f"channel_{m}" for m in range(len(own[0]))]
                file.write(own, [columns_of(cell) for cell in file.cells], voxel_size_um, tuple(names))
            bar.update(len(batch))
            if meter is not None:
                size, meter = meter.cells_that_fit(len(batch)), None
    if not is_noted and share[0] == 0:
        note()
    return [file.path for file in files]


def _fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the files of an OME-Zarr's folder, wherever it lies."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _public(config: dict) -> dict:
    return {name: value for name, value in config.items() if not name.startswith("_")}  # _diffusers_version, ...


def _check(record: dict, path: Path) -> None:
    """Refuse a folder whose cells were made with anything else."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else record
    differing = [name for name in known | record if known.get(name) != record.get(name)]
    if differing:
        raise ValueError(
            f"Expected {path.parent} to hold cells of the same {', '.join(differing)}, got others (see {path.name} "
            "there). Delete it, or choose another folder."
        )
