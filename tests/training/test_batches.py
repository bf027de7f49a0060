from dataclasses import replace

import torch

from diffusers_byoc.data import PhantomCells, VolumeProcessor
from diffusers_byoc.models import MultiCodebookVQModel
from diffusers_byoc.pipelines.conditions import measure_conditions
from diffusers_byoc.training.batches import AugmentedCopies, latent_batches
from diffusers_byoc.training.latents import cache_latents
from diffusers_byoc.training.settings import StageSettings


SETTINGS = StageSettings(max_train_steps=6, train_batch_size=4, augmentation="quarter_turns", seed=3)


def phantoms():
    return PhantomCells(4, VolumeProcessor(32, 2, ("cell", "nucleus")))


def quarter_turns(volume):
    mirrored = (volume, volume.flip(-1))
    return [v.rot90(k, (-2, -1)) for v in mirrored for k in range(4)]


def test_copies_are_the_cells_in_poses_that_do_not_change():
    cells = phantoms()
    copies, again = AugmentedCopies(cells, 5, SETTINGS), AugmentedCopies(cells, 5, SETTINGS)
    assert len(copies) == 20
    poses = []
    for index in range(20):
        item, cell = copies[index], cells[index % 4]
        assert torch.equal(item["volumes"], again[index]["volumes"]) and item["class_labels"] == cell["class_labels"]
        poses.append([torch.equal(item["volumes"], turn) for turn in quarter_turns(cell["volumes"])].index(True))
    assert len(set(poses)) > 3


def test_conditions_go_with_their_cells(accelerator, tmp_path):
    cells = PhantomCells(4, VolumeProcessor(32, 2, ("cell", "nucleus")), ["nocodazole"], doses=[0.0, 1.0, 2.0, 3.0])
    vqvae = MultiCodebookVQModel(2, None, 2, 4, 1, (8, 8, 8, 8), 0, sample_size=32)
    vqvae.initialize_codebooks(torch.randn(1, 4, 4, 4, 4))
    copies = AugmentedCopies(cells, 2, SETTINGS)
    latents = cache_latents(vqvae, copies, tmp_path, accelerator)
    expected = vqvae.normalize_latents(latents[list(range(8))])
    statistics = measure_conditions(cells.conditions)
    mean, std = statistics[0]["mean"][0], statistics[0]["std"][0]
    for known in (latents, None):  # kept, and encoded on the way
        doses = []
        for clean, _, vectors in latent_batches(accelerator, SETTINGS, cells, vqvae, known, 0, statistics):
            doses += [round(dose, 5) for dose in (vectors[:, 0] * std + mean).tolist()]
            if known is not None:
                nearest = [(expected - latent).abs().flatten(1).amax(1).argmin().item() % 4 for latent in clean]
                assert nearest == doses[-len(nearest) :]
        assert set(doses) == {0.0, 1.0, 2.0, 3.0}


def test_batches_of_copies_have_the_latents_and_labels_of_their_cells(accelerator, tmp_path):
    settings = replace(SETTINGS, seed=8)  # of which no two copies are alike
    cells, vqvae = phantoms(), MultiCodebookVQModel(2, None, 2, 4, 1, (8, 8, 8, 8), 0, sample_size=32)
    vqvae.initialize_codebooks(torch.randn(1, 4, 4, 4, 4))
    copies = AugmentedCopies(cells, 3, settings)
    latents = cache_latents(vqvae, copies, tmp_path, accelerator)
    expected = vqvae.normalize_latents(latents[list(range(12))])
    seen = []
    for clean, labels, _ in latent_batches(accelerator, settings, cells, vqvae, latents, first_step=0):
        for latent, label in zip(clean, labels, strict=True):
            index = (expected - latent).abs().flatten(1).amax(1).argmin().item()
            torch.testing.assert_close(expected[index], latent)
            assert copies[index]["class_labels"] == label
            seen.append(index)
    assert len(seen) == 24 and set(seen) == set(range(12))  # two epochs
    resumed = latent_batches(accelerator, settings, cells, vqvae, latents, first_step=5)
    torch.testing.assert_close(next(iter(resumed))[0], clean)
