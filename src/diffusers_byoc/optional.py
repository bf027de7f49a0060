"""How the package imports what only its extras install."""

import importlib
from types import ModuleType


def optional(module: str, extra: str) -> ModuleType:
    """The module, or an error that says which extra brings it.

    Args:
        module: its full name, as in an import statement.
        extra: of this package, or several, separated by commas.

    Raises:
        ImportError: if it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Expected the package {module.partition('.')[0]}, got none that can be imported ({error}). Run"
            f' pip install "diffusers_byoc[{extra}]".'
        ) from error
