"""What an evaluation leaves behind: metrics.json, metrics.md and figures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..metrics import FeatureComparison, compare_features, memorisation, turn
from ..metrics.spectrum import NUM_SHELLS
from ..visualization import (
    compare_pairs,
    compare_volumes,
    degradation_curves,
    feature_distributions,
    metric_bars,
    write_png,
)
from ..whole_files import whole_or_absent
from .features import VOXEL_GRID
from .metric_table import KINDS, METRICS, Metric
from .sets import GENERATED, REAL, CellSet


NUM_DISTRIBUTIONS = 36  # measurements of a kind that are drawn, of those that differ most

CONTROLS = (
    " Obviously bad generators: *blurred* (σ = 2 voxels) and, of several channels, *shuffled channels* (each from"
    " another cell). *encoded and decoded*: what the pipeline's autoencoder makes of real cells, if it has one; *with"
    " texture*: the same, after its texture network."
)


@dataclass(frozen=True)
class Results:
    """All that was found.

    Args:
        origin: what made the generated cells, as a reader of the page names it.
        is_phantom: the "real" cells are phantoms.
        sets: generated cells and real ones.
        features: row -> kind -> (N, K).
        names: kind -> names of its features, of the kinds whose features have some.
        folds: for each fold, row -> key -> value.
        channel_names: M names.
        voxel_size_um: (z, y, x).
        reconstruction: channel -> measure -> value; empty without an autoencoder.
        notes: what a reader of the table must know, a line each.
        seconds: step -> its duration.
        arguments: of the command, for the record.
    """

    origin: str
    is_phantom: bool
    sets: Sequence[CellSet]
    features: Mapping[str, Mapping[str, np.ndarray]]
    names: Mapping[str, Sequence[str]]
    folds: Sequence[Mapping[str, Mapping[str, float]]]
    channel_names: Sequence[str]
    voxel_size_um: tuple[float, float, float]
    reconstruction: Mapping[str, Mapping[str, float]]
    notes: Sequence[str]
    seconds: Mapping[str, float]
    arguments: Mapping[str, object]


def write_report(output_dir: Path, results: Results) -> None:
    """Write metrics.json, metrics.md and the figures into a folder."""
    summary = {row: summarize_folds([fold[row] for fold in results.folds]) for row in results.folds[0]}
    features = results.features
    comparisons = {
        kind: compare_features(features[REAL][kind], features[GENERATED][kind], names)
        for kind, names in results.names.items()
    }
    record = {
        "arguments": results.arguments,
        "num_cells": {cells.name: cells.num_cells for cells in results.sets},
        "summary": summary,
        "folds": results.folds,
        "features": {kind: [asdict(row) for row in rows] for kind, rows in comparisons.items()},
        "reconstruction": results.reconstruction,
        "seconds": results.seconds,
        "notes": results.notes,
    }
    figures = _write_figures(output_dir, results, comparisons)
    text = json.dumps(without_nan(record), indent=2, ensure_ascii=False, allow_nan=False, default=float)
    with whole_or_absent(output_dir / "metrics.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    with whole_or_absent(output_dir / "metrics.md") as temporary:
        temporary.write_text("\n".join(_page(results, summary, comparisons, figures)) + "\n", encoding="utf-8")
    for note in results.notes:
        print(note)
    print(f"Wrote {output_dir / 'metrics.md'}, metrics.json and {len(figures)} figures.")


def summarize_folds(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Metric -> "mean" and "std" (n - 1) over the folds where it is defined; nan where there is none."""
    summary = {}
    for metric in values[0] if values else ():
        numbers = np.array([value[metric] for value in values], dtype=float)
        numbers = numbers[np.isfinite(numbers)]
        spread = numbers.std(ddof=1) if len(numbers) > 1 else math.nan
        summary[metric] = {"mean": float(numbers.mean()) if len(numbers) else math.nan, "std": float(spread)}
    return summary


