"""Generate cells from a trained pipeline and write what a person wants: a picture, the volumes, a page of numbers."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import CellDataset, StreamedCells, write_volume
from diffusers_byoc.metrics import measure_cells
from diffusers_byoc.training import reconstruction_loss
from diffusers_byoc.visualization import compare_volumes, write_png


def write_report(
    pipeline: BYOCPipeline, cells: CellDataset | StreamedCells, args: argparse.Namespace, minutes: float
) -> None:
    """Generate `args.num_samples` cells into `args.output_dir`: cells.png, volumes/*.ome.tif and report.md."""
    output_dir = Path(args.output_dir)
    generator = torch.Generator().manual_seed(args.seed)
    class_labels = None
    if pipeline.unet.config.num_class_embeds is not None:
        class_labels = [index % len(cells.class_names) for index in range(args.num_samples)]
    generated = pipeline(args.num_samples, class_labels=class_labels, generator=generator).volumes

    real_cells = next(iter(DataLoader(cells, batch_size=min(64, len(cells)))))["volumes"]
    with torch.no_grad():
        reconstruction = pipeline.vqvae(real_cells[:8].to(pipeline.device)).sample.cpu()
    real = ((real_cells + 1) / 2).numpy()
    is_phantom = not (args.train_data_dir or args.dataset_name)
    origin = "phantoms" if is_phantom else "training cells"
    voxel_size_um = pipeline.volume_processor.voxel_size_um
    spacing, unit = (voxel_size_um, "µm³") if voxel_size_um else (1.0, "voxels")
    channel_names = pipeline.vqvae.config.channel_names

    # 1. picture and volumes
    rows = {f"real {origin}": real[: args.num_samples], "generated": generated}
    write_png(compare_volumes(rows, channel_names, spacing), output_dir / "cells.png")
    for index, volume in enumerate(generated):
        write_volume(output_dir / "volumes" / f"cell_{index:03}.ome.tif", volume, voxel_size_um, channel_names)

    # 2. numbers
    table = {}
    if len(channel_names) == 2:
        for name, volumes in ((f"real {origin} ({len(real)})", real), (f"generated ({len(generated)})", generated)):
            table[name] = measure_cells(volumes, spacing, thresholds=(args.cell_threshold, None))
    otsu = "Otsu's threshold"
    threshold = otsu if args.cell_threshold is None else f"{args.cell_threshold} (cell) and {otsu} (nucleus)"
    lines = [
        "# BYOC training report",
        "",
        f"Trained on {len(cells)} {origin} ({', '.join(cells.class_names)}) in {minutes:.1f} minutes: "
        f"{args.autoencoder_max_train_steps} steps of the autoencoder, {args.diffusion_max_train_steps} of the "
        f"diffusion, seed {args.seed}.",
        "Phantoms are synthetic shapes drawn by a formula, not microscopy." if is_phantom else "",
        "",
        "![real above, generated below](cells.png)",
        "",
        f"{type(pipeline.scheduler).__name__}, {pipeline.config.default_num_inference_steps} steps. "
        f"Reconstruction error of 8 training cells (mean squared, volumes in [-1, 1]): "
        f"{reconstruction_loss(reconstruction, real_cells[:8]).item():.5f}.",
        "",
        f"| cells | cell volume, {unit} | nucleus volume, {unit} | nucleus to cell | nucleus inside |"
        " one connected cell |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(name, measured) for name, measured in table.items()),
        "",
        f"Mean and standard deviation over the cells; the last column counts them. Segmented by {threshold}.",
        ""
        if voxel_size_um
        else "The cells' voxel sizes are unknown or differ: lengths are in voxels, bars as if of 1 µm.",
    ]
    (output_dir / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Wrote {output_dir / 'report.md'}, {output_dir / 'cells.png'} and {len(generated)} volumes.")


def _row(name: str, measured: list) -> str:
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
