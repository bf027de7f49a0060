import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput

from diffusers_byoc.data import read_volume
from diffusers_byoc.evaluation import autoencoder_of, channel_names_of, fingerprint, generate_cells, has_classes


class Blur(ModelMixin, ConfigMixin):
    """Noise -> blurred noise."""

    @register_to_config
    def __init__(
        self, width: int = 3, channel_names: tuple = ("membrane", "dna"), num_class_embeds: int | None = None
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 1, width, width, width) / width**3)

    def forward(self, noise):
        padded = self.weight.shape[-1] // 2
        return torch.nn.functional.conv3d(noise.flatten(0, 1)[:, None], self.weight, padding=padded).view_as(noise)


@dataclass
class Output(BaseOutput):
    volumes: torch.Tensor


class BlurredNoisePipeline(DiffusionPipeline):
    """Neither an autoencoder nor a U-Net, neither steps nor a scheduler."""

    def __init__(self, generator_network: Blur):
        super().__init__()
        self.register_modules(generator_network=generator_network)

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, class_labels=None):
        noise = torch.stack([torch.rand(2, 16, 16, 16, generator=g) for g in generator])
        if class_labels is not None:
            noise = (
                noise
                * torch.tensor([{"dim": 0.1, "bright": 1.0}[label] for label in class_labels])[
                    :, None, None, None, None
                ]
            )
        return Output(self.generator_network(noise))


NAMES = ("membrane", "dna")


def test_any_pipeline_that_returns_volumes_generates_cells(tmp_path):
    pipeline = BlurredNoisePipeline(Blur())
    assert channel_names_of(pipeline) == NAMES and not has_classes(pipeline) and autoencoder_of(pipeline) is None
    paths = generate_cells(pipeline, 5, tmp_path, seed=3, batch_size=2, channel_names=NAMES)
    volumes = [read_volume(path) for path in paths]
    assert len(volumes) == 5 and tuple(volumes[0].channel_names) == NAMES and volumes[0].data.shape == (2, 16, 16, 16)
    # the same cells in other batches, and after one was lost
    before = paths[3].read_bytes()
    paths[3].unlink()
    generate_cells(pipeline, 7, tmp_path, seed=3, batch_size=4, channel_names=NAMES)
    np.testing.assert_array_equal(read_volume(paths[3]).data, volumes[3].data)
    assert paths[3].read_bytes()[:8] == before[:8] and len(list(tmp_path.glob("*.tif"))) == 7


def test_classes_are_asked_for_in_turn(tmp_path):
    pipeline = BlurredNoisePipeline(Blur(num_class_embeds=2))
    assert has_classes(pipeline)
    paths = generate_cells(pipeline, 4, tmp_path, class_names=["dim", "bright"], channel_names=NAMES)
    brightness = [read_volume(path).data.mean() for path in paths]
    assert max(brightness[0], brightness[2]) < min(brightness[1], brightness[3]) / 5


def test_a_folder_of_other_cells_is_refused(tmp_path):
    pipeline = BlurredNoisePipeline(Blur())
    generate_cells(pipeline, 1, tmp_path, channel_names=NAMES)
    with pytest.raises(ValueError, match=r"these settings in .*got those of .*generation\.json"):
        generate_cells(pipeline, 1, tmp_path, seed=1, channel_names=NAMES)
    with torch.no_grad():
        pipeline.generator_network.weight.mul_(0.5)
    with pytest.raises(ValueError, match="these settings"):
        generate_cells(pipeline, 1, tmp_path, channel_names=NAMES)
    assert set(json.loads((tmp_path / "generation.json").read_text())) == {"seed", "num_inference_steps", "pipeline"}


def test_the_fingerprint_is_of_weights_and_configuration_not_of_the_folder(tmp_path):
    network = Blur()
    before = fingerprint(BlurredNoisePipeline(network))
    network.save_pretrained(tmp_path / "elsewhere")
    loaded = Blur.from_pretrained(tmp_path / "elsewhere")
    assert fingerprint(BlurredNoisePipeline(loaded)) == before
    assert fingerprint(BlurredNoisePipeline(Blur(channel_names=("a", "b")))) != before
    assert fingerprint(BlurredNoisePipeline(Blur(width=5))) != before


def test_what_is_no_volume_is_refused(tmp_path):
    pipeline = BlurredNoisePipeline(Blur())
    with pytest.raises(ValueError, match=r"channels cell from BlurredNoisePipeline, got shape \(1, 2, 16, 16, 16\)"):
        generate_cells(pipeline, 1, tmp_path / "a", channel_names=("cell",))
    with torch.no_grad():
        pipeline.generator_network.weight.mul_(9)
    with pytest.raises(ValueError, match=r"volumes of BlurredNoisePipeline in \[0, 1\]"):
        generate_cells(pipeline, 1, tmp_path / "b", channel_names=NAMES)
