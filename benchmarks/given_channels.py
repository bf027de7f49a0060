"""Does the cell that a pipeline finds for a nucleus belong to it? On phantoms, where true partners are known.

    python benchmarks/given_channels.py --pretrained outputs/channels --given nucleus
    python benchmarks/given_channels.py --pretrained outputs/channels --given cell mitochondria

New phantoms give some of their channels, and the pipeline generates the others. What was given must stay: the ratio of
its measured volume after and before, and how far its centre moved (after encoding and decoding; `autoencoder` is what
these do alone). What was generated must be distributed as the true partners of such channels are, which three numbers
tell, each beside those of the true partners, of other phantoms, and of the true partners of other cells (right as
cells, wrong for what was given):

- the correlation of nucleus and cell volume over the cells, and the mean share of the nucleus inside the cell;
- the distance between the centres of nucleus and cell, in µm, mean and standard deviation;
- the Fréchet distance of the pairs' shapes (volumes, their ratio, that distance, sphericities) to the true pairs, in
  units of the standard deviation of these.
"""

import argparse

import numpy as np
import torch
from conditions import load, phantoms
from scipy import ndimage
from tqdm import tqdm

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.metrics import frechet_distance, measure_cells, segment_channel, standardize_features


BATCH = 8
PAIR = ("cell_volume_um3", "nucleus_volume_um3", "nucleus_to_cell_ratio", "nucleus_offset_um")
PAIR += ("cell_sphericity", "nucleus_sphericity")


def complete(pipeline: BYOCPipeline, true: np.ndarray, given: list[str], **options) -> np.ndarray:
    """(N, M, D, H, W): of each true cell the channels `given`, and others generated for them."""
    names, batches = list(pipeline.vqvae.config.channel_names), []
    generator = torch.Generator().manual_seed(0)
    for first in tqdm(range(0, len(true), BATCH), desc=f"for {' and '.join(given)}", leave=False):
        batch = true[first : first + BATCH]
        channels = {name: batch[:, names.index(name)] for name in given}
        batches.append(pipeline(given_channels=channels, generator=generator, **options).volumes)
    return np.concatenate(batches)


def decoded(pipeline: BYOCPipeline, true: np.ndarray) -> np.ndarray:
    """The true cells, encoded and decoded."""
    batches = (true[first : first + BATCH] for first in range(0, len(true), BATCH))
    volumes = [pipeline.reconstruct(torch.from_numpy(batch) * 2 - 1).cpu() for batch in batches]
    return torch.cat(volumes).numpy() / 2 + 0.5


def measure_kept(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one channel (N, D, H, W): ratio of volumes, and way of the centre in voxels, of each cell."""
    ratios, ways = [], []
    for volumes in zip(before, after, strict=True):
        masks = [segment_channel(volume).mask for volume in volumes]
        ratios.append(masks[1].sum() / masks[0].sum())
        ways.append(np.linalg.norm(np.subtract(*(ndimage.center_of_mass(mask) for mask in masks))))
    return np.array(ratios), np.array(ways)


def pairs(volumes: np.ndarray, channels: tuple[int, int], voxel_size_um: float) -> tuple[np.ndarray, float]:
    """(N, len(PAIR)) of the cells that can be measured, and the mean share of the nucleus inside."""
    measured = measure_cells(volumes, voxel_size_um, None, *channels)
    values = np.array([[getattr(cell, name) for name in PAIR] for cell in measured], float)
    inside = np.nanmean([cell.nucleus_inside_share for cell in measured])
    return values[np.isfinite(values).all(axis=1)], float(inside)


def judge(pipeline: BYOCPipeline, args: argparse.Namespace) -> None:
    names = list(pipeline.vqvae.config.channel_names)
    label = args.phenotype if pipeline.unet.config.num_class_embeds else None
    true, others = (phantoms(pipeline, args.phenotype, args.num_cells, seed) for seed in (101, 102))
    options = {"class_labels": label, "num_inference_steps": args.num_inference_steps}
    generated = complete(pipeline, true, args.given, **options, guidance_scale=args.guidance_scale)

    print("| given | volume, ratio | autoencoder | centre moved, voxels | autoencoder |")
    print("| --- " * 5 + "|")
    alone = decoded(pipeline, true)
    for name in args.given:
        channel = names.index(name)
        ratios, ways = zip(*(measure_kept(true[:, channel], x[:, channel]) for x in (generated, alone)), strict=True)
        columns = [f"{np.nanmean(values):.2f} ± {np.nanstd(values):.2f}" for values in (*ratios, *ways)]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)

    shuffled = true.copy()
    wrong = [channel for channel, name in enumerate(names) if name not in args.given]
    shuffled[:, wrong] = np.roll(true[:, wrong], 1, axis=0)
    channels = (names.index("cell"), names.index("nucleus"))
    voxel_size_um = (pipeline.volume_processor.voxel_size_um or (1.0,))[0]
    reference, _ = pairs(true, channels, voxel_size_um)
    print("\n| partners | correlation of the volumes | nucleus inside | offset, µm | distance to true pairs |")
    print("| --- " * 5 + "|")
    rows = {"true": true, "of new phantoms": others, "generated": generated, "of other cells": shuffled}
    for name, volumes in rows.items():
        values, inside = pairs(volumes, channels, voxel_size_um)
        correlation = np.corrcoef(values[:, 0], values[:, 1])[0, 1]
        distance = frechet_distance(*(standardize_features(x, reference) for x in (reference, values)))
        offset = f"{values[:, 3].mean():.2f} ± {values[:, 3].std():.2f}"
        print(f"| {name} ({len(values)}) | {correlation:.2f} | {inside:.2f} | {offset} | {distance:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained", required=True, help="folder of a pipeline that was trained with --channel_timesteps_prob")
    add("--given", nargs="+", default=["nucleus"], help="names of channels")
    add("--phenotype", default="nocodazole", help="whose phantoms")
    add("--num_cells", type=int, default=200)
    add("--num_inference_steps", type=int, help="default: the pipeline's")
    add("--guidance_scale", type=float, help="default: the pipeline's")
    args = parser.parse_args()
    judge(load(args.pretrained), args)


if __name__ == "__main__":
    main()
