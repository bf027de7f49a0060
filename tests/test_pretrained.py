"""The pipelines that come with the repository: they load, they are small, their cards say what they are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import PHENOTYPES, PhantomCells, VolumeProcessor
from diffusers_byoc.metrics import MORPHOLOGY_NAMES, grid_excess, grid_test, measure_cells, morphology_features


FOLDERS = sorted(Path(__file__).parents[1].glob("pretrained/*/model_index.json"))
folders = pytest.mark.parametrize("folder", [path.parent for path in FOLDERS], ids=lambda path: path.name)


@folders
def test_it_is_small_and_says_that_it_knows_phantoms_alone(folder):
    weights = sorted(folder.glob("**/*.safetensors"))
    assert [path.parent.name for path in weights] == ["texture_unet", "unet", "vqvae"]
    assert sum(path.stat().st_size for path in weights) < 12e6
    assert not list(folder.glob("**/*.bin"))
    text = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)[2]
    first_line = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert first_line.startswith("Trained on phantoms")


@folders
def test_it_loads_and_draws_a_cell(folder):
    pipeline = BYOCPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    label = 0 if pipeline.unet.config.num_class_embeds else None
    seed = torch.Generator().manual_seed(0)
    steps = pipeline.config.num_distilled_steps or 4
    volumes = pipeline(1, class_labels=label, num_inference_steps=steps, num_texture_steps=2, generator=seed).volumes
    assert volumes.shape == (1, 2, 64, 64, 64)
    assert 0.002 < (volumes[0, 0] > 0).mean() < 0.2
    assert pipeline.volume_processor.voxel_size_um == (1.0, 1.0, 1.0)
    if label is not None:
        assert list(pipeline.config.label2id) == sorted(PHENOTYPES)


@pytest.mark.slow
@folders
def test_its_cells_have_the_phantoms_sizes_and_no_grid(folder):
    pipeline = BYOCPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    names = list(pipeline.config.label2id or {folder.name.split("-")[-1]: None})
    labels = [index % len(names) for index in range(24)] if pipeline.config.label2id else None
    cells = pipeline(24, class_labels=labels, generator=torch.Generator().manual_seed(0)).volumes
    phantoms = PhantomCells(24, VolumeProcessor(64, voxel_size_um=1.0), sorted(names), seed=987654)
    phantoms = np.stack([phantoms[index]["volumes"].numpy() for index in range(24)]) / 2 + 0.5

    real, generated = (morphology_features(measure_cells(volumes)) for volumes in (phantoms, cells))
    volume = MORPHOLOGY_NAMES.index("cell_volume_um3")
    error = np.hypot(*(features[:, volume].std() for features in (real, generated))) / np.sqrt(24)
    assert abs(real[:, volume].mean() - generated[:, volume].mean()) < 4 * error + 0.03 * real[:, volume].mean()
    for test in grid_test([grid_excess(cell, (cell > 0).any(0)) for cell in cells]):
        assert not test.is_present, test
