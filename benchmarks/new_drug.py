"""A fourth phenotype from few cells: an adapter, the whole U-Net, and a U-Net from nothing, trained for equal time.

    python benchmarks/new_drug.py --pretrained pretrained/byoc-phantom --minutes 5

The phenotype is drawn like the others, by a recipe that no pipeline was trained on: small, nearly round cells with
three to five short protrusions. Quality is the Fréchet distance of the cells' shapes (37 measurements in units of the
phantoms' standard deviation) to new cells of that phenotype; the first row is what these reach among themselves, the
second the class that the adapter begins with.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from timing import machine

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.commands.train import main as train
from diffusers_byoc.commands.train_pretrained import MADE_HERE
from diffusers_byoc.commands.training_arguments import PRESETS
from diffusers_byoc.data import VolumeProcessor, write_volume
from diffusers_byoc.data.phantoms import phantom
from diffusers_byoc.metrics import frechet_distance, measure_cells, morphology_features, standardize_features


PHENOTYPE = "bristled"
RECIPE = replace(
    phantom.RECIPES["nocodazole"],
    body_volume_um3=4500.0,
    middle_axis=(0.85, 1.0),
    short_axis=(0.7, 0.9),
    num_lateral=(3, 5),
    protrusion_length=(3.0, 7.0),
    root_radius=(3.0, 4.5),
    tip_radius=(0.9, 1.4),
)
BATCH = 8


def cells_of(processor: VolumeProcessor, count: int, seed: int) -> np.ndarray:
    edge = processor.voxel_size_um[0]
    drawn = (
        phantom.make_phantom(PHENOTYPE, 1000 * seed + i, max_size=processor.config.sample_size, voxel_size_um=edge)
        for i in range(count)
    )
    return np.stack([(processor.preprocess(cell.volume, edge).numpy() + 1) / 2 for cell in drawn])


def features_of(volumes: np.ndarray) -> np.ndarray:
    return morphology_features(measure_cells(volumes))


def generate(pipeline: BYOCPipeline, count: int, label: str | None) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    batches = [pipeline(BATCH, class_labels=label, generator=generator).volumes for _ in range(0, count, BATCH)]
    return np.concatenate(batches)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of a pipeline trained on phantoms, with classes")
    parser.add_argument("--lora_class", default="nocodazole", help="its class that the adapter changes")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each")
    parser.add_argument("--num_train_cells", type=int, default=30)
    parser.add_argument("--num_cells", type=int, default=120, help="of each row")
    parser.add_argument("--output_dir", default="outputs/new_drug")
    args = parser.parse_args()

    phantom.RECIPES[PHENOTYPE] = RECIPE
    phantom.PHENOTYPES += (PHENOTYPE,)
    base = BYOCPipeline.from_pretrained(args.pretrained)
    processor, folder = base.volume_processor, Path(args.output_dir)
    for index, volume in enumerate(cells_of(processor, args.num_train_cells, seed=100)):
        write_volume(folder / "cells" / PHENOTYPE / f"{index:03}.npz", volume, processor.voxel_size_um)

    # 1. train; from nothing with the same networks' configurations
    steps = ("--max_train_steps", 100_000, "--diffusion_lr_scheduler", "constant", "--num_samples", 1)
    steps = (*steps, "--max_train_minutes", args.minutes, "--sample_size", processor.config.sample_size)
    common = (*steps, "--train_data_dir", folder / "cells", "--held_out", 0)
    preset = json.loads((PRESETS / "phantom_lora.json").read_text())
    preset["arguments"] |= {"train_lora": False, "num_inference_steps": base.config.default_num_inference_steps}
    preset["unet"] = {key: value for key, value in base.unet.config.items() if key[0] != "_" and key not in MADE_HERE}
    (folder / "nothing.json").write_text(json.dumps(preset))
    runs = {
        "adapter": ("--preset", "phantom_lora", "--pretrained", args.pretrained, "--lora_class", args.lora_class),
        "whole U-Net": ("--preset", "phantom_drug", "--pretrained", args.pretrained),
        "from nothing": ("--preset", folder / "nothing.json", "--vqvae_path", Path(args.pretrained) / "vqvae"),
    }
    for name, arguments in runs.items():
        train([str(argument) for argument in (*arguments, *common, "--output_dir", folder / name.replace(" ", "_"))])

    # 2. judge, all with the same scheduler, steps and texture
    reference = features_of(cells_of(processor, args.num_cells, seed=101))
    print(f"{machine('cpu')}; {args.num_train_cells} cells, {args.minutes:g} minutes each\n")
    print("| cells | Fréchet distance, shape |\n| --- | --- |")

    def row(name: str, volumes: np.ndarray) -> None:
        scaled = [standardize_features(x, reference) for x in (reference, features_of(volumes))]
        print(f"| {name} | {frechet_distance(*scaled):.1f} |", flush=True)

    row("new cells of the phenotype", cells_of(processor, args.num_cells, seed=102))
    row(f"the pipeline's {args.lora_class}", generate(base, args.num_cells, args.lora_class))
    base.load_lora_weights(folder / "adapter")
    row("adapter", generate(base, args.num_cells, args.lora_class))
    for name in ("whole U-Net", "from nothing"):
        trained = BYOCPipeline.from_pretrained(folder / name.replace(" ", "_"))
        pipeline = BYOCPipeline(
            trained.vqvae,
            trained.unet,
            base.scheduler,
            base.texture_unet,
            base.texture_scheduler,
            default_num_inference_steps=base.config.default_num_inference_steps,
            volume_processor_config=base.config.volume_processor_config,
        )
        row(name, generate(pipeline, args.num_cells, None))


if __name__ == "__main__":
    main()
