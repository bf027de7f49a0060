"""Draw the pictures of the pages on one model's questions: guidance, interpolation, channels, conditions, a new drug.

    python docs/questions.py guidance --pretrained pretrained/byoc-phantom
    python docs/questions.py interpolation --pretrained pretrained/byoc-phantom
    python docs/questions.py channels --pretrained outputs/channels
    python docs/questions.py three_channels --pretrained outputs/three_channels
    python docs/questions.py conditions --pretrained outputs/doses
    python docs/questions.py new_drug --pretrained pretrained/byoc-phantom --adapter outputs/my_drug --cells my_cells

Each page says how the pipeline was trained. Cells of a row begin with the same noise.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import PhantomCells, read_volume
from diffusers_byoc.data.sets.folder import find_volumes
from diffusers_byoc.visualization import compare_volumes, frame_strip, write_png


IMAGES = Path(__file__).parent / "images"
NUM_CELLS = 5  # of a row


def draw(pipeline: BYOCPipeline, **given) -> np.ndarray:
    """(NUM_CELLS, M, D, H, W), the same noise in every call."""
    generators = [torch.Generator().manual_seed(index) for index in range(NUM_CELLS)]
    return pipeline(NUM_CELLS, generator=generators, **given).volumes


def phantoms(pipeline: BYOCPipeline, phenotype: str, **given) -> np.ndarray:
    """(NUM_CELLS, M, D, H, W) in [0, 1]."""
    cells = PhantomCells(NUM_CELLS, pipeline.volume_processor, [phenotype], 4711, **given)
    return np.stack([cells[index]["volumes"].numpy() for index in range(NUM_CELLS)]) / 2 + 0.5


def guidance(pipeline: BYOCPipeline, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Heading -> a row of cells (NUM_CELLS, M, D, H, W), as those below."""
    rows = {"blebbistatin, phantoms": phantoms(pipeline, "blebbistatin")}
    for scale in (1.0, 2.0, 4.0):
        rows[f"guidance_scale {scale:g}"] = draw(pipeline, class_labels="blebbistatin", guidance_scale=scale)
    return rows | {"no class": draw(pipeline)}


def channels(pipeline: BYOCPipeline, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Cells for one nucleus, a cell for each nucleus, a nucleus for each cell, all of the cells `true`."""
    names = list(pipeline.vqvae.config.channel_names)
    true = read_cells(pipeline, args.cells) if args.cells else phantoms(pipeline, "binimetinib")
    label = args.class_label or "binimetinib"
    nuclei = true[:, names.index("nucleus")]
    return {
        "true": true,
        "cells for the first one's nucleus": draw(pipeline, class_labels=label, given_channels={"nucleus": nuclei[0]}),
        "a cell for each nucleus": draw(pipeline, class_labels=label, given_channels={"nucleus": nuclei}),
        "a nucleus for each cell": draw(
            pipeline, class_labels=label, given_channels={"cell": true[:, names.index("cell")]}, keep_given=True
        ),
    }


def three_channels(pipeline: BYOCPipeline, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The other two channels for each nucleus, a nucleus for each two, and all three."""
    true = phantoms(pipeline, "nocodazole")
    given = dict(zip(pipeline.vqvae.config.channel_names, true.swapaxes(0, 1), strict=True))
    nuclei = {"nucleus": given.pop("nucleus")}
    return {
        "true": true,
        "cell and mitochondria for each nucleus": draw(pipeline, given_channels=nuclei),
        "a nucleus for each cell and its mitochondria": draw(pipeline, given_channels=given, keep_given=True),
        "generated": draw(pipeline),
    }


def conditions(pipeline: BYOCPipeline, args: argparse.Namespace) -> dict[str, np.ndarray]:
    rows = {}
    for dose in (0.0, 1.0, 4.0, 20.0):
        rows[f"{dose:g} µM, phantoms"] = phantoms(pipeline, "nocodazole", doses=[dose])
        rows[f"{dose:g} µM, generated"] = draw(pipeline, conditions={"dose_um": dose})
    return rows


def new_drug(pipeline: BYOCPipeline, args: argparse.Namespace) -> dict[str, np.ndarray]:
    rows = {"of 30 new cells": read_cells(pipeline, args.cells)}
    rows["nocodazole, without the adapter"] = draw(pipeline, class_labels="nocodazole")
    pipeline.load_lora_weights(args.adapter, adapter_name="new")
    rows["with the adapter"] = draw(pipeline, class_labels="nocodazole")
    pipeline.set_adapters("new", 0.5)
    return rows | {"with half of it": draw(pipeline, class_labels="nocodazole")}


def read_cells(pipeline: BYOCPipeline, folder: str) -> np.ndarray:
    """(NUM_CELLS, M, D, H, W) in [0, 1]: the first cells of a folder, prepared as those of the training."""
    cells = [read_volume(path) for path in find_volumes(Path(folder))[:NUM_CELLS]]
    prepared = [pipeline.volume_processor.preprocess(cell.data, cell.voxel_size_um) for cell in cells]
    return pipeline.volume_processor.postprocess(torch.stack(prepared))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = {
        question.__name__: question for question in (guidance, channels, three_channels, conditions, new_drug)
    }
    parser.add_argument("question", choices=[*questions, "interpolation"])
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--adapter", help="new_drug: folder of the adapter")
    parser.add_argument("--cells", help="new_drug, channels: folder of the true cells (channels: phantoms)")
    parser.add_argument("--class_label", help="channels: of the true cells")
    parser.add_argument("--output", type=Path, help="the picture (default: docs/images/QUESTION.png)")
    args = parser.parse_args()

    pipeline = BYOCPipeline.from_pretrained(args.pretrained, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    if args.question == "interpolation":
        generator = torch.Generator().manual_seed(0)
        frames = pipeline.interpolate(8, class_labels=["binimetinib", "blebbistatin"], generator=generator).volumes
        figure = frame_strip(frames)
    else:
        rows = questions[args.question](pipeline, args)
        names = pipeline.vqvae.config.channel_names
        figure = compare_volumes(rows, names, voxel_size_um=pipeline.volume_processor.voxel_size_um)
    write_png(figure, args.output or IMAGES / f"{args.question}.png")


if __name__ == "__main__":
    main()
