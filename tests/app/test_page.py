"""What the page's buttons do, through the client of Gradio; `test_browser.py` clicks them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import read_volume, write_volume
from diffusers_byoc.pipelines.generation import cell_generator
from diffusers_byoc.training.hardware import fastest_precision


SAVED = Path(__file__).parents[1] / "pipelines" / "saved"
CONDITIONAL, PLAIN = (str(SAVED / name) for name in ("conditional", "plain"))


@pytest.fixture(scope="module")
def client(page_url, tmp_path_factory):
    client = Client(page_url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))
    client.predict(CONDITIONAL, api_name="/offer")
    return client


def choices(pipeline=CONDITIONAL, label="nocodazole", number=2, seed=0, scheduler=None, steps=3):
    """What stands in the fields: no guidance, no condition, with texture."""
    return pipeline, label, number, seed, scheduler or "DDIMScheduler", steps, 1, True, *[None] * 4


def test_cells_come_as_pictures_files_and_a_program(client):
    gallery, files, program, status = client.predict(*choices(seed=4), api_name="/generate")
    assert status.startswith("2 cells of nocodazole, 3 steps, in ")
    assert [picture["caption"] for picture in gallery] == ["cell 1 seed 4", "cell 2 seed 4"]
    assert "cell_generator(4, index)" in program
    precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[fastest_precision()]
    pipeline = BYOCPipeline.from_pretrained(CONDITIONAL, dtype=precision)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    generators = [cell_generator(4, index) for index in range(2)]
    cell = pipeline(class_labels="nocodazole", num_inference_steps=3, generator=generators).volumes[1]
    volume = read_volume(files[1])
    assert Path(files[1]).name == "cell_2_seed_4.ome.tif"
    assert volume.voxel_size_um == (1.0, 0.5, 0.5) and volume.channel_names == ("cell", "nucleus")
    np.testing.assert_allclose(volume.data / 65535, cell, atol=1e-3)


def test_a_pipeline_without_classes_takes_none(client):
    client.predict(PLAIN, api_name="/offer")
    *_, status = client.predict(*choices(PLAIN, None, 1), api_name="/generate")
    assert status.startswith("1 cell, 3 steps")
    client.predict(CONDITIONAL, api_name="/offer")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"number": 7}, "6"),
        ({"number": 6, "steps": 6}, "Expected at most 30 cells x steps, got 6 x 6"),
        ({"seed": -3}, "Expected a seed from 0"),
        ({"pipeline": "/etc"}, "Expected one of the pipelines"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"label": "aspirin"}, "aspirin"),
    ],
)
def test_what_cannot_be_made_is_said(client, changed, message):
    with pytest.raises((AppError, ValueError), match=message):
        client.predict(*choices(**changed), api_name="/generate")


def test_an_uploaded_cell_is_shown(client, tmp_path):
    volume = np.zeros((2, 6, 6, 6), np.float32)
    volume[0, 1:5, 1:5, 1:5], volume[1, 2:4, 2:4, 2:4] = 0.5, 1.0
    write_volume(tmp_path / "mine.ome.tif", volume, (1.0, 0.5, 0.5))
    gallery, files, _, _ = client.predict(handle_file(tmp_path / "mine.ome.tif"), CONDITIONAL, api_name="/look")
    assert len(gallery) == 1 and read_volume(files[0]).data.shape == (2, 8, 8, 8)


def test_an_uploaded_file_that_is_none_gets_a_message(client, tmp_path):
    (tmp_path / "cell.ome.tif").write_bytes(b"II*\0 and nothing more")
    with pytest.raises(AppError, match=r"cell\.ome\.tif"):
        client.predict(handle_file(tmp_path / "cell.ome.tif"), CONDITIONAL, api_name="/look")
    with pytest.raises(AppError, match="Expected a file, got none"):
        client.predict(None, CONDITIONAL, api_name="/look")
