"""Seconds that an evaluation's metrics take, on features of normal distributions; and features, per volume.

    python benchmarks/metrics.py                        # 5000 x 2048, the paper's numbers
    python benchmarks/metrics.py --num_volumes 8        # also seconds per volume for morphology and Med3D

Med3D has random weights here: they take as long as trained ones.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from diffusers_byoc.data import PhantomCells, VolumeProcessor
from diffusers_byoc.metrics import (
    Med3DConfig,
    Med3DModel,
    classifier_test,
    frechet_distance,
    measure_cells,
    median_distance,
    memorisation,
    mmd_linear,
    mmd_rbf,
    neighbour_metrics,
)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_cells", type=int, default=5000, help="in each of the two sets")
    parser.add_argument("--num_features", type=int, default=2048)
    parser.add_argument("--num_volumes", type=int, default=0, help="phantoms of 64³ to extract features of")
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, args.num_cells, args.num_features))
    bandwidth = median_distance(a)
    rows = {
        "Fréchet distance": lambda: frechet_distance(a, b),
        "MMD, the paper's": lambda: mmd_linear(a, b),
        "MMD, Gaussian kernel": lambda: mmd_rbf(a, b, bandwidth),
        "precision, recall, density, coverage": lambda: neighbour_metrics(a, b),
        "memorisation": lambda: memorisation(a, b[args.num_cells // 5 :], b[: args.num_cells // 5]),
        "trees on 37 measurements": lambda: classifier_test(a[:, :37], b[:, :37]),
    }
    print(f"| {args.num_cells} x {args.num_features}, {torch.get_num_threads()} threads | seconds |\n| --- | --- |")
    total = 0.0
    for name, function in rows.items():
        total += (duration := seconds(function))
        print(f"| {name} | {duration:.1f} |", flush=True)
    print(f"| together | {total:.1f} |")
    if args.num_volumes:
        cells = PhantomCells(args.num_volumes, VolumeProcessor())
        volumes = np.stack([(cells[i]["volumes"].numpy() + 1) / 2 for i in range(args.num_volumes)])
        model = Med3DModel(Med3DConfig()).to(memory_format=torch.channels_last_3d)
        with torch.no_grad():
            med3d = seconds(lambda: model(torch.from_numpy(volumes))) / args.num_volumes
        print(f"\nper volume of 64³: morphology {seconds(lambda: measure_cells(volumes)) / args.num_volumes:.3f} s,")
        print(f"Med3D {med3d:.3f} s")


if __name__ == "__main__":
    main()
