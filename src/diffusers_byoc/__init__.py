"""Build Your Own Cell: multichannel 3D microscopy volumes of single cells, as a diffusers extension."""

import diffusers
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .data import VolumeProcessor
from .models import DualChannelUNet3D, MultiCodebookVQModel, PatchDiscriminator3D
from .pipelines import USABLE_SCHEDULERS, BYOCPipeline, BYOCPipelineOutput


__version__ = "0.1.0"

# Saved pipelines then name their components ["diffusers_byoc", CLASS], which loads from a Hub too and survives moving
# files; `DiffusionPipeline.from_pretrained` finds the pipeline class as an attribute of diffusers.
LOADABLE_CLASSES["diffusers_byoc"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
diffusers.BYOCPipeline = BYOCPipeline

__all__ = [
    "USABLE_SCHEDULERS",
    "BYOCPipeline",
    "BYOCPipelineOutput",
    "DualChannelUNet3D",
    "ModelMixin",
    "MultiCodebookVQModel",
    "PatchDiscriminator3D",
    "VolumeProcessor",
]
