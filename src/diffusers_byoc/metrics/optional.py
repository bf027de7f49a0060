"""How this folder imports what only its extras install."""

import importlib
from types import ModuleType


def optional(module: str, extra: str = "metrics") -> ModuleType:
    """The module, or an error that says which extra brings it.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module.split(".")[0]} is not installed; run: pip install "diffusers_byoc[{extra}]"'
        ) from error
