"""What few steps cost in quality and save in time: pipelines, distilled and not, against new phantoms.

    python benchmarks/few_steps.py --pretrained pretrained/byoc-phantom outputs/four_steps outputs/one_step

Quality is the Fréchet distance of the cells' shapes (37 measurements in units of the phantoms' standard deviation) to
new phantoms of the same phenotypes. The first row is what phantoms reach among themselves. A pipeline that is not
distilled is measured at the steps of those that are, too. The time is that of the fastest batch of 8 cells, with
texture and without.
"""

import argparse
import time

import numpy as np
import torch
from timing import machine

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import PHENOTYPES, PhantomCells, VolumeProcessor
from diffusers_byoc.metrics import (
    frechet_distance,
    measure_cells,
    morphology_features,
    neighbour_metrics,
    standardize_features,
)


BATCH = 8


def phantoms(processor: VolumeProcessor, labels: list[str], count: int, seed: int) -> np.ndarray:
    cells = PhantomCells(count, processor, labels, seed)
    return np.stack([(cells[index]["volumes"].numpy() + 1) / 2 for index in range(count)])


def generate(pipeline: BYOCPipeline, labels: list[str], count: int, steps: int) -> tuple[np.ndarray, float, float]:
    """(count, M, D, H, W), the phenotypes in turn, and the seconds of the fastest batch with texture and without."""
    generator, batches, seconds, bare_seconds = torch.Generator().manual_seed(0), [], [], []
    for first in range(0, count, BATCH):
        names = [labels[index % len(labels)] for index in range(first, first + BATCH)]
        arguments = {"class_labels": names if pipeline.config.label2id else None, "num_inference_steps": steps}
        arguments["generator"] = generator
        start = time.perf_counter()
        batches.append(pipeline(BATCH, **arguments).volumes)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        pipeline(BATCH, num_texture_steps=0, **arguments)
        bare_seconds.append(time.perf_counter() - start)
    return np.concatenate(batches)[:count], min(seconds), min(bare_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, nargs="+", help="folders of pipelines trained on phantoms")
    parser.add_argument("--label", nargs="+", choices=sorted(PHENOTYPES), default=sorted(PHENOTYPES))
    parser.add_argument("--num_cells", type=int, default=120, help="of each pipeline, and of new phantoms")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = BYOCPipeline.from_pretrained(args.pretrained[0]).volume_processor
    reference, others = (
        morphology_features(measure_cells(phantoms(processor, args.label, args.num_cells, seed)))
        for seed in (101, 102)
    )
    print(f"{machine(device)}; {args.dtype}, {args.num_cells} cells each\n")
    print("| pipeline | steps | 8 cells, s | without texture, s | Fréchet distance, shape | coverage |")
    print("| --- | --- | --- | --- | --- | --- |")

    def row(name: str, steps: int | str, times: str, features: np.ndarray) -> None:
        scaled = [standardize_features(x, reference) for x in (reference, features)]
        distance, coverage = frechet_distance(*scaled), neighbour_metrics(*scaled).coverage
        print(f"| {name} | {steps} | {times} | {distance:.1f} | {coverage:.2f} |", flush=True)

    row("new phantoms", "–", "– | –", others)
    pipelines = {
        folder: BYOCPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype)) for folder in args.pretrained
    }
    distilled = {pipeline.config.num_distilled_steps for pipeline in pipelines.values()} - {None}
    for folder, pipeline in pipelines.items():
        pipeline.to(device).set_progress_bar_config(disable=True)
        own = pipeline.config.default_num_inference_steps
        # what the others were distilled to, too, without distillation
        for steps in [own] if pipeline.config.num_distilled_steps else [own, *sorted(distilled, reverse=True)]:
            volumes, seconds, bare_seconds = generate(pipeline, args.label, args.num_cells, steps)
            features = morphology_features(measure_cells(volumes))
            row(folder, steps, f"{seconds:.2f} | {bare_seconds:.2f}", features)


if __name__ == "__main__":
    main()
