"""Many cells from one pipeline: a file each, the same ones in any batch, after any interruption."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from ..data import write_volume
from ..models.fingerprint import fingerprint_weights
from ..whole_files import whole_or_absent


RECORD_NAME = "generation.json"


def cell_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one cell of a series: with them, `pipeline` makes cell `index` of series `seed` again."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def generate_cells(
    pipeline: DiffusionPipeline,
    folder: Path,
    num_samples: int,
    class_labels: Sequence[int | str] | None = None,
    num_inference_steps: int | None = None,
    num_texture_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    suffix: str = ".ome.tif",
    voxel_size_um: tuple[float, float, float] | None = None,
    share: tuple[int, int] = (0, 1),
    conditions: Mapping[str, float] | None = None,
    guidance_scale: float | None = None,
) -> list[Path]:
    """Generate what is missing of a series of cells in `folder`.

    Cell i depends on the pipeline, its class, the steps, the seed and i alone, up to rounding: neither batches,
    processes nor interruptions change it, and a file that is deleted comes again. The folder remembers in
    ``generation.json`` what its cells were made with.

    Args:
        pipeline: a `BYOCPipeline`, or another whose call takes `num_samples` and `generator` and returns `volumes`
            (num_samples, M, D, H, W) in [0, 1].
        folder: made if missing; ``cell_000000.ome.tif`` and so on.
        num_samples: how many cells there shall be; more than before adds to them.
        class_labels: the classes that the cells have in turn; None without classes.
        num_inference_steps: denoising steps; None for the pipeline's own.
        num_texture_steps: steps of the texture, of a `BYOCPipeline` that draws it; None likewise, 0 for no texture.
        seed: of the series, at least 0.
        batch_size: cells at a time.
        suffix: of the files, one that `write_volume` knows.
        voxel_size_um: for the files; None for what the pipeline's `volume_processor` says.
        share: (process, number of processes); each makes its own cells of the series.
        conditions: of a `BYOCPipeline` that takes some: name -> value in its own unit, of all cells.
        guidance_scale: of a `BYOCPipeline`; None for the pipeline's own.

    Returns:
        All files of the series, those of the other processes too.

    Raises:
        ValueError: if the folder holds cells that other weights or settings made, or the pipeline refuses these.
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
    if guidance_scale is None and pipeline.config.get("default_guidance_scale", 1.0) != 1.0:
        record["guidance_scale"] = pipeline.config["default_guidance_scale"]
    if guider := getattr(pipeline, "guider", None):
        record["guider"] = {"name": type(guider).__name__} | _public(guider.config)
    record = json.loads(json.dumps(record, default=str))  # as it is read again
    _check(record, folder / RECORD_NAME)
    processor = getattr(pipeline, "volume_processor", None)
    voxel_size_um = voxel_size_um or (processor and processor.voxel_size_um)

    paths = [folder / f"cell_{index:06}{suffix}" for index in range(num_samples)]
    missing = [index for index in range(num_samples)[share[0] :: share[1]] if not paths[index].exists()]
    for start in tqdm(range(0, len(missing), batch_size), "Generating", unit="batch", disable=share[0] > 0):
        batch = missing[start : start + batch_size]
        arguments = {"num_samples": len(batch), "generator": [cell_generator(seed, index) for index in batch]}
        arguments |= arguments_of_all
        if num_inference_steps is not None:
            arguments["num_inference_steps"] = num_inference_steps
        if num_texture_steps is not None:
            arguments["num_texture_steps"] = num_texture_steps
        if labels:
            arguments["class_labels"] = [labels[index % len(labels)] for index in batch]
        volumes = pipeline(**arguments).volumes
        if start == 0:  # the pipeline has taken the arguments
            with whole_or_absent(folder / RECORD_NAME) as temporary:
                temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        for index, volume in zip(batch, volumes, strict=True):
            names = processor.config.channel_names if processor else [f"channel_{m}" for m in range(len(volume))]
            write_volume(paths[index], volume, voxel_size_um, tuple(names))
    return paths


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
