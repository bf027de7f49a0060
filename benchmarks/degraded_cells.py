"""Does every metric move the right way when real cells are damaged by a known amount? Prints a table.

    python benchmarks/degraded_cells.py --train_data_dir my_cells                        # without Med3D
    python benchmarks/degraded_cells.py --train_data_dir my_cells --med3d resnet_50.pth  # FID as well

A third of the cells takes the generator's part, damaged; it is compared with another third, and the last third is what
that generator would have been trained on. Mean ± standard deviation over random thirds.
"""

import argparse
import sys

import numpy as np
from degraded_phantoms import Features, blur, enlarge_nuclei, swap_nuclei
from scipy.ndimage import shift

from diffusers_byoc.commands.cells import read_cells
from diffusers_byoc.commands.data_arguments import add_source_arguments
from diffusers_byoc.evaluation import real_cells
from diffusers_byoc.metrics import MORPHOLOGY_NAMES


HARMLESS = ("shifted by a voxel", "mirrored along x")  # what training cells may undergo and still be copies


def add_noise(volumes: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.05, volumes.shape)
    return (volumes + noise).clip(0, 1).astype(np.float32)


def move_nuclei(volumes: np.ndarray) -> np.ndarray:
    """Nuclei by half the cube along x, out of most cells; what leaves on one side comes in on the other."""
    moved = volumes.copy()
    moved[:, 1] = np.roll(volumes[:, 1], volumes.shape[-1] // 2, axis=-1)
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=5, help="of the choice of thirds")
    parser.add_argument("--med3d", help="weights of Med3D")
    args = parser.parse_args()
    cells = real_cells(read_cells(args, ("cell", "nucleus")))
    volumes = cells.volumes(range(cells.num_cells))
    extract = Features(args.med3d)

    # 1. features of all cells under each damage
    damages = {
        "new cells": lambda v: v,
        "blurred, σ = 1 voxel": lambda v: blur(v, 1 / 3),
        "blurred, σ = 2 voxels": lambda v: blur(v, 2 / 3),
        "noise, σ = 0.05": add_noise,
        "nuclei of twice the volume": lambda v: enlarge_nuclei(v, 1.0),
        "nuclei of other cells": lambda v: swap_nuclei(v, 1.0),
        "nuclei moved outside": move_nuclei,
        "shifted by a voxel": lambda v: shift(v, (0, 0, 1, 1, 1), order=0),
        "mirrored along x": lambda v: np.ascontiguousarray(v[..., ::-1]),
    }
    features = {}
    for name, damage in damages.items():
        features[name] = extract(damage(volumes))
        print(f"{name} ...", file=sys.stderr, flush=True)

    def take(name: str, indices: np.ndarray) -> dict:
        return {kind: rows[indices] for kind, rows in features[name].items()}

    # 2. a third against a third
    third = cells.num_cells // 3
    volume_of_nucleus = features["new cells"]["morphology"][:, MORPHOLOGY_NAMES.index("nucleus_volume_um3")]
    found: dict[str, list[dict]] = {}
    for repetition in range(args.repetitions):
        order = np.random.default_rng([args.seed, repetition]).permutation(cells.num_cells)
        held_out, training, new = order[:third], order[third : 2 * third], order[2 * third : 3 * third]
        large = new[np.argsort(volume_of_nucleus[new])][third // 2 :]
        candidates = {name: take(name, new) for name in damages if name not in HARMLESS}
        candidates |= {
            "large nuclei only, each cell twice": take("new cells", np.resize(large, third)),
            "one cell over and over": take("new cells", np.resize(new[:1], third)),
            "training cells": take("new cells", training),
            "training cells shifted by a voxel": take("shifted by a voxel", training),
            "training cells mirrored": take("mirrored along x", training),
        }
        for name, candidate in candidates.items():
            values = extract.scores(take("new cells", held_out), candidate, take("new cells", training))
            found.setdefault(name, []).append(values)

    metrics = list(found["new cells"][0])
    print(f"| {third} cells against {third} | " + " | ".join(metrics) + " |")
    print("| --- |" + " --- |" * len(metrics))
    for name, rows in found.items():
        columns = ([row[metric] for row in rows] for metric in metrics)
        print(f"| {name} | " + " | ".join(f"{np.mean(c):.2f} ± {np.std(c, ddof=1):.2f}" for c in columns) + " |")


if __name__ == "__main__":
    main()
