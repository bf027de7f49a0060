"""How diffusers' generic calls find this package's classes, whichever of the two is imported first.

`DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` look a class up as an attribute of `diffusers`, and
accept a component's library if `LOADABLE_CLASSES` names it. Saved pipelines then name their components
``["diffusers_byoc", CLASS]``, which loads from a Hub too and survives moving files. diffusers has no plugins, and
importing it takes seconds; so what it lacks is added at once where it is imported already, and otherwise when it is.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType


_CLASSES = (
    *("BYOCPipeline", "DualChannelUNet3D", "MultiCodebookVQModel", "TextureUNet3D"),
    *("BaselinePipeline", "HAGAN", "WGAN", "AlphaGAN", "MedicalDiffusionUNet3D", "MedicalDiffusionVQModel"),
)


def show_to_diffusers() -> None:
    """Give `diffusers` this package's classes, now or as soon as someone imports it."""
    for name, add in _ADDITIONS.items():
        if name in sys.modules:
            add(sys.modules[name])
    sys.meta_path.insert(0, _Additions())


def _add_classes(diffusers: ModuleType) -> None:
    def __getattr__(name: str):
        if name in _CLASSES:
            return getattr(importlib.import_module(__package__), name)
        raise AttributeError(f"module {diffusers.__name__!r} has no attribute {name!r}")

    diffusers.__getattr__ = __getattr__  # asked for what the module lacks (PEP 562); its own lazy names come after


def _add_library(pipeline_loading_utils: ModuleType) -> None:
    pipeline_loading_utils.LOADABLE_CLASSES[__package__] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}


_ADDITIONS = {"diffusers": _add_classes, "diffusers.pipelines.pipeline_loading_utils": _add_library}


class _Additions(MetaPathFinder):
    """Finds the modules of `_ADDITIONS` as the other finders do, and adds to them once they are executed."""

    def find_spec(self, name: str, path=None, target=None):
        if name not in _ADDITIONS:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Additions))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _ADDITIONS[name](sys.modules[name])  # diffusers puts another object in its own place

            spec.loader.exec_module = exec_module
        return spec
