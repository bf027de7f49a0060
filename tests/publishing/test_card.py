"""The template, filled; and the cards that are committed."""

import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from conditional import DOSES, make_pipeline
from diffusers_byoc import WGAN, BaselinePipeline, BYOCPipeline
from diffusers_byoc.publishing import make_card
from diffusers_byoc.publishing.card import TEMPLATE


REPOSITORY = Path(__file__).parents[2]
SAVED = REPOSITORY / "tests" / "pipelines" / "saved"
CARDS = sorted((REPOSITORY / "model_cards").glob("byoc-*.md"))


@pytest.fixture(scope="module")
def pipeline():
    return BYOCPipeline.from_pretrained(SAVED / "conditional")


def record_of(is_phantom=False, num_held_out=2, **arguments):
    given = {"preset": "/home/me/mine.json", "seed": 3, "dataset_name": None, "gradient_accumulation_steps": 2}
    given |= {
        "autoencoder_max_train_steps": 7000,
        "autoencoder_learning_rate": 3e-4,
        "autoencoder_train_batch_size": 4,
    }
    given |= {"diffusion_max_train_steps": 9, "diffusion_learning_rate": 1e-4, "diffusion_train_batch_size": 1}
    cells = {"class_names": ["nocodazole"], "voxel_size_um": [1.0, 0.5, 0.5], "is_phantom": is_phantom}
    stage = {
        "arguments": given | {"diffusion_max_train_minutes": 2.5} | arguments,
        "data": {"num_cells": 1234, "num_held_out": num_held_out},
        "cells": cells,
        "hardware": "a fine CPU, 2 threads",
        "num_processes": 3,
        "versions": {"torch": "2.13.0"},
    }
    return {"autoencoder": stage, "diffusion": stage}


def sections(text):
    return re.findall(r"^## (.+)$", text, re.M)


@pytest.mark.parametrize("is_phantom", [True, False])
def test_the_card_says_what_the_cells_were(pipeline, is_phantom):
    card = make_card(pipeline, "org/name", record_of(is_phantom))
    text = card.text
    assert ("They are not microscopy" in text) == is_phantom and ("ask the author" not in text) == is_phantom
    assert ("phantoms" in card.data.tags) == is_phantom
    assert card.data.license == ("apache-2.0" if is_phantom else None)
    kind = "phantoms (nocodazole), drawn" if is_phantom else "cells (nocodazole) of the author's own."
    assert f"1234 {kind}" in text and "2 more were held out. Voxel size: 1 x 0.5 x 0.5 µm." in text
    assert ("enlarge or balance" not in text) == is_phantom


def test_the_card_says_how_it_was_trained_and_what_loads_it(pipeline):
    text = make_card(pipeline, "org/name", record_of(), has_picture=True, has_report=True).text
    assert "| autoencoder | 7,000 | 24 | 0.0003 |" in text
    assert "| diffusion | 9, at most 2.5 minutes | 6 | 0.0001 |" in text
    assert "preset `mine.json`, seed 3, on a fine CPU, 2 threads:" in text and "/home/me" not in text
    code = re.search(r"```python\n(.+?)```", text, re.S)[1]
    assert 'BYOCPipeline.from_pretrained("org/name")' in code and 'class_labels="binimetinib"' in code
    assert "(8, 2, 8, 8, 8)" in code
    loading = code.replace("org/name", str(SAVED / "conditional")).replace("pipe(8,", "pipe(8, num_inference_steps=2,")
    found = {}
    exec(loading, found)  # the card's own three lines
    assert found["cells"].shape == (8, 2, 8, 8, 8)
    assert "](cells.png)" in text and "](report.md)" in text and 'variant="fp16"' in text
    assert (
        "Not measured on cells that were held out." in text
        and "\n\n\n" not in text
        and "{" not in text.split("```")[0]
    )


