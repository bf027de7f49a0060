"""What an evaluation leaves behind: metrics.json, metrics.md and figures."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from diffusers_byoc.metrics import MORPHOLOGY_NAMES, compare_features, memorisation
from diffusers_byoc.visualization import compare_pairs, compare_volumes, feature_distributions, metric_bars, write_png


#: Metric -> its line in the table, in the table's order: title, factor, what to look for.
LINES = {
    "med3d/frechet": ("FID (Med3D)", 1, "low"),
    "med3d/mmd_linear": ("MMD x 10⁴ (Med3D, the paper's)", 1e4, "low"),
    "med3d/mmd_rbf": ("MMD x 10⁴ (Med3D, Gaussian kernel)", 1e4, "0"),
    "med3d/precision": ("precision (Med3D)", 1, "high"),
    "med3d/recall": ("recall (Med3D)", 1, "high"),
    "med3d/density": ("density (Med3D)", 1, "1"),
    "med3d/coverage": ("coverage (Med3D)", 1, "high"),
    "morphology/frechet": ("Fréchet distance (morphology)", 1, "low"),
    "morphology/mmd_linear": ("MMD x 10⁴ (morphology, means)", 1e4, "low"),
    "morphology/mmd_rbf": ("MMD x 10⁴ (morphology, Gaussian kernel)", 1e4, "0"),
    "morphology/precision": ("precision (morphology)", 1, "high"),
    "morphology/recall": ("recall (morphology)", 1, "high"),
    "morphology/density": ("density (morphology)", 1, "1"),
    "morphology/coverage": ("coverage (morphology)", 1, "high"),
    "morphology/median_effect": ("median Wasserstein distance of a feature, in its σ", 1, "low"),
    "morphology/features_that_differ": ("share of features that differ (p < 0.05, corrected)", 1, "low"),
    "morphology/classifier_accuracy": ("accuracy of telling it from real, trees on morphology", 1, "0.5"),
    "volumes/classifier_accuracy": ("accuracy of telling it from real, 3D network", 1, "0.5"),
    "consistency/nucleus_inside_share": ("share of the nucleus inside the cell", 1, "as real"),
    "consistency/one_nucleus_share": ("share of cells with one nucleus, inside", 1, "as real"),
    "consistency/volume_correlation": ("correlation of cell and nucleus volume", 1, "as real"),
    "memorisation/distance_ratio": ("distance to the nearest training cell, over that of held-out cells", 1, "1"),
    "memorisation/near_share": ("share of samples nearer to one than 95 % of held-out cells", 1, "0.05"),
}
_BARS = {
    "med3d/frechet": "FID (Med3D) ↓",
    "morphology/frechet": "Fréchet, morphology ↓",
    "morphology/coverage": "coverage, morphology ↑",
    "morphology/classifier_accuracy": "told from real (0.5)",
}


def write_evaluation(
    args, folds, features, sets, reconstruction, seconds, notes, channel_names, voxel_size_um
) -> None:
    """Write all results into `args.output_dir`.

    Args:
        args: the command line's.
        folds: for each fold, row -> metric -> value.
        features: row -> kind -> (N, K).
        sets: row -> its cells.
        reconstruction: channel -> measure -> value; empty without an autoencoder.
        seconds: step -> its duration.
        notes: what a reader of the table must know, a line each.
        channel_names: M names.
        voxel_size_um: (z, y, x).
    """
    output_dir = Path(args.output_dir)
    summary = {row: _over_folds([fold[row] for fold in folds]) for row in folds[0]}
    comparisons = []
    if "morphology" in args.features:
        comparisons = compare_features(
            features["real"]["morphology"], features["generated"]["morphology"], MORPHOLOGY_NAMES
        )
    results = {
        "arguments": {key: value for key, value in vars(args).items() if not callable(value)},
        "num_cells": {name: cell_set.num_cells for name, cell_set in sets.items()},
        "summary": summary,
        "folds": folds,
        "features": [asdict(comparison) for comparison in comparisons],
        "reconstruction": reconstruction,
        "seconds": seconds,
        "notes": notes,
    }
    text = json.dumps(_without_nan(results), indent=2, ensure_ascii=False, allow_nan=False, default=float)
    (output_dir / "metrics.json").write_text(text + "\n", encoding="utf-8")

    figures = _write_figures(output_dir, folds, features, sets, comparisons, channel_names, voxel_size_um)
    lines = _page(args, summary, len(folds), sets, comparisons, reconstruction, seconds, notes, figures)
    (output_dir / "metrics.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for note in notes:
        print(note)
    print(f"Wrote {output_dir / 'metrics.md'}, metrics.json and {len(figures)} figures.")


def _over_folds(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Metric -> mean and standard deviation (n - 1) over the folds where it is defined."""
    summary = {}
    for metric in values[0]:
        numbers = np.array([value[metric] for value in values], dtype=float)
        numbers = numbers[np.isfinite(numbers)]
        spread = numbers.std(ddof=1) if len(numbers) > 1 else math.nan
        summary[metric] = {"mean": float(numbers.mean()) if len(numbers) else math.nan, "std": float(spread)}
    return summary


