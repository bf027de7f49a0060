"""What is uploaded: one version, a wheel without tests, an sdist with all that `make demo` needs."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import diffusers_byoc


REPOSITORY = Path(__file__).parents[1]


def test_the_version_stands_in_one_place_and_is_cited():
    assert "__version__" in (REPOSITORY / "setup.py").read_text()
    assert not re.search(r"version=\"\d", (REPOSITORY / "setup.py").read_text())
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert f"\nversion: {diffusers_byoc.__version__}\n" in citation
    assert f"{diffusers_byoc.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_space_runs_on_the_gradio_of_the_tests():
    version = re.search(r"^gradio==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M)[1]
    assert f"\nsdk_version: {version}\n" in (REPOSITORY / "space" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(wheel, sdist), built from what git knows, without the network."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())  # a link becomes what it leads to
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=250)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_is_the_package_alone_and_the_sdist_has_what_the_demo_needs(distributions):
    wheel, sdist = distributions
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert folders == {"diffusers_byoc", f"diffusers_byoc-{diffusers_byoc.__version__}.dist-info"}
    assert not [name for name in names if "test" in name.lower().split("/")[-1] or name.endswith(".safetensors")]
    assert {"diffusers_byoc/publishing/template.md", "diffusers_byoc/commands/presets/paper.json"} < set(names)
    assert wheel.stat().st_size < 2e6
    root = f"diffusers_byoc-{diffusers_byoc.__version__}"
    with tarfile.open(sdist) as archive:
        held = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    wanted = ("pretrained/byoc-phantom/unet/diffusion_pytorch_model.safetensors", "Makefile", "constraints.txt")
    wanted += ("space/app.py", "space/README.md", "space/requirements.txt", "mkdocs.yml", "examples/demo.py")
    wanted += ("tests/conftest.py", "model_cards/template.md", "CHANGELOG.md", "setup.py")
    assert set(wanted) <= held and not [name for name in held if "__pycache__" in name]
    assert sdist.stat().st_size < 60e6  # PyPI takes 100 MB


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(distributions, tmp_path):
    """Dependencies come from this environment; the package does not."""
    wheel, _ = distributions
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True, timeout=100)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    # entry points of this environment, and its editable copy of the package, stay out: only the path is lent
    lent = Path(pytest.__file__).parents[1]
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--prefix", tmp_path, wheel]
    subprocess.run([sys.executable, *map(str, install)], check=True, timeout=200, capture_output=True)
    (site / "lent.pth").write_text(str(lent))
    python = tmp_path / "bin" / "python"
    code = "import diffusers_byoc; print(diffusers_byoc.__file__, diffusers_byoc.__version__)"
    printed = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed.split() == [str(site / "diffusers_byoc" / "__init__.py"), diffusers_byoc.__version__]
    scripts = sorted(path.name for path in (tmp_path / "bin").glob("byoc-*"))
    names = ("evaluate", "generate", "prepare", "publish", "reproduce", "train", "train-baseline")
    assert set(scripts) >= {f"byoc-{name}" for name in names}
    for script in scripts:
        text = (tmp_path / "bin" / script).read_text().splitlines()
        (tmp_path / "bin" / script).write_text("\n".join([f"#!{python} -I", *text[1:]]))
        done = subprocess.run([tmp_path / "bin" / script, "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    # the demo's pipeline
    arguments = ["--pretrained", REPOSITORY / "pretrained" / "byoc-phantom", "--class_labels", "nocodazole"]
    arguments += ["--num_samples", "1", "--num_inference_steps", "2", "--num_texture_steps", "1"]
    command = [tmp_path / "bin" / "byoc-generate", *arguments, "--output_dir", tmp_path / "cells", "--device", "cpu"]
    subprocess.run([str(part) for part in command], check=True, timeout=250, capture_output=True)
    assert (tmp_path / "cells" / "cell_000000.ome.tif").stat().st_size > 10_000
