"""What `import diffusers_byoc` does, and what it leaves for later."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_byoc


SAVED = Path(__file__).parent / "pipelines" / "saved" / "plain"


def run(script: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], timeout=120, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = "('torch', 'diffusers', 'numpy', 'huggingface_hub')"
    script = f"import sys, diffusers_byoc; dir(diffusers_byoc); print([x for x in {heavy} if x in sys.modules])"
    assert run(script) == "[]\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import diffusers, diffusers_byoc",
        "import diffusers_byoc, diffusers",
        "import diffusers; diffusers.DiffusionPipeline; import diffusers_byoc",
        "import importlib.util, diffusers_byoc; importlib.util.find_spec('diffusers'); import diffusers",
        "from diffusers_byoc.models import MultiCodebookVQModel; import diffusers",
    ],
)
def test_generic_calls_find_the_classes_whichever_package_comes_first(imports, tmp_path):
    script = f"""
{imports}
pipeline = diffusers.DiffusionPipeline.from_pretrained({str(SAVED)!r})
unet = diffusers.AutoModel.from_pretrained({str(SAVED)!r}, subfolder="unet")
vqvae = diffusers.AutoModel.from_pretrained({str(SAVED / "vqvae")!r})
print(*(type(x).__name__ for x in (pipeline, pipeline.unet, unet, vqvae)))
pipeline.save_pretrained({str(tmp_path)!r})
from diffusers import BYOCPipeline
import diffusers_byoc
print(BYOCPipeline is diffusers_byoc.BYOCPipeline, hasattr(diffusers, "DDIMPipeline"), hasattr(diffusers, "Nothing"))
"""
    first, second = run(script).splitlines()
    assert first == "BYOCPipeline DualChannelUNet3D DualChannelUNet3D MultiCodebookVQModel"
    assert second == "True True False"
    assert '"diffusers_byoc"' in (tmp_path / "model_index.json").read_text()


def test_every_public_name_is_there_and_known_to_type_checkers():
    for name in diffusers_byoc.__all__:
        assert hasattr(diffusers_byoc, name)
        assert name in dir(diffusers_byoc)
    tree = ast.parse(Path(diffusers_byoc.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert sorted(alias.name for node in block.body for alias in node.names) == sorted(diffusers_byoc.__all__)
    assert sorted(diffusers_byoc._MODULES) == sorted(diffusers_byoc.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'diffusers_byoc' has no attribute 'Nothing'"):
        _ = diffusers_byoc.Nothing