def test_what_nobody_wrote_down_is_called_unknown(pipeline):
    card = make_card(pipeline, "org/name", {}, has_fp16=False)
    assert "The run left no record of its cells; ask the author." in card.text
    assert "The run left no record (`arguments.json`)" in card.text and "None" not in str(card)
    assert "fp16" not in card.text and "cells.png" not in card.text and "report.md" not in card.text


def test_data_sets_and_licences_reach_the_metadata(pipeline, tmp_path):
    record = record_of(num_held_out=0, dataset_name="org/melanoma")
    card = make_card(pipeline, "org/name", record, license="cc-by-4.0", data_license="CC BY 4.0")
    assert card.data.datasets == ["org/melanoma"] and card.data.license == "cc-by-4.0"
    assert "of [org/melanoma](https://huggingface.co/datasets/org/melanoma)." in card.text
    assert "Licence of the data: CC BY 4.0." in card.text and "held out. Voxel" not in card.text
    assert card.data.base_model is None and "Begun with" not in card.text
    begun = make_card(pipeline, "org/name", record_of(pretrained="org/base"))
    assert begun.data.base_model == "org/base" and "[org/base](https://huggingface.co/org/base)" in begun.text
    for own in (str(tmp_path), f"{tmp_path}/shards/*.tar", "shards/*.tar"):
        record = record_of(dataset_name=own, pretrained=str(tmp_path / "gone"))
        here = make_card(pipeline, "org/name", record, data_description="Twelve cells.")
        assert here.data.datasets is None and here.data.base_model is None
        assert "Twelve cells." in here.text and "shards" not in str(here) and str(tmp_path) not in str(here)


def test_the_card_of_a_baseline_speaks_of_what_it_has():
    pipeline = BaselinePipeline(WGAN(sample_size=16, latent_dim=4, base_channels=4).eval())
    record = {
        "w_gan": record_of(baseline="w_gan", max_train_steps=70, train_batch_size=1, learning_rate=1e-4)["diffusion"]
    }
    card = make_card(pipeline, "org/name", record)
    assert 'BaselinePipeline.from_pretrained("org/name")' in card.text and "BYOCPipeline" not in card.text
    assert "By `byoc-train-baseline`" in card.text and "| w_gan | 70 | 6 | 0.0001 |" in card.text
    assert "This is a model that the paper compares with" in card.text
    assert "gan" in card.data.tags and "diffusion" not in card.data.tags and "Scheduler" not in card.text


@pytest.mark.parametrize("values", [DOSES, DOSES | {"embedding": np.eye(3)}], ids=["a number", "a vector"])
def test_conditions_stand_in_the_lines_that_load_it(values, tmp_path):
    pipeline = make_pipeline(values)
    pipeline.save_pretrained(tmp_path)
    text = make_card(pipeline, str(tmp_path), {}).text
    assert "conditions dose_um (from 0 to 4)" in text and ("embedding (3 numbers)" in text) == (len(values) > 1)
    assert ('conditions={"dose_um": 2.0}' in text) == (len(values) == 1)
    found = {}
    exec(re.search(r"```python\n(.+?)```", text, re.S)[1], found)
    assert found["cells"].shape == (8, 2, 8, 8, 8)


def test_there_is_one_template():
    assert (REPOSITORY / "model_cards" / "template.md").read_text() == TEMPLATE.read_text()


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_for_the_papers_drugs_wait_for_weights(path):
    card = ModelCard.load(path)
    drug = path.stem.removeprefix("byoc-")
    assert card.data.library_name == "diffusers" and drug in card.data.tags and card.data.license is None
    assert "**No weights are published yet.**" in card.text and f"--label {drug} " in card.text
    assert sections(card.text) == sections(TEMPLATE.read_text())
    assert "Not measured: there are no weights." in card.text


def test_there_is_a_card_for_each_of_the_papers_drugs():
    assert [path.stem for path in CARDS] == ["byoc-binimetinib", "byoc-blebbistatin", "byoc-nocodazole"]
