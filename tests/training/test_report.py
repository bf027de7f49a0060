"""The page that a training ends with, and the card of what it publishes."""

import numpy as np
import pytest
from diffusers import DDIMScheduler

from diffusers_byoc import WGAN, BaselinePipeline, BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.data import CellFolder, VolumeProcessor
from diffusers_byoc.training.report import write_report


def ball(radius):
    z, y, x = np.ogrid[:16, :16, :16]
    return ((z - 7.5) ** 2 + (y - 7.5) ** 2 + (x - 7.5) ** 2 <= radius**2).astype(np.float32)


CHANNELS = {"cell": ball(6), "nucleus": ball(3), "actin": ball(2)}


@pytest.fixture
def pipeline_of():
    def make(channel_names):
        num_channels = len(channel_names)
        vqvae = MultiCodebookVQModel(
            num_channels=num_channels,
            channel_names=channel_names,
            sample_size=16,
            block_out_channels=(4, 8, 8),
            latent_channels=4,
            num_vq_embeddings=8,
            layers_per_block=1,
        )
        unet = DualChannelUNet3D(
            num_channels=num_channels, latent_channels=4, sample_size=4, block_out_channels=(8, 16), layers_per_block=1
        )
        return BYOCPipeline(vqvae.eval(), unet.eval(), DDIMScheduler(clip_sample=False), default_num_inference_steps=1)

    return make


def cells_of(folder, channel_names):
    folder.mkdir()
    for index in range(2):
        np.save(folder / f"{index}.npy", np.stack([CHANNELS[name] for name in channel_names]) * (index + 1))
    processor = VolumeProcessor(16, len(channel_names), channel_names)
    return CellFolder(folder, processor)


def report(pipeline_of, folder, channel_names):
    write_report(
        pipeline_of(channel_names), cells_of(folder / "cells", channel_names), folder, "2 steps", num_samples=1
    )
    return (folder / "report.md").read_text()


@pytest.mark.parametrize("channel_names", [("cell", "nucleus"), ("nucleus", "cell"), ("nucleus", "actin", "cell")])
def test_cell_and_nucleus_are_found_by_name(pipeline_of, tmp_path, channel_names):
    text = report(pipeline_of, tmp_path, channel_names)
    (row,) = [line for line in text.splitlines() if line.startswith("| real cells (2)")]
    cell, nucleus, ratio = (float(column.split("±")[0]) for column in row.split("|")[2:5])
    assert (cell, nucleus) == (CHANNELS["cell"].sum(), CHANNELS["nucleus"].sum())
    assert ratio == pytest.approx(nucleus / cell, abs=0.006)
    assert "Measured in the channels cell, nucleus;" in text
    assert "lengths are in voxels" in text and (tmp_path / "volumes" / "cell_000.ome.tif").is_file()


@pytest.mark.parametrize("channel_names", [("cell",), ("actin", "cell")])
def test_without_a_nucleus_the_cell_alone_is_measured(pipeline_of, tmp_path, channel_names):
    text = report(pipeline_of, tmp_path, channel_names)
    (row,) = [line for line in text.splitlines() if line.startswith("| real cells (2)")]
    cell, *of_the_nucleus = (column.strip() for column in row.split("|")[2:6])
    assert float(cell.split("±")[0]) == CHANNELS["cell"].sum() and of_the_nucleus == ["–"] * 3
    assert "Measured in the channels cell; segmented by Otsu's threshold." in text
    assert text.startswith("# BYOC report\n\n2 steps\n")


def test_the_page_of_a_baseline_speaks_of_what_it_has(tmp_path):
    model = WGAN(sample_size=16, latent_dim=4, base_channels=4).eval()
    pipeline, cells = BaselinePipeline(model), cells_of(tmp_path / "cells", ("cell", "nucleus"))
    write_report(pipeline, cells, tmp_path, "2 steps", num_samples=1)
    text = (tmp_path / "report.md").read_text()
    assert "WGAN." in text and "autoencoder" not in text and "| generated (1) |" in text
