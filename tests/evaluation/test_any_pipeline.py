from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.evaluation import autoencoder_of, channel_names_of, has_classes


SAVED = Path(__file__).parents[1] / "pipelines" / "saved" / "conditional"


class Noise(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channel_names: tuple = ("membrane", "dna"), num_class_embeds: int | None = None):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))


class NoisePipeline(DiffusionPipeline):
    """Neither an autoencoder nor a U-Net, neither steps nor a scheduler."""

    def __init__(self, network: Noise, label2id: dict | None = None):
        super().__init__()
        self.register_modules(network=network)


def test_channels_and_classes_are_found_in_whatever_part_states_them():
    assert channel_names_of(NoisePipeline(Noise())) == ("membrane", "dna")
    assert channel_names_of(NoisePipeline(Noise(channel_names=()))) is None
    assert not has_classes(NoisePipeline(Noise())) and has_classes(NoisePipeline(Noise(num_class_embeds=3)))
    assert autoencoder_of(NoisePipeline(Noise())) is None


def test_ours_has_an_autoencoder():
    pipeline = BYOCPipeline.from_pretrained(SAVED)
    assert autoencoder_of(pipeline) is pipeline.vqvae and has_classes(pipeline)
    assert channel_names_of(pipeline) == tuple(pipeline.vqvae.config.channel_names)