def _page(results: Results, summary: Mapping, comparisons: Mapping, figures: Mapping[str, str]) -> list[str]:
    kind = "phantoms, synthetic shapes drawn by a formula, which take the part of real cells below"
    num_cells = {cells.name: cells.num_cells for cells in results.sets}
    lines = [
        "# Evaluation",
        "",
        f"{num_cells[GENERATED]} cells of `{results.origin}` against {num_cells[REAL]}"
        f" {kind if results.is_phantom else 'real ones'}. Mean ± standard deviation over {len(results.folds)}"
        " fold(s); every column is compared with the same held-out cells, in equal numbers. *real*: the other real"
        f" cells, the best that can be reached.{CONTROLS if set(summary) > {REAL, GENERATED} else ''}",
        "",
        *(line for note in results.notes for line in (f"> {note}", "")),
        "| metric | good is | " + " | ".join(summary) + " |",
        "| --- | --- |" + " --- |" * len(summary),
    ]
    for metric, kind, key in shown_metrics(summary):
        cells = (in_words(row, key, metric.factor) for row in summary.values())
        lines.append(f"| {metric.title_of(kind)} | {metric.good} | " + " | ".join(cells) + " |")
    if results.reconstruction:
        lines += ["", "## Reconstruction by the autoencoder, of held-out cells of the first fold", ""]
        lines += ["| channel | MSE | PSNR, dB | SSIM | Dice | codes used | perplexity |", "| --- |" + " --- |" * 6]
        for channel, row in results.reconstruction.items():
            lines.append(
                f"| {channel} | {row['mse']:.5f} | {row['psnr']:.2f} | {row['ssim']:.4f} | {row['dice']:.4f} | "
                f"{row['codes_used']:.1%} | {row['perplexity']:.0f} |"
            )
    for kind, rows in comparisons.items():
        lines += ["", f"## Each measurement of {kind}, all generated against all real cells", ""]
        lines += ["Sorted by effect; p-values of the Kolmogorov-Smirnov test, Benjamini-Hochberg corrected.", ""]
        lines += ["| measurement | Wasserstein distance | in σ of real | corrected p |", "| --- | --- | --- | --- |"]
        for row in sorted(_defined(rows), key=_effect):
            lines.append(f"| {row.name} | {row.wasserstein:.4g} | {row.effect:.2f} | {row.adjusted_p_value:.2g} |")
    lines += ["", "## Figures", ""] + [f"![{title}]({name})\n" for title, name in figures.items()]
    lines += ["Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in results.seconds.items()) + "."]
    return lines


def shown_metrics(summary: Mapping[str, Mapping]) -> list[tuple[Metric, str, str]]:
    """(metric, kind, key) of all metrics that are defined for some row, in the order of kinds and of the table."""
    found = [(metric, kind, f"{kind}/{metric.name}") for kind in KINDS for metric in METRICS if kind in metric.kinds]
    return [
        entry
        for entry in found
        if any(np.isfinite(row.get(entry[2], {}).get("mean", math.nan)) for row in summary.values())
    ]


def _defined(rows: Sequence[FeatureComparison]) -> list[FeatureComparison]:
    """Without measurements that no cell has, as those of a nucleus where no channel shows one."""
    return [row for row in rows if row.num_real or row.num_generated]


def _effect(row: FeatureComparison) -> float:
    """For sorting: the largest first, what cannot be said last."""
    return -np.nan_to_num(row.effect, nan=-1.0)


def _write_figures(output_dir: Path, results: Results, comparisons: Mapping) -> dict[str, str]:
    """Title -> file name of each figure written."""
    figures, features = {}, results.features

    def write(title: str, name: str, figure) -> None:
        write_png(figure, output_dir / name)
        figures[title] = name

    shown = {row: cells.volumes(range(min(6, cells.num_cells)), row) for cells in results.sets for row in cells.rows}
    figure = compare_volumes(shown, results.channel_names, results.voxel_size_um)
    write("The first cells of each column", "cells.png", figure)
    bars = {}
    for metric, kind, key in shown_metrics(
        {row: summarize_folds([fold[row] for fold in results.folds]) for row in shown}
    ):
        values = {row: {"": [fold[row][key] for fold in results.folds]} for row in shown}
        if metric.is_drawn and all(np.isfinite(value[""]).all() for value in values.values()):
            bars[f"{metric.title_of(kind)} ({metric.good})"] = values
    if bars:
        write("Metrics, a dot a fold", "metrics.png", metric_bars(bars))
    for kind, rows in comparisons.items():
        rows = sorted(_defined(rows), key=_effect)[:NUM_DISTRIBUTIONS]
        columns = [list(results.names[kind]).index(row.name) for row in rows]
        titles = [_title(row.name) for row in rows]
        distributions = {
            name: dict(zip(titles, features[name][kind].T[columns], strict=True)) for name in (REAL, GENERATED)
        }
        p_values = {_title(row.name): row.adjusted_p_value for row in rows if np.isfinite(row.adjusted_p_value)}
        distances = {_title(row.name): row.wasserstein for row in rows if np.isfinite(row.wasserstein)}
        figure = feature_distributions(distributions, p_values, distances, num_columns=6)
        title = f"The measurements of {kind} that differ most, real and generated; corrected p"
        write(title, f"distributions_{kind}.png", figure)
    if "texture" in results.names:
        levels = (np.arange(NUM_SHELLS) + 0.5) / NUM_SHELLS * np.sqrt(3) / 2  # the middles of the shells
        figure = degradation_curves(levels, _spectra(results), "cycles per voxel")
        write("Power of each channel by frequency, decimal logarithm", "spectra.png", figure)
    sets = {cells.name: cells for cells in results.sets}
    generated, real = features[GENERATED]["voxels"], features[REAL]["voxels"]
    found = memorisation(generated, real, generated[:1], VOXEL_GRID)  # the baseline is of no use here, the pairs are
    closest = np.argsort(found.distances)[:8]
    samples = zip(sets[GENERATED].volumes(closest), found.poses[closest], strict=True)
    pairs = compare_pairs(
        np.stack([turn(volume, pose) for volume, pose in samples]),
        sets[REAL].volumes(found.nearest[closest]),
        [f"distance {found.distances[index]:.2f}" for index in closest],
        headings=("generated, turned", "nearest real cell"),
        channel_names=results.channel_names,
        voxel_size_um=results.voxel_size_um,
    )
    write("The generated cells nearest to a real one, and their distance", "nearest.png", pairs)
    return figures


def _spectra(results: Results) -> dict[str, dict[str, np.ndarray]]:
    """Channel -> row -> (shells, cells) of the cells that have a spectrum."""
    names, spectra = list(results.names["texture"]), {}
    for channel in results.channel_names:
        columns = [names.index(f"{channel}_spectrum_{shell:02}") for shell in range(NUM_SHELLS)]
        rows = {row: by_kind["texture"][:, columns] for row, by_kind in results.features.items()}
        rows = {row: spectrum[np.isfinite(spectrum).all(1)].T for row, spectrum in rows.items()}
        spectra[channel] = {row: spectrum for row, spectrum in rows.items() if spectrum.size}
    return spectra


def _title(name: str) -> str:
    """cell_volume_um3 -> cell volume, µm³"""
    for ending, unit in (("_um3", ", µm³"), ("_um2", ", µm²"), ("_um", ", µm")):
        if name.endswith(ending):
            name = name.removesuffix(ending) + unit
            break
    return name.replace("_", " ").replace("num ", "number of ")


def in_words(row: Mapping[str, Mapping[str, float]], key: str, factor: float) -> str:
    """Mean and standard deviation over folds; of one fold the 95 % interval, where the metric has one."""
    value, spread = row[key], ""
    if not np.isfinite(value["mean"]):
        return "–"
    if np.isfinite(value["std"]):
        std = f"{round(value['std'] * factor, 9):.3g}"  # 0, not the 1e-17 that folds of the same value leave
        spread = f" ± {float(std):g}"  # 1140, not 1.14e+03
    elif f"{key}_low" in row:
        low, high = (row[key + end]["mean"] * factor for end in ("_low", "_high"))
        spread = f" [{low:.3g}, {high:.3g}]"
    return f"{value['mean'] * factor:.4g}{spread}"


def without_nan(value):
    """JSON has no nan: null takes its place."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, (float, np.floating)) and not math.isfinite(value) else value
