"""Generate cells from a trained pipeline and write what a person wants: a picture, the volumes, a page of numbers."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..baselines import BaselinePipeline
from ..data import Cells, write_volume
from ..metrics import CellMorphology, find_channels, measure_cells
from ..pipelines import BYOCPipeline
from ..visualization import compare_volumes, surface_library, write_png
from .losses import reconstruction_loss


def write_report(
    pipeline: BYOCPipeline | BaselinePipeline,
    cells: Cells,
    output_dir: str | Path,
    opening: str,
    num_samples: int = 8,
    seed: int = 0,
    cell_threshold: float | None = None,
) -> None:
    """Generate cells into `output_dir`: cells.png, surfaces.png, volumes/*.ome.tif and report.md.

    Cell and nucleus are measured in the channels that `find_channels` finds.

    Args:
        pipeline: on the device to generate on.
        cells: to show and measure beside the generated ones.
        output_dir: made if missing.
        opening: of the report: what the pipeline was trained on, how long, in how many steps.
        num_samples: cells to generate.
        seed: of their noise.
        cell_threshold: in [0, 1], the cell is brighter; None for Otsu's threshold.
    """
    output_dir = Path(output_dir)
    class_labels, arguments = None, {"generator": torch.Generator().manual_seed(seed)}
    is_ours = isinstance(pipeline, BYOCPipeline)
    if is_ours and pipeline.unet.config.num_class_embeds is not None:
        present = sorted(set(cells.labels))
        class_labels = [present[index % len(present)] for index in range(num_samples)]
        arguments["class_labels"] = class_labels
    if is_ours and pipeline.config.conditions:  # those of the cells beside them
        labels = class_labels or [None] * num_samples
        rows = [_nth_cell(cells, index // len(set(labels)), label) for index, label in enumerate(labels)]
        arguments["conditions"] = {
            condition["name"]: cells.conditions[condition["name"]][rows] for condition in pipeline.config.conditions
        }
    generated = pipeline(num_samples, **arguments).volumes

    batch = next(iter(DataLoader(cells, batch_size=min(64, len(cells)))))
    real_cells, real_labels = batch["volumes"], batch["class_labels"].tolist()
    real = ((real_cells + 1) / 2).numpy()
    is_phantom = cells.is_phantom
    origin = "phantoms" if is_phantom else "real cells"
    voxel_size_um = pipeline.volume_processor.voxel_size_um
    spacing, unit = (voxel_size_um, "µm³") if voxel_size_um else (1.0, "voxels")
    channel_names = tuple(pipeline.volume_processor.config.channel_names)

    # 1. picture and volumes
    rows = {origin: real[:num_samples], "generated": generated}
    if class_labels is not None:
        rows = {}
        for index in present:
            name = cells.class_names[index]
            rows[f"{name}, {origin}"] = real[[label == index for label in real_labels]][:8]
            rows[f"{name}, generated"] = generated[[label == index for label in class_labels]][:8]
        rows = {heading: row for heading, row in rows.items() if len(row)}
    write_png(compare_volumes(rows, channel_names, spacing), output_dir / "cells.png")
    thresholds = [cell_threshold if name.lower() == "cell" else None for name in channel_names]
    figure = surface_library(generated[:24], channel_names, spacing, thresholds)
    write_png(figure, output_dir / "surfaces.png")
    for index, volume in enumerate(generated):
        write_volume(output_dir / "volumes" / f"cell_{index:03}.ome.tif", volume, voxel_size_um, channel_names)

    # 2. numbers
    how = f"{type(pipeline.model).__name__}." if not is_ours else ""
    if getattr(pipeline, "scheduler", None):
        how += f" {type(pipeline.scheduler).__name__}, {pipeline.config.default_num_inference_steps} steps."
    if is_ours:
        reconstruction = pipeline.reconstruct(real_cells[:8], num_texture_steps=0).cpu()
        error = reconstruction_loss(reconstruction, real_cells[:8]).item()
        how += f" Error of the autoencoder on 8 of the {origin} (mean squared, volumes in [-1, 1]): {error:.5f}."
    channels = find_channels(channel_names)
    measured_in = [channel_names[channel] for channel in channels if channel is not None]
    thresholds, otsu = (cell_threshold, None), "Otsu's threshold"
    threshold = otsu if cell_threshold is None else f"{cell_threshold} (cell) and {otsu} (nucleus)"
    lines = [
        "# BYOC report" if is_ours else "# Baseline report",
        "",
        opening,
        "Phantoms are synthetic shapes drawn by a formula, not microscopy." if is_phantom else "",
        "",
        f"![{origin} above, generated below](cells.png)",
        "",
        "![surfaces of generated cells](surfaces.png)",
        "",
        how.strip(),
        "",
        f"| cells | cell volume, {unit} | nucleus volume, {unit} | nucleus to cell | nucleus inside |"
        " one connected cell |",
        "| --- | --- | --- | --- | --- | --- |",
        _row(f"{origin} ({len(real)})", measure_cells(real, spacing, thresholds, *channels)),
        _row(f"generated ({len(generated)})", measure_cells(generated, spacing, thresholds, *channels)),
        "",
        f"Mean and standard deviation over the cells; the last column counts them. Measured in the channels"
        f" {', '.join(measured_in)}; segmented by {threshold}.",
        ""
        if voxel_size_um
        else "The cells' voxel sizes are unknown or differ: lengths are in voxels, bars as if of 1 µm.",
    ]
    (output_dir / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Wrote {output_dir / 'report.md'}, {output_dir / 'cells.png'} and {len(generated)} volumes.")


def _nth_cell(cells: Cells, number: int, label: int | None) -> int:
    """Index of a cell of a label (None: of any), counted within the label, again from the first after the last."""
    own = [index for index, known in enumerate(cells.labels) if label in (None, known)]
    return own[number % len(own)]


def _row(name: str, measured: list[CellMorphology]) -> str:
    def spread(attribute: str, digits: int) -> str:
        values = np.array([getattr(cell, attribute) for cell in measured], dtype=float)
        values = values[np.isfinite(values)]  # a cell without a nucleus has no share of it inside
        return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}" if len(values) else "–"

    connected = sum(cell.num_cell_components == 1 for cell in measured)
    return (
        f"| {name} | {spread('cell_volume_um3', 0)} | {spread('nucleus_volume_um3', 0)} | "
        f"{spread('nucleus_to_cell_ratio', 2)} | {spread('nucleus_inside_share', 2)} | "
        f"{connected} of {len(measured)} |"
    )
