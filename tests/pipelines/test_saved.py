"""Pipelines saved by version 0.1.0, before it knew more; `saved/` holds them and the cells that they gave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_byoc import BYOCPipeline


SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize(("name", "class_labels"), [("plain", None), ("conditional", ["nocodazole", "binimetinib"])])
def test_pipelines_of_earlier_versions_give_the_same_cells(name, class_labels):
    pipeline = BYOCPipeline.from_pretrained(SAVED / name)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    volumes = pipeline(2, class_labels=class_labels, generator=generators, output_type="pt").volumes
    torch.testing.assert_close(volumes, load_file(SAVED / name / "volumes.safetensors")["volumes"], atol=1e-4, rtol=0)


def test_what_they_know_of_themselves():
    conditional = BYOCPipeline.from_pretrained(SAVED / "conditional")
    assert conditional.config.prediction_type == "v_prediction"
    assert conditional.config.default_num_inference_steps == 5
    assert conditional.volume_processor.voxel_size_um == (1.0, 0.5, 0.5)
    assert dict(conditional.config.label2id) == {"binimetinib": 0, "blebbistatin": 1, "nocodazole": 2}
    plain = BYOCPipeline.from_pretrained(SAVED / "plain")
    assert plain.config.prediction_type == "epsilon"
    assert plain.volume_processor.config.sample_size == 8
