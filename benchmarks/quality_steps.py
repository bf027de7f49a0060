"""Quality against steps: the Fréchet distance by the number of function evaluations, for each usable scheduler.

    python benchmarks/quality_steps.py                                        # pretrained/byoc-phantom, many hours
    python benchmarks/quality_steps.py --num_cells 24 --steps 2 8 32 --schedulers DDIMScheduler UniPCMultistepScheduler

Writes quality_steps.json, .md and .png, after each point, few steps first, and goes on with what the JSON file already
has. A function evaluation is one call of the U-Net; some schedulers take two a step. Every point starts from the same
noise. Timesteps are spaced "trailing", or "leading" where the pipeline demands it.

Steps change the latents alone, so decoded latents are compared with decoded phantoms, both without texture, which
would take most of the time: 37 measurements of shape and brightness, in standard deviations of the decoded phantoms.
Pieces apart from a cell, which texture would leave out (`connected_cells`), are left out all the same.
`--with_texture` compares whole cells with phantoms. The dotted line is the floor: other phantoms, treated alike.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from timing import machine
from tqdm import tqdm

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import PHENOTYPES, PhantomCells
from diffusers_byoc.metrics import frechet_distance, measure_cells, morphology_features, standardize_features
from diffusers_byoc.optional import optional
from diffusers_byoc.pipelines.schedulers import NEEDS_LEADING_SPACING, SCHEDULERS_FOR
from diffusers_byoc.pipelines.texture import loose_pieces
from diffusers_byoc.training import keep_freed_memory
from diffusers_byoc.visualization import degradation_curves, write_png
from diffusers_byoc.whole_files import whole_or_absent


STEPS = (1, 2, 3, 5, 8, 12, 20, 35, 60, 100, 200, 500, 1000)
# draw noise in every step: the others follow one path
STOCHASTIC = (
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "SASolverScheduler",
)
BATCH = 16


def make_scheduler(name: str, config: dict):
    """With the spacing of few steps where the scheduler can take it."""
    if name == "DPMSolverSDEScheduler":
        optional("torchsde", "sde")
    return getattr(diffusers, name).from_config(
        config, timestep_spacing="leading" if name in NEEDS_LEADING_SPACING else "trailing"
    )


def count_calls(pipeline: BYOCPipeline) -> list[int]:
    """A list whose length is the number of calls of the U-Net from now on."""
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    return calls


def class_labels_of(pipeline: BYOCPipeline, phenotypes: list[str], count: int) -> list[str] | None:
    """Of cells in turn, as `PhantomCells` has them."""
    if pipeline.unet.config.num_class_embeds is None:
        return None
    return [phenotypes[index % len(phenotypes)] for index in range(count)]


@torch.no_grad()
def phantom_features(pipeline: BYOCPipeline, phenotypes: list[str], count: int, seed: int, with_texture: bool):
    """(count, 37) of phantoms as they are, or decoded from their codes."""
    cells = PhantomCells(count, pipeline.volume_processor, phenotypes, seed)
    features = []
    for start in tqdm(range(0, count, BATCH), f"Phantoms of seed {seed}"):
        volumes = torch.stack([cells[index]["volumes"] for index in range(start, min(start + BATCH, count))])
        if not with_texture:
            volumes = pipeline.reconstruct(volumes, num_texture_steps=0).cpu()
        features.append(morphology_features(measure_cells((volumes / 2 + 0.5).float().numpy())))
    return np.concatenate(features)


def generated_features(pipeline, labels: list[str] | None, count: int, steps: int, with_texture: bool):
    """((count, 37) of generated cells, seconds a cell)."""
    features, seconds = [], 0.0
    for start in range(0, count, BATCH):
        number = min(BATCH, count - start)
        started = time.perf_counter()
        volumes = pipeline(
            number,
            class_labels=labels and labels[start : start + number],
            num_inference_steps=steps,
            num_texture_steps=None if with_texture else 0,
            generator=[torch.Generator().manual_seed(start + index) for index in range(number)],
        ).volumes
        seconds += time.perf_counter() - started
        if not with_texture and pipeline.texture_unet is not None and pipeline.texture_unet.config.connected_cells:
            for volume in volumes:
                volume[:, loose_pieces(torch.from_numpy(volume) * 2 - 1).numpy()] = 0.0
        features.append(morphology_features(measure_cells(volumes)))
    return np.concatenate(features), seconds / count


def measure(
    pipeline: BYOCPipeline, args: argparse.Namespace, points: list[dict], save: Callable[[list], None]
) -> None:
    """Add the points that are not there yet; each is saved at once."""
    phenotypes = args.phenotypes
    labels = class_labels_of(pipeline, phenotypes, args.num_cells)
    reference = phantom_features(pipeline, phenotypes, args.num_cells, 101, args.with_texture)

    def distance(features: np.ndarray) -> float:
        return float(frechet_distance(*(standardize_features(x, reference) for x in (reference, features))))

    if not any(point["scheduler"] == "floor" for point in points):
        others = phantom_features(pipeline, phenotypes, args.num_cells, 102, args.with_texture)
        points.append({"scheduler": "floor", "steps": 0, "evaluations": 0, "frechet": distance(others)})
        save(points)
    calls, config = count_calls(pipeline), pipeline.scheduler.config
    known = {(point["scheduler"], point["steps"]) for point in points}
    wanted = [(name, steps) for steps in sorted(args.steps) for name in args.schedulers if (name, steps) not in known]
    for name, steps in tqdm(wanted, "Points"):
        pipeline.scheduler = make_scheduler(name, config)
        point = {"scheduler": name, "steps": steps, "spacing": pipeline.scheduler.config.timestep_spacing}
        calls.clear()
        try:
            features, seconds = generated_features(pipeline, labels, args.num_cells, steps, args.with_texture)
        except (ValueError, IndexError, ZeroDivisionError) as error:  # too few steps for some: that is a result, too
            points.append(point | {"evaluations": None, "frechet": None, "reason": str(error)})
        else:
            evaluations = len(calls) // -(-args.num_cells // BATCH)
            found = {"evaluations": evaluations, "frechet": distance(features), "seconds_per_cell": seconds}
            points.append(point | found)
        save(points)


def curves(points: list[dict]) -> tuple[dict, dict]:
    """(scheduler -> evaluations, panel -> scheduler -> Fréchet distances), in the order of the evaluations."""
    levels, scores = {}, {}
    for name in dict.fromkeys(point["scheduler"] for point in points if point["scheduler"] != "floor"):
        found = {p["evaluations"]: p["frechet"] for p in points if p["scheduler"] == name and p["frechet"] is not None}
        if found:
            levels[name] = sorted(found)
            panel = "Fréchet distance, noise in every step" if name in STOCHASTIC else "Fréchet distance, no noise"
            scores.setdefault(panel, {})[name] = [found[level] for level in levels[name]]
    return levels, scores


def table(points: list[dict], floor: float) -> list[str]:
    """Markdown: a row a scheduler, a column a number of steps."""
    steps = sorted({point["steps"] for point in points if point["scheduler"] != "floor"})
    lines = [f"Fréchet distance (function evaluations); phantoms among themselves {floor:.1f}.", ""]
    lines += ["| scheduler | " + " | ".join(f"{number} steps" for number in steps) + " |"]
    lines += ["| --- |" + " --- |" * len(steps)]
    for name in dict.fromkeys(point["scheduler"] for point in points if point["scheduler"] != "floor"):
        found = {point["steps"]: point for point in points if point["scheduler"] == name}
        words = ["–" if number not in found else _in_words(found[number]) for number in steps]
        lines.append(f"| {name} | " + " | ".join(words) + " |")
    return lines


def _in_words(point: dict) -> str:
    return "refused" if point["frechet"] is None else f"{point['frechet']:.1f} ({point['evaluations']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained", default="pretrained/byoc-phantom", help="folder of a pipeline trained on phantoms")
    add("--output_dir", default="outputs/quality_steps")
    add("--phenotypes", nargs="+", choices=PHENOTYPES, default=list(PHENOTYPES), help="that it was trained on")
    add("--num_cells", type=int, default=192, help="of each point, and of phantoms")
    add("--steps", type=int, nargs="+", default=STEPS)
    add("--schedulers", nargs="+", help="of diffusers (default: all that are usable)")
    add("--with_texture", action="store_true", help="compare whole cells, not decoded latents")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()

    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = BYOCPipeline.from_pretrained(args.pretrained, dtype=getattr(torch, args.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    args.schedulers = args.schedulers or list(SCHEDULERS_FOR[pipeline.config.prediction_type])
    path = Path(args.output_dir) / "quality_steps.json"
    settings = {
        name: getattr(args, name) for name in ("pretrained", "phenotypes", "num_cells", "with_texture", "dtype")
    }
    points = []
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["settings"] != settings:
            raise SystemExit(f"Expected {path} of {settings}, got {known['settings']}. Give another --output_dir.")
        points = known["points"]

    def save(points: list[dict]) -> None:
        with whole_or_absent(path) as temporary:
            record = {"settings": settings, "machine": machine(device), "points": points}
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        floor = next(point["frechet"] for point in points if point["scheduler"] == "floor")
        path.with_suffix(".md").write_text("\n".join(table(points, floor)) + "\n", encoding="utf-8")
        levels, scores = curves(points)
        if scores:
            figure = degradation_curves(levels, scores, "function evaluations", num_columns=2)
            for axes in figure.axes:
                axes.set(xscale="log", yscale="log")
                axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
                axes.tick_params(axis="x", which="minor", labelbottom=False)
                axes.axhline(floor, color="black", linewidth=1, linestyle=":")
            write_png(figure, path.with_suffix(".png"))

    measure(pipeline, args, points, save)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
