"""Damaged pipeline folders: each refused when it is loaded, by one message that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel


SAVED = Path(__file__).parent / "saved" / "conditional"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SAVED, tmp_path / "pipeline"))


def change(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_processor(folder: Path, **values):
    path = folder / "model_index.json"
    config = json.loads(path.read_text())
    config["volume_processor_config"] |= values
    path.write_text(json.dumps(config))


def refusal(folder: Path) -> str:
    messages = []
    for pipeline_class in (BYOCPipeline, DiffusionPipeline):
        with pytest.raises(ValueError) as error:
            pipeline_class.from_pretrained(folder)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("Expected ") and messages[0].endswith(".") and "\n" not in messages[0]
    return messages[0]


def test_an_undamaged_folder_loads(folder):
    BYOCPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", ["unet", "vqvae"])
def test_a_latent_of_another_length(folder, part, tmp_path):
    if part == "unet":
        other = DualChannelUNet3D(latent_channels=3, sample_size=4, block_out_channels=(4, 4), num_class_embeds=3)
    else:
        other = MultiCodebookVQModel(latent_channels=3, block_out_channels=(4, 4), sample_size=8)
    other.save_pretrained(folder / part)
    message = refusal(folder)
    assert str(folder / "unet" / "config.json") in message and str(folder / "vqvae" / "config.json") in message
    assert "latent_channels 3" in message if part == "vqvae" else "got 3" in message


def test_another_number_of_channels(folder):
    DualChannelUNet3D(3, 2, sample_size=4, block_out_channels=(4, 4), num_class_embeds=3).save_pretrained(
        folder / "unet"
    )
    assert "num_channels 2" in refusal(folder)


@pytest.mark.parametrize(("part", "size"), [("unet", 8), ("unet", 6), ("vqvae", 16)])
def test_a_grid_that_does_not_fit_the_sample_size(folder, part, size):
    change(folder / part / "config.json", sample_size=size)
    if part == "vqvae":
        change_processor(folder, sample_size=size)
    message = refusal(folder)
    assert f"sample_size {4 if part == 'unet' else 8}, " in message
    assert str(folder / "unet" / "config.json") in message


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"sample_size": -1}, "-1"),
        ({"sample_size": "large"}, "str"),
        ({"normalization": "median"}, "'median'"),
        ({"percentiles": [99, 1]}, "99"),
        ({"voxel_size_um": [1.0, 1.0]}, "1.0, 1.0"),
        ({"channel_names": ["cell"]}, "cell"),
        ({"sampel_size": 8}, "unknown sampel_size"),
        ({"sample_size": 16}, "sample_size 8"),
        ({"channel_names": ["nucleus", "cell"]}, "got ('nucleus', 'cell')"),
    ],
)
def test_a_volume_processor_that_cannot_be_or_does_not_fit(folder, values, reason):
    change_processor(folder, **values)
    message = refusal(folder)
    assert reason in message and str(folder / "model_index.json") in message


def test_an_unknown_prediction_type(folder):
    change(folder / "model_index.json", prediction_type="velocity")
    message = refusal(folder)
    assert "'velocity'" in message and str(folder / "model_index.json") in message


def test_more_names_than_classes(folder):
    change(folder / "model_index.json", label2id={"nocodazole": 0, "taxol": 3})
    assert "[0, 3)" in refusal(folder)


@pytest.mark.parametrize(("part", "name"), [("unet", "conv_in.weight"), ("vqvae", "codebooks.1.embedding")])
def test_a_missing_tensor(folder, part, name):
    path = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    message = refusal(folder)
    assert name in message and str(path) in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(folder, value):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.weight"][1, 0, 2, 0, 1] = value
    save_file(tensors, path, {"format": "pt"})
    message = refusal(folder)
    assert "conv_out.weight" in message and str(path) in message


def test_pickled_weights_are_refused_by_a_message_that_converts_them(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    pickled = path.with_suffix(".bin")
    torch.save(load_file(path), pickled)
    path.unlink()
    message = refusal(folder)
    assert str(folder / "unet") in message and "got diffusion_pytorch_model.bin" in message
    command = message[message.index("safetensors.torch.") :].rstrip(".")
    import safetensors.torch

    exec(command, {"safetensors": safetensors, "torch": torch})
    BYOCPipeline.from_pretrained(folder)


def test_components_may_be_left_out_or_handed_over(folder):
    whole = BYOCPipeline.from_pretrained(folder)
    assert BYOCPipeline.from_pretrained(folder, unet=None).unet is None
    assert BYOCPipeline.from_pretrained(folder, unet=whole.unet).unet is whole.unet
    other = DualChannelUNet3D(latent_channels=3, sample_size=4, block_out_channels=(4, 4))
    with pytest.raises(ValueError, match=r"latent_channels 2 .*got 3 \(unet\)"):
        BYOCPipeline.from_pretrained(folder, unet=other)
