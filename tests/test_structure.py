"""Who may import whom (the project's design page "The public interface, and where things live")."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "src" / "diffusers_byoc"

GROUND = {"optional", "randomness", "volumes", "whole_files"}  # modules that every folder may import
ALLOWED = {
    "data": {"data"},
    "models": {"models"},
    "metrics": {"metrics"},
    "visualization": {"visualization"},
    "pipelines": {"pipelines", "models", "data"},
    "baselines": {"baselines", "models", "data", "pipelines"},
    "training": {"training", "models", "data", "metrics", "pipelines", "baselines", "visualization"},
}
ALLOWED["evaluation"] = {"evaluation", "__version__", *ALLOWED} - {"baselines"}
ALLOWED["publishing"] = {"publishing", "models", "pipelines", "baselines", "evaluation"}
ALLOWED["app"] = {"app", "data", "metrics", "pipelines", "visualization"}
ALLOWED["commands"] = {"commands", "__version__", *ALLOWED}


def imported_folders(source: str, module: tuple[str, ...]) -> set[str]:
    """Folders of diffusers_byoc that `source`, the text of the module at that path in the package, imports."""
    folders = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = ["diffusers_byoc", *module][: 1 + len(module) - node.level] if node.level else []
            parents += node.module.split(".") if node.module else []
            names = [[*parents, alias.name] for alias in node.names]
        folders |= {name[1] if len(name) > 1 else "" for name in names if name[0] == "diffusers_byoc"}
    return folders


@pytest.mark.parametrize(
    ("source", "folders"),
    [
        ("from ..models import Codebook", {"models"}),
        ("from .cells import Cell", {"data"}),
        ("from . import cells", {"data"}),
        ("from .. import metrics", {"metrics"}),
        ("import diffusers_byoc.training.losses", {"training"}),
        ("def late():\n    from diffusers_byoc.models.unet import DualChannelUNet3D", {"models"}),
        ("from diffusers_byoc import BYOCPipeline", {"BYOCPipeline"}),
        ("import diffusers_byoc", {""}),
        ("import diffusers, torch", set()),
    ],
)
def test_the_parser_finds_imports(source, folders):
    assert imported_folders(source, ("data", "files.py")) == folders


def modules():
    return sorted(
        path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 1
    )


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_follow_the_data(module):
    folder = module.parts[0]
    assert folder in ALLOWED, f"{folder}: a new folder needs a line in ALLOWED"
    assert imported_folders((PACKAGE / module).read_text(), module.parts) <= ALLOWED[folder] | GROUND


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_floor_stands_alone(module):
    assert imported_folders((PACKAGE / f"{module}.py").read_text(), (f"{module}.py",)) <= GROUND
