"""The folder that goes to the Hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.models.fingerprint import fingerprint_weights
from diffusers_byoc.publishing import prepare_folder, read_evaluation


SAVED = Path(__file__).parents[1] / "pipelines" / "saved" / "plain"
CARDS = Path(__file__).parents[2] / "model_cards"
WEIGHTS = [
    f"{part}/diffusion_pytorch_model{variant}.safetensors" for part in ("unet", "vqvae") for variant in (".fp16", "")
]
CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vqvae/config.json"]


@pytest.fixture
def run(tmp_path):
    """The output folder of a training, with all that must not be published."""
    folder = tmp_path / "run"
    shutil.copytree(SAVED, folder)
    (folder / "report.md").write_text("![](cells.png) ![](surfaces.png) [](/etc/hosts.md) [](../secret.md)")
    for name in ("cells.png", "surfaces.png", "secret.png", "../secret.md", "split.json", "logs/events"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "diffusion" / "checkpoint-4").mkdir(parents=True)
    (folder / "diffusion" / "checkpoint-4" / "model.safetensors").write_text("")
    return folder


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def evaluation_of(folder, **arguments):
    """Results in the form of byoc-evaluate, of the pipeline `SAVED`."""
    arguments = {"dtype": "float32", "train_data_dir": None, "dataset_name": None} | arguments
    pipeline = BYOCPipeline.from_pretrained(SAVED, dtype=getattr(torch, arguments["dtype"]))
    weights = {name: fingerprint_weights(getattr(pipeline, name)) for name in ("vqvae", "unet")}
    (folder / "generated").mkdir(parents=True)
    (folder / "generated" / "generation.json").write_text(json.dumps({"weights": weights}))
    summary = {
        row: {
            "morphology/frechet": {"mean": frechet, "std": 0.5},
            "morphology/mmd_linear": {"mean": 0.00015, "std": None},
            "volumes/classifier_accuracy": {"mean": None, "std": None},
        }
        for row, frechet in (("generated", 12.34), ("real", 2.0), ("blurred", 99.0))
    }
    results = {"arguments": arguments, "num_cells": {"generated": 120, "real": 240}, "summary": summary}
    (folder / "metrics.json").write_text(json.dumps(results))
    (folder / "metrics.md").write_text("![](metrics.png)")
    (folder / "metrics.png").write_text("")
    return folder


def test_all_of_the_pipeline_is_published_and_nothing_else_of_the_run(run, tmp_path):
    prepare_folder(run, tmp_path / "out", "org/name")
    pages = ["README.md", "cells.png", "report.md", "surfaces.png"]
    assert files_of(tmp_path / "out") == sorted([*WEIGHTS, *CONFIGS, *pages])
    whole = BYOCPipeline.from_pretrained(tmp_path / "out")
    half = BYOCPipeline.from_pretrained(tmp_path / "out", variant="fp16", dtype=torch.float16)
    for name, weight in BYOCPipeline.from_pretrained(SAVED).unet.state_dict().items():
        assert torch.equal(whole.unet.state_dict()[name], weight)
        assert torch.equal(half.unet.state_dict()[name], weight.half())


def test_weights_that_fp16_cannot_hold_are_refused_or_left_out(tmp_path):
    pipeline = BYOCPipeline.from_pretrained(SAVED)
    pipeline.unet.conv_out.bias.data.fill_(1e5)
    pipeline.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"Expected weights that fp16 can hold .*conv_out.bias.*--no-fp16"):
        prepare_folder(tmp_path / "large", tmp_path / "out", "org/name")
    prepare_folder(tmp_path / "large", tmp_path / "without", "org/name", with_fp16=False)
    assert not [name for name in files_of(tmp_path / "without") if "fp16" in name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_reaches_the_page_and_the_metadata(run, tmp_path, dtype):
    evaluation_dir = evaluation_of(tmp_path / "results", dtype=dtype)
    prepare_folder(run, tmp_path / "out", "org/name", evaluation_dir=evaluation_dir)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "120 generated cells against held-out phantoms among 240" in card.text
    assert (
        "| Fréchet distance, morphology | low | 12.34 ± 0.5 | 2 ± 0.5 |" in card.text and "3D network" not in card.text
    )
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"morphology/frechet": 12.34, "morphology/mmd_linear": 1.5} and card.data.model_name == "name"
    assert {"evaluation/metrics.md", "evaluation/metrics.png"} < set(files_of(tmp_path / "out"))
    # that folder, published as it is, keeps its card and what the card links to
    prepare_folder(tmp_path / "out", tmp_path / "again", "org/other", card_path=tmp_path / "out" / "README.md")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    again = ModelCard.load(tmp_path / "again" / "README.md")
    assert again.data == card.data or again.data.to_dict() == card.data.to_dict()
    assert again.text == card.text.replace('from_pretrained("org/name")', 'from_pretrained("org/other")')


def test_an_evaluation_of_real_cells_says_so(tmp_path):
    evaluation = read_evaluation(evaluation_of(tmp_path / "results", dataset_name="org/cells"), SAVED)
    assert evaluation.comparison == "120 generated cells against held-out cells among 240"


def test_an_evaluation_in_other_steps_says_so(tmp_path):
    evaluation = read_evaluation(evaluation_of(tmp_path / "results", num_inference_steps=5), SAVED)
    assert evaluation.comparison == "120 generated cells (5 steps) against held-out phantoms among 240"


@pytest.mark.parametrize("missing", ["metrics.json", "generated/generation.json", "same weights"])
def test_an_evaluation_of_nobody_knows_what_is_refused(run, tmp_path, missing):
    evaluation_dir = evaluation_of(tmp_path / "results")
    if missing == "same weights":
        pipeline = BYOCPipeline.from_pretrained(run)
        pipeline.unet.conv_out.bias.data += 1e-3
        pipeline.save_pretrained(run)
    else:
        (evaluation_dir / missing).unlink()
    message = "got no metrics.json" if missing == "metrics.json" else "Expected cells of this pipeline"
    with pytest.raises((OSError, ValueError), match=message):
        prepare_folder(run, tmp_path / "out", "org/name", evaluation_dir=evaluation_dir)
    assert not (tmp_path / "out").exists()


def test_a_card_of_ones_own_is_kept_and_its_pictures_go_along(tmp_path):
    (tmp_path / "cards").mkdir()
    text = '---\ntags: [mine]\n---\n\n![](own.png)\nfrom_pretrained("here") from_pretrained("there")\n'
    (tmp_path / "cards" / "mine.md").write_text(text)
    (tmp_path / "cards" / "own.png").write_text("picture")
    prepare_folder(SAVED, tmp_path / "out", "org/name", tmp_path / "cards" / "mine.md", license="mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["mine"] and card.data.license == "mit"
    assert 'from_pretrained("org/name") from_pretrained("there")' in card.text
    assert (tmp_path / "out" / "own.png").read_text() == "picture"


def test_a_card_that_waits_for_weights_is_not_published_with_them(tmp_path):
    with pytest.raises(ValueError, match="got .*byoc-nocodazole.md, with .No weights are published yet"):
        prepare_folder(SAVED, tmp_path / "out", "org/name", CARDS / "byoc-nocodazole.md")
    filled = (CARDS / "byoc-nocodazole.md").read_text().replace("**No weights are published yet.**", "")
    (tmp_path / "card.md").write_text(filled)
    prepare_folder(SAVED, tmp_path / "out", "org/name", tmp_path / "card.md")
    assert 'from_pretrained("org/name")' in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected the folder of a saved pipeline"):
        prepare_folder(tmp_path, tmp_path / "out", "org/name")
