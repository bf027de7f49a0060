"""The sets of cells that an evaluation compares, and their features: computed once, shared out, kept on disk."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from scipy.ndimage import gaussian_filter
from tqdm.auto import tqdm

from diffusers_byoc import BYOCPipeline, __version__
from diffusers_byoc.data import CellDataset, read_volume, write_ome_tiff
from diffusers_byoc.data.cells import check_channel_order
from diffusers_byoc.data.files import VolumeFileError


CHUNK = 16  # cells whose features are computed, and kept, together


@dataclass(frozen=True)
class CellSet:
    """Cells of one kind: a row of the evaluation.

    Args:
        name: as in the table.
        num_cells: how many there are.
        volume: index -> (M, D, H, W) float32 in [0, 1].
    """

    name: str
    num_cells: int
    volume: Callable[[int], np.ndarray]

    def volumes(self, indices) -> np.ndarray:
        """(B, M, D, H, W) of these cells."""
        return np.stack([self.volume(int(index)) for index in indices])


def real_cells(cells: CellDataset) -> CellSet:
    return CellSet("real", len(cells), lambda index: ((cells[index]["volumes"] + 1) / 2).numpy())


def shuffled_cells(real: CellSet, seed: int) -> CellSet:
    """Every channel real, from another cell each: an obviously bad generator, for what cell and nucleus share."""
    order = np.random.default_rng(seed).permutation(real.num_cells)
    place = np.argsort(order)

    def volume(index: int) -> np.ndarray:
        first = real.volume(index)
        others = [order[(place[index] + channel) % real.num_cells] for channel in range(1, len(first))]
        return np.stack([first[0], *(real.volume(int(i))[channel] for channel, i in enumerate(others, 1))])

    return CellSet("shuffled channels", real.num_cells, volume)


def blurred_cells(real: CellSet, sigma: float = 2.0) -> CellSet:
    """Real cells after a Gaussian of `sigma` voxels: an obviously bad generator, for texture and edges."""
    return CellSet("blurred", real.num_cells, lambda index: gaussian_filter(real.volume(index), (0, *[sigma] * 3)))


def folder_cells(paths: list[Path], cells: CellDataset, name: str = "generated") -> CellSet:
    """Volumes from files. One that fills the cube already is a generator's output and stays as it is, integers over
    their type's range, floats in [0, 1]; any other is a crop, and goes the way of the real ones."""
    config = cells.processor.config
    cube = (config.num_channels, *(config.sample_size,) * 3)

    def volume(index: int) -> np.ndarray:
        file = read_volume(paths[index])
        data = file.data
        try:
            check_channel_order(file, cells.processor)
            if data.shape != cube:
                return ((cells.processor.preprocess(data, file.voxel_size_um) + 1) / 2).numpy()
            if data.dtype.kind in "bui":
                if data.min() < 0:
                    raise ValueError(f"expected integers from 0, got {data.min()}; shift and rescale them")
                return data.astype(np.float32) / (1 if data.dtype.kind == "b" else np.iinfo(data.dtype).max)
            if not (data.min() >= 0 and data.max() <= 1):
                raise ValueError(f"expected floats in [0, 1], got [{data.min():g}, {data.max():g}]; rescale them")
        except ValueError as error:
            raise VolumeFileError(f"{paths[index]}: {error}") from error
        return data.astype(np.float32)

    return CellSet(name, len(paths), volume)


def generate_cells(
    pipeline: BYOCPipeline,
    num_samples: int,
    folder: Path,
    settings: dict,
    class_names: list[str] | None,
    batch_size: int,
    voxel_size_um: tuple[float, float, float],
) -> list[Path]:
    """Generate what is missing of `num_samples` cells, shared over the processes.

    Cell i depends on the seed and i alone, so that neither batches, processes nor interruptions change it.

    Args:
        pipeline: on this process's device.
        num_samples: how many cells there shall be.
        folder: holds an OME-TIFF a cell.
        settings: "seed" and "num_inference_steps", and what else identifies the cells.
        class_names: the class of each cell, repeated as needed; None without classes.
        batch_size: cells at a time.
        voxel_size_um: recorded in the files.

    Returns:
        The files.

    Raises:
        ValueError: if the folder holds cells of another pipeline or of other settings.
    """
    state = PartialState()
    settings = settings | {"weights": _fingerprint(pipeline), "scheduler": type(pipeline.scheduler).__name__}
    if class_names is not None:
        settings["classes"] = hashlib.blake2b(json.dumps(class_names).encode(), digest_size=16).hexdigest()
    record = folder / "generation.json"
    if record.is_file() and json.loads(record.read_text()) != settings:
        raise ValueError(f"{folder} holds cells of other settings, see {record}; delete it or change --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"cell_{index:06}.ome.tif" for index in range(num_samples)]
    # before any process writes: all must share out the same list
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    state.wait_for_everyone()
    if state.is_main_process:
        write_whole(record, json.dumps(settings, indent=2).encode())
    mine = missing[state.process_index :: state.num_processes]
    pipeline.set_progress_bar_config(disable=True)
    names = pipeline.vqvae.config.channel_names
    for start in tqdm(range(0, len(mine), batch_size), "Generating", disable=not state.is_local_main_process):
        batch = mine[start : start + batch_size]
        seeds = [np.random.SeedSequence([settings["seed"], index]).generate_state(1, np.uint64)[0] for index in batch]
        volumes = pipeline(
            len(batch),
            class_labels=None if class_names is None else [class_names[i % len(class_names)] for i in batch],
            num_inference_steps=settings["num_inference_steps"],
            generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
        ).volumes
        for index, volume in zip(batch, volumes, strict=True):
            write_ome_tiff(paths[index], volume, voxel_size_um, names)
    state.wait_for_everyone()
    return paths


def extract_features(
    cells: CellSet, extractor: str, extract: Callable[[np.ndarray], np.ndarray], folder: Path
) -> np.ndarray:
    """Features of all cells of a set, shared over the processes; the same array in each.

    They are kept under a digest of the volumes and the extractor: what was computed is never computed again, and
    never taken for another's.

    Args:
        cells: the set.
        extractor: name and settings of the features.
        extract: (B, M, D, H, W) -> (B, K).
        folder: for the kept features.

    Returns:
        (N, K) features.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, cells.num_cells, CHUNK)[state.process_index :: state.num_processes]
    found = []
    for start in tqdm(starts, f"{extractor.split()[0]}, {cells.name}", disable=not state.is_local_main_process):
        volumes = cells.volumes(range(start, min(start + CHUNK, cells.num_cells)))
        digest = hashlib.blake2b(f"{__version__} {extractor}".encode() + volumes.tobytes(), digest_size=16).hexdigest()
        path = folder / f"{digest}.npy"
        if not path.is_file():
            content = io.BytesIO()
            np.save(content, extract(volumes))
            write_whole(path, content.getvalue())
        found.append((start, np.load(path, allow_pickle=False)))
    return np.concatenate([features for _, features in sorted(gather_object(found), key=lambda pair: pair[0])])


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, whenever the process ends."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _fingerprint(pipeline: BYOCPipeline) -> str:
    digest = hashlib.blake2b(json.dumps(dict(pipeline.scheduler.config), default=str).encode(), digest_size=16)
    for model in (pipeline.vqvae, pipeline.unet):
        for name, weight in sorted(model.state_dict().items()):
            digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
