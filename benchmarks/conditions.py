"""Does one model of drugs or doses know what it was told? On phantoms, where the truth is known.

    python benchmarks/conditions.py doses --pretrained outputs/doses --doses 1 4 12
    python benchmarks/conditions.py drugs --pretrained outputs/one --others outputs/a outputs/b outputs/c
    python benchmarks/conditions.py path --pretrained outputs/one --class_labels binimetinib blebbistatin

`doses`: cells at doses, those that no training cell had among them, against phantoms drawn at the same dose: the
difference of the mean shapes in standard errors of that difference. A model that knows the law stays within about one.

`drugs`: one model of all drugs, at several guidance scales, against a model for each drug: Fréchet distance of the
shapes (in units of the phantoms' standard deviation) to new phantoms of the drug, the mean over the drugs.

`path`: `interpolate` between two classes: the largest step of the measured shape from one frame to the next, in units
of the phantoms' standard deviation, and how many frames are one connected cell with its nucleus inside.

The models are trained before, with equal time (docs/conditions.md has the commands).
"""

import argparse

import numpy as np
import torch
from samplers import features_of
from tqdm import tqdm

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import PhantomCells
from diffusers_byoc.metrics import frechet_distance, measure_cells, standardize_features
from diffusers_byoc.training.hardware import fastest_precision


BATCH = 8
SHAPE = ("cell_volume_um3", "nucleus_volume_um3", "nucleus_to_cell_ratio", "cell_sphericity")


def generate(pipeline: BYOCPipeline, count: int, **given) -> np.ndarray:
    """(count, M, D, H, W); every call starts from the same noise."""
    generator, batches = torch.Generator().manual_seed(0), []
    for first in tqdm(range(0, count, BATCH), desc=str(given), leave=False):
        batches.append(pipeline(min(BATCH, count - first), generator=generator, **given).volumes)
    return np.concatenate(batches)


def phantoms(pipeline: BYOCPipeline, phenotype: str, count: int, seed: int, dose: float | None = None) -> np.ndarray:
    """(count, M, D, H, W) in [0, 1], as the pipeline's training cells were prepared."""
    doses = None if dose is None else [dose]
    cells = PhantomCells(count, pipeline.volume_processor, [phenotype], seed, doses=doses)
    return np.stack([(cells[index]["volumes"].numpy() + 1) / 2 for index in range(count)])


def shapes(volumes: np.ndarray) -> np.ndarray:
    """(N, len(SHAPE)) of the cells that can be measured."""
    measured = measure_cells(volumes)
    values = np.array([[getattr(cell, name) for name in SHAPE] for cell in measured], float)
    return values[np.isfinite(values).all(axis=1)]


def judge_doses(pipeline: BYOCPipeline, args: argparse.Namespace) -> None:
    print(f"| dose, µM | trained | {' | '.join(f'{name}: law, got, errors' for name in SHAPE)} |")
    print("| --- " * (2 + len(SHAPE)) + "|")
    (statistics,) = pipeline.config.conditions
    class_label = args.phenotype if pipeline.unet.config.num_class_embeds else None
    for dose in args.doses:
        law = shapes(phantoms(pipeline, args.phenotype, args.num_cells, seed=101, dose=dose))
        volumes = generate(pipeline, args.num_cells, class_labels=class_label, conditions={"dose_um": dose})
        got = shapes(volumes)
        error = np.sqrt(law.var(axis=0, ddof=1) / len(law) + got.var(axis=0, ddof=1) / len(got))
        cells = [
            f"{mean:.4g}, {other:.4g}, {(other - mean) / e:+.1f}"
            for mean, other, e in zip(law.mean(axis=0), got.mean(axis=0), error, strict=True)
        ]
        inside = statistics["min"][0] <= dose <= statistics["max"][0]
        print(f"| {dose:g} | {'within' if inside else 'beyond'} | {' | '.join(cells)} |", flush=True)


def judge_drugs(pipeline: BYOCPipeline, args: argparse.Namespace) -> None:
    drugs = sorted(pipeline.config.label2id)
    references = {drug: features_of(phantoms(pipeline, drug, args.num_cells, seed=101)) for drug in drugs}

    def distance(drug: str, volumes: np.ndarray) -> float:
        reference = references[drug]
        return frechet_distance(*(standardize_features(x, reference) for x in (reference, features_of(volumes))))

    print(f"| cells | {' | '.join(drugs)} | mean |")
    print("| --- " * (2 + len(drugs)) + "|")
    rows = {"new phantoms": lambda drug: phantoms(pipeline, drug, args.num_cells, seed=102)}
    for scale in args.guidance_scales:
        rows[f"one model, guidance_scale {scale:g}"] = lambda drug, scale=scale: generate(
            pipeline, args.num_cells, class_labels=drug, guidance_scale=scale
        )
    if args.others:
        if len(args.others) != len(drugs):
            raise SystemExit(f"Expected {len(drugs)} --others, one for each of {drugs}, got {len(args.others)}.")
        others = {drug: load(name) for drug, name in zip(drugs, args.others, strict=True)}
        rows["a model for each drug"] = lambda drug: generate(others[drug], args.num_cells)
    for name, make in rows.items():
        distances = [distance(drug, make(drug)) for drug in drugs]
        numbers = " | ".join(f"{d:.2f}" for d in [*distances, np.mean(distances)])
        print(f"| {name} | {numbers} |", flush=True)


def judge_path(pipeline: BYOCPipeline, args: argparse.Namespace) -> None:
    both = np.concatenate([phantoms(pipeline, label, args.num_cells, seed=101) for label in args.class_labels])
    spread = shapes(both).std(axis=0)
    for number in range(args.num_paths):
        generator = torch.Generator().manual_seed(number)
        frames = pipeline.interpolate(args.num_frames, args.class_labels, generator=generator).volumes
        measured = measure_cells(frames)
        is_cell = [cell.num_cell_components == 1 and cell.nucleus_inside_share > 0.95 for cell in measured]
        steps = np.abs(np.diff(shapes(frames), axis=0)) / spread
        largest = ", ".join(f"{name} {step:.2f}" for name, step in zip(SHAPE, steps.max(axis=0), strict=True))
        print(
            f"path {number}: {sum(is_cell)} of {len(is_cell)} frames are cells; largest steps: {largest}", flush=True
        )


def load(name: str) -> BYOCPipeline:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(fastest_precision(), torch.float32)
    pipeline = BYOCPipeline.from_pretrained(name, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", choices=["doses", "drugs", "path"])
    add("--pretrained", required=True, help="folder of the pipeline")
    add("--num_cells", type=int, default=200, help="of each kind")
    add("--phenotype", default="nocodazole", help="doses: whose phantoms")
    add("--doses", type=float, nargs="+", default=[1.0, 4.0, 12.0], help="doses: in µM")
    add("--guidance_scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0], help="drugs: of the one model")
    add("--others", nargs="+", help="drugs: folders of the models of each drug, in alphabetical order of the drugs")
    add("--class_labels", nargs=2, default=["binimetinib", "blebbistatin"], help="path: both ends")
    add("--num_frames", type=int, default=24, help="path: of each path")
    add("--num_paths", type=int, default=4, help="path: how many, of other noise each")
    args = parser.parse_args()
    judge = {"doses": judge_doses, "drugs": judge_drugs, "path": judge_path}[args.question]
    judge(load(args.pretrained), args)


if __name__ == "__main__":
    main()
