"""Draw the pictures of docs/figures.md from phantoms and made-up numbers."""

from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from diffusers_byoc.data import PHENOTYPES, VolumeProcessor, make_phantom
from diffusers_byoc.metrics import measure_cells
from diffusers_byoc.visualization import (
    compare_pairs,
    compare_volumes,
    degradation_curves,
    depth_planes,
    feature_distributions,
    metric_bars,
    sample_library,
    surface_library,
    surface_views,
    write_png,
)


IMAGES = Path(__file__).parent / "images"


def phantom_cells(phenotype: str, num_cells: int) -> np.ndarray:
    """(B, 2, 64, 64, 64) in [0, 1]."""
    processor = VolumeProcessor()
    cells = [processor.preprocess(make_phantom(phenotype, seed).volume) for seed in range(num_cells)]
    return (np.stack(cells) + 1) / 2


def main() -> None:
    rng = np.random.default_rng(0)
    cells = {phenotype: phantom_cells(phenotype, 6) for phenotype in PHENOTYPES}
    some = cells["blebbistatin"]
    blurred = gaussian_filter(some, (0, 0, 2, 2, 2))

    # 1. volumes
    figures = {
        "compare_volumes": compare_volumes({"phantoms": some[:3], "the same, blurred": blurred[:3]}, show_planes=True),
        "surface_library": surface_library(cells),
        "sample_library": sample_library(cells),
        "surface_views": surface_views(np.stack([some[3], cells["binimetinib"][2]])),
        "depth_planes": depth_planes(some[2]),
        "compare_pairs": compare_pairs(
            some[:4],
            np.stack([blurred[0], some[5], some[0], blurred[3]]),
            titles=["blurred", "another", "another", "blurred"],
            headings=("phantom", "partner"),
        ),
    }

    # 2. numbers
    figures["metric_bars"] = metric_bars(
        {
            metric: {
                method: {data_set: rng.normal(scale, 0.08 * scale, 5) for data_set in ("set 1", "set 2", "set 3")}
                for method in ("method A", "method B", "method C", "method D")
            }
            for metric, scale in (("FID ↓", 2), ("MMD × 10⁴ ↓", 9))
        }
    )
    shapes = {}
    for name in ("blebbistatin", "nocodazole"):
        measured = measure_cells(phantom_cells(name, 40))
        shapes[name] = {
            "cell volume, µm³": [cell.cell_volume_um3 for cell in measured],
            "nucleus to cell": [cell.nucleus_to_cell_ratio for cell in measured],
            "extent": [cell.cell_extent for cell in measured],
        }
    figures["feature_distributions"] = feature_distributions(shapes)
    levels = np.linspace(0, 1, 6)
    repeats = 1 + 0.08 * rng.standard_normal(5)
    figures["degradation_curves"] = degradation_curves(
        levels,
        {
            "FID": {"blur": np.outer(4 * levels**2, repeats), "noise": np.outer(3 * levels, repeats)},
            "recall": {"blur": np.outer(0.9 - 0.7 * levels, repeats), "noise": np.outer(0.9 - 0.3 * levels, repeats)},
        },
    )
    for name, figure in figures.items():
        figure.dpi = 110
        write_png(figure, IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
