"""How few denoising steps are as good as a thousand? Schedulers on one model trained on phantoms, quality and time.

    python benchmarks/samplers.py --pretrained outputs/demo                       # minutes
    python benchmarks/samplers.py --pretrained outputs/demo --num_cells 256       # more exactly

Quality is the Fréchet distance of the cells' shapes (37 measurements in units of the phantoms' standard deviation) to
new phantoms of the same drug. The first row is what phantoms reach among themselves, the best that a generator can;
the second what is left of them after the autoencoder, the best that this latent diffusion can.
The steps of `DDPMScheduler`, 1000 by default, are those the model was trained with.
"""

import argparse
import time

import diffusers
import numpy as np
import torch
from timing import machine
from tqdm import tqdm

from diffusers_byoc import BYOCPipeline, MultiCodebookVQModel
from diffusers_byoc.data import PHENOTYPES, PhantomCells, VolumeProcessor
from diffusers_byoc.metrics import (
    frechet_distance,
    measure_cells,
    morphology_features,
    neighbour_metrics,
    standardize_features,
)


SAMPLERS = (
    ("DDPMScheduler", 1000),
    ("DDPMScheduler", 100),
    ("DDPMScheduler", 30),
    ("DDIMScheduler", 100),
    ("DDIMScheduler", 30),
    ("DDIMScheduler", 15),
    ("DDIMScheduler", 8),
    ("DPMSolverMultistepScheduler", 15),
    ("DPMSolverMultistepScheduler", 8),
    ("UniPCMultistepScheduler", 15),
    ("UniPCMultistepScheduler", 8),
)
BATCH = 8


def features_of(volumes: np.ndarray) -> np.ndarray:
    return morphology_features(measure_cells(volumes))


def phantoms(processor: VolumeProcessor, drug: str, count: int, seed: int) -> np.ndarray:
    cells = PhantomCells(count, processor, [drug], seed)
    return np.stack([(cells[index]["volumes"].numpy() + 1) / 2 for index in range(count)])


@torch.no_grad()
def reconstruct(vqvae: MultiCodebookVQModel, volumes: np.ndarray) -> np.ndarray:
    """Volumes in [0, 1], encoded and decoded."""
    batches = (torch.from_numpy(volumes) * 2 - 1).to(vqvae.device, vqvae.dtype).split(BATCH)
    samples = torch.cat([vqvae(batch).sample.float().cpu() for batch in batches])
    return (samples / 2 + 0.5).clamp(0, 1).numpy()


def generate(pipeline: BYOCPipeline, count: int, steps: int) -> tuple[np.ndarray, float]:
    """(count, M, D, H, W), and the seconds that the fastest batch took. Each starts from the same noise."""
    generator, batches, seconds = torch.Generator().manual_seed(0), [], []
    for _ in tqdm(range(0, count, BATCH), desc=f"{type(pipeline.scheduler).__name__}, {steps}"):
        start = time.perf_counter()
        batches.append(pipeline(BATCH, num_inference_steps=steps, generator=generator).volumes)
        seconds.append(time.perf_counter() - start)
    return np.concatenate(batches)[:count], min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of a pipeline trained on phantoms of --drug")
    parser.add_argument("--drug", default="nocodazole", choices=sorted(PHENOTYPES))
    parser.add_argument("--num_cells", type=int, default=64, help="of each sampler, and of new phantoms")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = BYOCPipeline.from_pretrained(args.pretrained, dtype=getattr(torch, args.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    processor = pipeline.volume_processor
    reference = features_of(phantoms(processor, args.drug, args.num_cells, seed=101))
    others = phantoms(processor, args.drug, args.num_cells, seed=102)

    print(f"{machine(device)}; {args.dtype}, {args.num_cells} cells each\n")
    print("| sampler | steps | 8 cells, s | Fréchet distance, shape | coverage | cell volume, µm³ |")
    print("| --- | --- | --- | --- | --- | --- |")

    def row(name: str, steps: int | str, seconds: float | None, features: np.ndarray) -> None:
        scaled = [standardize_features(x, reference) for x in (reference, features)]
        distance, coverage = frechet_distance(*scaled), neighbour_metrics(*scaled).coverage
        volume = f"{features[:, 0].mean():.0f} ± {features[:, 0].std():.0f}"
        print(f"| {name} | {steps} | {seconds or '–':.3} | {distance:.1f} | {coverage:.2f} | {volume} |", flush=True)

    row("new phantoms", "–", None, features_of(others))
    row("the same, encoded and decoded", "–", None, features_of(reconstruct(pipeline.vqvae, others)))
    for name, steps in SAMPLERS:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        volumes, seconds = generate(pipeline, args.num_cells, steps)
        row(name, steps, seconds, features_of(volumes))


if __name__ == "__main__":
    main()
