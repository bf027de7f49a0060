"""Seconds to make 1000 phantom cells, by phenotype: python benchmarks/phantoms.py"""

import argparse
import time

from diffusers_byoc.data.phantoms import PHENOTYPES, make_phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_phantoms", type=int, default=200, help="made per phenotype; the time is scaled to 1000")
    parser.add_argument("--max_size", type=int, default=64)
    parser.add_argument("--voxel_size_um", type=float, default=1.0)
    args = parser.parse_args()

    for phenotype in PHENOTYPES:
        start = time.perf_counter()
        for seed in range(args.num_phantoms):
            make_phantom(phenotype, seed, max_size=args.max_size, voxel_size_um=args.voxel_size_um)
        seconds = (time.perf_counter() - start) * 1000 / args.num_phantoms
        print(f"{phenotype:<14}{seconds:6.1f} s per 1000")


if __name__ == "__main__":
    main()
