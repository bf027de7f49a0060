"""Many cells from one pipeline: a file each, the same ones in any batch, after any interruption."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data import write_volume
from ..models.fingerprint import fingerprint_weights
from ..whole_files import whole_or_absent
from .pipeline_byoc import BYOCPipeline


RECORD_NAME = "generation.json"


def cell_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one cell of a series: with them, `pipeline` makes cell `index` of series `seed` again."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def generate_cells(
    pipeline: BYOCPipeline,
    folder: Path,
    num_samples: int,
    class_labels: Sequence[int | str] | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    suffix: str = ".ome.tif",
    share: tuple[int, int] = (0, 1),
) -> list[Path]:
    """Generate what is missing of a series of cells in `folder`.

    Cell i depends on the pipeline, its class, the steps, the seed and i alone, up to rounding: neither batches,
    processes nor interruptions change it, and a file that is deleted comes again. The folder remembers in
    ``generation.json`` what its cells were made with.

    Args:
        pipeline: where the cells come from.
        folder: made if missing; ``cell_000000.ome.tif`` and so on.
        num_samples: how many cells there shall be; more than before adds to them.
        class_labels: the classes that the cells have in turn; None without classes.
        num_inference_steps: denoising steps; None for the pipeline's own.
        seed: of the series, at least 0.
        batch_size: cells at a time.
        suffix: of the files, one that `write_volume` knows.
        share: (process, number of processes); each makes its own cells of the series.

    Returns:
        All files of the series, those of the other processes too.

    Raises:
        ValueError: if the folder holds cells that other weights or settings made, or the classes are not the model's.
    """
    num_labels = 1 if class_labels is None else len(class_labels)
    labels = pipeline.prepare_class_labels(class_labels and list(class_labels), num_labels, "cpu")
    labels = labels if labels is None else labels.tolist()
    steps = num_inference_steps or pipeline.config.default_num_inference_steps
    record = {
        "weights": fingerprint_weights(pipeline.unet, fingerprint_weights(pipeline.vqvae)),
        "scheduler": {"name": type(pipeline.scheduler).__name__} | dict(pipeline.scheduler.config),
        "num_inference_steps": steps,
        "class_labels": labels,
        "seed": seed,
        "suffix": suffix,
    }
    _check_or_write(record, folder / RECORD_NAME)

    paths = [folder / f"cell_{index:06}{suffix}" for index in range(num_samples)]
    missing = [index for index in range(num_samples)[share[0] :: share[1]] if not paths[index].exists()]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        volumes = pipeline(
            len(batch),
            class_labels=None if labels is None else [labels[index % len(labels)] for index in batch],
            num_inference_steps=steps,
            generator=[cell_generator(seed, index) for index in batch],
        ).volumes
        voxel_size_um, names = pipeline.volume_processor.voxel_size_um, tuple(pipeline.vqvae.config.channel_names)
        for index, volume in zip(batch, volumes, strict=True):
            write_volume(paths[index], volume, voxel_size_um, names)
    return paths


def _check_or_write(record: dict, path: Path) -> None:
    text = json.dumps(record, indent=1, default=str)
    if not path.is_file():
        with whole_or_absent(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return
    known, record = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
    differing = [name for name in record if known.get(name) != record[name]]
    if differing:
        raise ValueError(
            f"Expected {path.parent} to hold cells of the same {', '.join(differing)}, got others (see {path.name} "
            "there). Delete it, or choose another folder."
        )
