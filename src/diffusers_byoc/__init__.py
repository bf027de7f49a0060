"""Build Your Own Cell: multichannel 3D microscopy volumes of single cells, as a diffusers extension.

Importing the package imports neither torch nor diffusers; the first use of a name does.
"""

import importlib
from typing import TYPE_CHECKING

from .diffusers_face import show_to_diffusers


__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from .baselines import (
        HAGAN,
        WGAN,
        AlphaGAN,
        BaselinePipeline,
        MedicalDiffusionUNet3D,
        MedicalDiffusionVQModel,
    )
    from .data import VolumeProcessor
    from .models import DualChannelUNet3D, MultiCodebookVQModel, PatchDiscriminator3D, TextureUNet3D
    from .pipelines import USABLE_SCHEDULERS, BYOCPipeline, BYOCPipelineOutput

__all__ = [
    "HAGAN",
    "USABLE_SCHEDULERS",
    "WGAN",
    "AlphaGAN",
    "BYOCPipeline",
    "BYOCPipelineOutput",
    "BaselinePipeline",
    "DualChannelUNet3D",
    "MedicalDiffusionUNet3D",
    "MedicalDiffusionVQModel",
    "ModelMixin",  # not ours: diffusers looks for a component's base class in the package of the component
    "MultiCodebookVQModel",
    "PatchDiscriminator3D",
    "TextureUNet3D",
    "VolumeProcessor",
]

_MODULES = {
    "HAGAN": ".baselines",
    "USABLE_SCHEDULERS": ".pipelines",
    "WGAN": ".baselines",
    "AlphaGAN": ".baselines",
    "BYOCPipeline": ".pipelines",
    "BYOCPipelineOutput": ".pipelines",
    "BaselinePipeline": ".baselines",
    "DualChannelUNet3D": ".models",
    "MedicalDiffusionUNet3D": ".baselines",
    "MedicalDiffusionVQModel": ".baselines",
    "ModelMixin": "diffusers",
    "MultiCodebookVQModel": ".models",
    "PatchDiscriminator3D": ".models",
    "TextureUNet3D": ".models",
    "VolumeProcessor": ".data",
}
_FOLDERS = ("baselines", "data", "models", "pipelines")  # without an import of their own


def __getattr__(name: str):
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    elif name in _FOLDERS:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})


show_to_diffusers()