def _page(args, summary, num_folds, sets, comparisons, reconstruction, seconds, notes, figures) -> list[str]:
    origin = args.pretrained or args.generated_dir
    kind = "real ones"
    if not (args.train_data_dir or args.dataset_name):
        kind = "phantoms, synthetic shapes drawn by a formula, which take the part of real cells below"
    lines = [
        "# Evaluation",
        "",
        f"{sets['generated'].num_cells} cells of `{origin}` against {sets['real'].num_cells} {kind}. Mean ±"
        f" standard deviation over {num_folds} fold(s); every column is compared with the same held-out cells, in"
        " equal numbers."
        " *real*: the other real cells, the best that can be reached. *shuffled channels* (each channel from another"
        " cell) and *blurred* (σ = 2 voxels): obviously bad generators.",
        "",
        *(line for note in notes for line in (f"> {note}", "")),
        "| metric | good is | " + " | ".join(summary) + " |",
        "| --- | --- |" + " --- |" * len(summary),
    ]
    for metric, (title, factor, good) in LINES.items():
        if metric in summary["generated"]:
            cells = (_plus_minus(row.get(metric), factor) for row in summary.values())
            lines.append(f"| {title} | {good} | " + " | ".join(cells) + " |")
    if reconstruction:
        lines += ["", "## Reconstruction by the autoencoder, of held-out cells of the first fold", ""]
        lines += ["| channel | MSE | PSNR, dB | SSIM | Dice | codes used | perplexity |", "| --- |" + " --- |" * 6]
        for channel, row in reconstruction.items():
            lines.append(
                f"| {channel} | {row['mse']:.5f} | {row['psnr']:.2f} | {row['ssim']:.4f} | {row['dice']:.4f} | "
                f"{row['codes_used']:.1%} | {row['perplexity']:.0f} |"
            )
    if comparisons:
        lines += ["", "## Each measurement, all generated against all real cells", ""]
        lines += ["Sorted by effect; p-values of the Kolmogorov-Smirnov test, Benjamini-Hochberg corrected.", ""]
        lines += ["| measurement | Wasserstein distance | in σ of real | corrected p |", "| --- | --- | --- | --- |"]
        for row in sorted(comparisons, key=lambda row: -np.nan_to_num(row.effect, nan=-1.0)):
            lines.append(f"| {row.name} | {row.wasserstein:.4g} | {row.effect:.2f} | {row.adjusted_p_value:.2g} |")
    lines += ["", "## Figures", ""] + [f"![{title}]({name})\n" for title, name in figures.items()]
    lines += ["Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + "."]
    return lines


def _write_figures(output_dir, folds, features, sets, comparisons, channel_names, voxel_size_um) -> dict[str, str]:
    """Title -> file name of each figure written."""
    figures = {}

    def write(title: str, name: str, figure) -> None:
        write_png(figure, output_dir / name)
        figures[title] = name

    rows = {name: cell_set.volumes(range(min(6, cell_set.num_cells))) for name, cell_set in sets.items()}
    write("The first cells of each column", "cells.png", compare_volumes(rows, channel_names, voxel_size_um))
    bars = {
        title: {row: {"": [fold[row][metric] for fold in folds]} for row in sets}
        for metric, title in _BARS.items()
        if metric in folds[0]["generated"] and all(np.isfinite(fold[row][metric]) for fold in folds for row in sets)
    }
    if bars:
        write("Metrics, a dot a fold", "metrics.png", metric_bars(bars))
    if comparisons:
        titles = [_title(name) for name in MORPHOLOGY_NAMES]
        shown = {
            name: dict(zip(titles, features[name]["morphology"].T, strict=True)) for name in ("real", "generated")
        }
        p_values = {_title(row.name): row.adjusted_p_value for row in comparisons if np.isfinite(row.adjusted_p_value)}
        distances = {_title(row.name): row.wasserstein for row in comparisons if np.isfinite(row.wasserstein)}
        figure = feature_distributions(shown, p_values, distances, num_columns=6)
        write("Measurements, real and generated; corrected p", "distributions.png", figure)
    generated, real = features["generated"]["voxels"], features["real"]["voxels"]
    found = memorisation(generated, real, generated[:1])  # the baseline is of no use here, the pairs are
    closest = np.argsort(found.distances)[:8]
    pairs = compare_pairs(
        sets["generated"].volumes(closest),
        sets["real"].volumes(found.nearest[closest]),
        [f"distance {found.distances[index]:.2f}" for index in closest],
        headings=("generated", "nearest real cell"),
        channel_names=channel_names,
        voxel_size_um=voxel_size_um,
    )
    write("The generated cells nearest to a real one, and their distance", "nearest.png", pairs)
    return figures


def _title(name: str) -> str:
    """cell_volume_um3 -> cell volume, µm³"""
    for ending, unit in (("_um3", ", µm³"), ("_um2", ", µm²"), ("_um", ", µm")):
        if name.endswith(ending):
            name = name.removesuffix(ending) + unit
            break
    return name.replace("_", " ").replace("num ", "number of ")


def _plus_minus(value: dict[str, float] | None, factor: float) -> str:
    if value is None or not np.isfinite(value["mean"]):
        return "–"
    spread = f" ± {value['std'] * factor:.3g}" if np.isfinite(value["std"]) else ""
    return f"{value['mean'] * factor:.4g}{spread}"


def _without_nan(value):
    """JSON has no nan: null takes its place."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, (float, np.floating)) and not math.isfinite(value) else value
