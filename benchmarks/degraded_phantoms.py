"""Does every metric move the right way when phantoms are damaged by a known amount? Draws docs/images/degradation.png.

    python benchmarks/degraded_phantoms.py                      # without Med3D
    python benchmarks/degraded_phantoms.py --med3d resnet_50.pth  # FID as well

Damage goes from 0 to 1: a blur of up to 3 voxels, nuclei of up to twice their volume in the same cells, up to half the
cells from another drug, two of three drugs missing, the nuclei of all cells swapped, all cells copied from the
training set. At 0 the phantoms are new ones of the reference's kind: the best that a generator can be.
"""

import argparse
from functools import partial

import numpy as np
from scipy.ndimage import affine_transform, center_of_mass, gaussian_filter

from diffusers_byoc.data import PHENOTYPES, PhantomCells, VolumeProcessor
from diffusers_byoc.evaluation import FEATURES, METRICS, Comparison, EvaluationSettings
from diffusers_byoc.evaluation.metric_table import compute_metrics
from diffusers_byoc.visualization import degradation_curves, write_png


SHOWN = (
    "med3d/frechet",
    "morphology/frechet",
    "morphology/mmd_rbf",
    "morphology/median_effect",
    "morphology/classifier_accuracy",
    "morphology/precision",
    "morphology/recall",
    "morphology/density",
    "morphology/coverage",
    "morphology/nucleus_inside_share",
    "morphology/one_nucleus_share",
    "morphology/volume_correlation",
    "texture/frechet",
    "texture/classifier_accuracy",
    "grid/share_2",
    "voxels/near_share",
)
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
DRUG = "nocodazole"


def blur(volumes: np.ndarray, level: float) -> np.ndarray:
    return gaussian_filter(volumes, (0, 0, *[3 * level] * 3))


def enlarge_nuclei(volumes: np.ndarray, level: float) -> np.ndarray:
    """Nuclei of 1 to 2 times their volume, in place."""
    enlarged, scale = volumes.copy(), (1 + level) ** (-1 / 3)
    for volume in enlarged:
        center = np.array(center_of_mass(volume[1]))
        volume[1] = affine_transform(volume[1], np.eye(3) * scale, center * (1 - scale), order=1)
    return enlarged


def swap_nuclei(volumes: np.ndarray, level: float) -> np.ndarray:
    """The first share `level` of the cells with each other's nuclei."""
    swapped, count = volumes.copy(), round(level * len(volumes))
    swapped[:count, 1] = np.roll(volumes[:count, 1], 1, axis=0)
    return swapped


class Features:
    """Volumes -> kind of features -> (N, K)."""

    def __init__(self, med3d: str | None):
        self.settings = EvaluationSettings(med3d=med3d or "")
        kinds = [kind for kind in FEATURES if med3d or kind != "med3d"]
        self.extractors = {kind: FEATURES[kind](self.settings) for kind in kinds}

    def __call__(self, volumes: np.ndarray) -> dict[str, np.ndarray]:
        return {kind: extractor.extract(volumes) for kind, extractor in self.extractors.items()}

    def scores(self, real: dict, candidate: dict, training: dict) -> dict[str, float]:
        """Title in the figure -> value, of the metrics that are shown."""
        values = {}
        for kind, extractor in self.extractors.items():
            rows = (real[kind], candidate[kind], training[kind])
            values |= compute_metrics(kind, Comparison(*rows, extractor.names, False, self.settings))
        titles = {
            f"{kind}/{metric.name}": f"{metric.title_of(kind)} ({metric.good})"
            for metric in METRICS
            for kind in metric.kinds
        }
        return {titles[key]: values[key] for key in SHOWN if key in values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_cells", type=int, default=90, help="in each set")
    parser.add_argument("--sample_size", type=int, default=48)
    parser.add_argument("--med3d", help="weights of Med3D")
    parser.add_argument("--output", default="docs/images/degradation.png")
    args = parser.parse_args()
    num, extract = args.num_cells, Features(args.med3d)
    processor = VolumeProcessor(sample_size=args.sample_size)

    def phantoms(phenotype: str, seed: int) -> np.ndarray:
        cells = PhantomCells(num, processor, [phenotype], seed)
        return np.stack([(cell["volumes"].numpy() + 1) / 2 for cell in (cells[index] for index in range(num))])

    def take(features: dict, indices) -> dict:
        return {kind: rows[indices] for kind, rows in features.items()}

    def join(*parts: dict) -> dict:
        return {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}

    real, training, new = ({name: extract(phantoms(name, seed)) for name in PHENOTYPES} for seed in (1, 2, 3))
    volumes = phantoms(DRUG, 3)
    others = [name for name in PHENOTYPES if name != DRUG]
    thirds = slice(0, num // 3)

    def mixed(level: float) -> dict:
        count = round(level * num / 2)
        return join(take(new[others[1]], slice(0, count)), take(new[DRUG], slice(count, num)))

    def dropped(level: float) -> dict:
        kept = round((1 - level) * num / 3)
        return join(*(take(new[name], slice(0, kept)) for name in others), take(new[DRUG], slice(0, num - 2 * kept)))

    def copied(level: float) -> dict:
        count = round(level * num)
        return join(take(training[DRUG], slice(0, count)), take(new[DRUG], slice(count, num)))

    def damaged(damage, level: float) -> dict:
        return extract(damage(volumes, level)) if level else new[DRUG]

    kinds = {
        "blurred": partial(damaged, blur),
        "nuclei too large": partial(damaged, enlarge_nuclei),
        "nuclei swapped": partial(damaged, swap_nuclei),
        "another drug mixed in": mixed,
        "drugs missing": dropped,
        "copies of training cells": copied,
    }
    curves: dict[str, dict[str, list[float]]] = {}
    for kind, candidates in kinds.items():
        three = kind == "drugs missing"
        reference, seen = (
            join(*(take(part[name], thirds) for name in PHENOTYPES)) if three else part[DRUG]
            for part in (real, training)
        )
        for level in LEVELS:
            for metric, value in extract.scores(reference, candidates(level), seen).items():
                curves.setdefault(metric, {}).setdefault(kind, []).append(float(value))
        print(kind, flush=True)
    for metric, by_kind in curves.items():
        print(f"| {metric} | " + " | ".join(f"{v[0]:.3g} → {v[-1]:.3g}" for v in by_kind.values()) + " |")
    figure = degradation_curves(LEVELS, curves, "damage", num_columns=4)
    figure.set_dpi(100)  # small enough for the repository
    write_png(figure, args.output)


if __name__ == "__main__":
    main()
