"""What the README and the site say can be typed: every Python block runs, every command line exists."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, get_peft_model_state_dict

from conditional import make_pipeline
from diffusers_byoc import WGAN, BaselinePipeline, BYOCPipeline
from diffusers_byoc.data import Volume, write_shards
from diffusers_byoc.training.lora import TARGET_MODULES


REPOSITORY = Path(__file__).parents[1]
SAVED = REPOSITORY / "tests" / "pipelines" / "saved"
PAGES = ["README.md", *sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("docs/**/*.md"))]
CARDS = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("pretrained/*/README.md"))
SLOW = "resnet_50.pth"  # in a block: writes and reads a whole ResNet-50
SLOW_PAGE = "docs/figures.md"  # draws surfaces, ten seconds of them
MED3D = """
import torch
from monai.networks.nets import resnet50

layers = {"shortcut_type": "B", "bias_downsample": False, "feed_forward": False}
network = resnet50(spatial_dims=3, n_input_channels=1, **layers)
weights = {f"module.{name}": weight for name, weight in network.state_dict().items()}
torch.save({"state_dict": weights}, "resnet_50.pth")
volumes = torch.rand(1, 2, 32, 32, 32)
"""


def blocks(page, language):
    """(line, text) of the fenced blocks of a language."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


# Python


def cells(number=4, edge=16):
    """(number, 2, edge, edge, edge): balls with a ball in each, of different sizes and grain."""
    axis = np.arange(edge) - edge / 2
    distance = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    random = np.random.default_rng(0)
    radii = random.uniform(0.2, 0.4, number) * edge
    volumes = [np.stack([np.clip(r - distance, 0, 1), np.clip(r / 2 - distance, 0, 1)]) for r in radii]
    return (np.stack(volumes) * random.uniform(0.5, 1, (number, 2, edge, edge, edge))).astype(np.float32)


def numbers(number=12):
    return np.random.default_rng(number).normal(size=number)


def figures():
    from diffusers_byoc import visualization

    return {
        **{name: getattr(visualization, name) for name in visualization.__all__},
        **{name: cells(2, 12) for name in ("real", "generated", "training", "a", "b", "c")},
        **{name: {"cell volume, µm³": 0.25} for name in ("p_values", "wasserstein")},
        "nearest": [1, 0],
        "distances": [0.5, 1.0],
        "v": numbers(12),
        "w": numbers(9),
        "levels": [0, 1, 2],
        "scores_of_blur": [0.0, 1.0, 2.0],
        "scores_of_noise": [0.0, 2.0, 3.0],
    }


def drugs():
    from diffusers_byoc import visualization

    names = ("frame_strip", "write_film", "write_png")
    return {"pipe": make_pipeline(values=None), **{name: getattr(visualization, name) for name in names}}


def channels():
    pipeline = make_pipeline(values=None, num_class_embeds=None, channel_timesteps_prob=0.25)
    (crop,) = cells(1, 8)
    return {"pipe": pipeline, "nucleus": crop[1], "crop": crop}


def adapters():
    pipeline = make_pipeline(values=None, conditioning_dropout_prob=0.0)
    shutil.rmtree("pretrained/byoc-phantom")
    pipeline.save_pretrained("pretrained/byoc-phantom")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=TARGET_MODULES))
    weights = get_peft_model_state_dict(pipeline.unet)
    for folder in ("outputs/my_drug", "outputs/drug_a", "outputs/drug_b"):
        BYOCPipeline.save_lora_weights(folder, weights, pipeline.unet.peft_config["default"].to_dict())
    return {"BYOCPipeline": BYOCPipeline}


def distilled():
    scheduler = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipeline = make_pipeline(values=None, conditioning_dropout_prob=0.0)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler)
    pipeline.register_to_config(num_distilled_steps=4, default_num_inference_steps=4)
    pipeline.save_pretrained("outputs/four_steps")
    return {"BYOCPipeline": BYOCPipeline}


# What a page's blocks take for granted, beside the folders that `folders` makes
GIVEN = {
    "docs/channels.md": channels,
    "docs/conditions.md": lambda: {"pipe": make_pipeline(num_class_embeds=None)},
    "docs/few_steps.md": distilled,
    "docs/guidance.md": drugs,
    "docs/interpolation.md": drugs,
    "docs/new_drug.md": adapters,
    "docs/evaluation.md": lambda: {"volumes": cells(4, 32), "real_volumes": cells(5, 32)},
    "docs/figures.md": figures,
    "docs/quality.md": lambda: {"pipe": make_pipeline(values=None, num_class_embeds=None)},
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working directory with everything that the blocks load, tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    folders = {"pretrained/byoc-phantom": "conditional", "outputs/cells": "conditional"}
    folders |= {"outputs/demo": "plain", "outputs/byoc": "plain"}  # trained on one phenotype
    for folder, name in folders.items():
        shutil.copytree(SAVED / name, folder)
    shutil.copytree(REPOSITORY / "space", "space")
    BaselinePipeline(WGAN(sample_size=8, latent_dim=4, base_channels=4)).save_pretrained("outputs/ha_gan")
    volumes = [Volume((volume * 1000).astype(np.uint16), (1.0, 1.0, 1.0), ("cell", "nucleus")) for volume in cells(2)]
    write_shards("cells", [(volume, {"label": "nocodazole", "source": "stack"}) for volume in volumes])
    return tmp_path


def pages_with_python():
    for page in PAGES:
        for is_slow in (False, True):
            texts = [text for _, text in blocks(page, "python") if (SLOW in text) == is_slow]
            if texts:
                marks = pytest.mark.slow if is_slow or page == SLOW_PAGE else ()
                yield pytest.param(page, is_slow, id=f"{page}, {SLOW}" if is_slow else page, marks=marks)


@pytest.mark.parametrize(("page", "is_slow"), list(pages_with_python()))
def test_every_python_block_runs(page, is_slow, folders, hub):
    found = [(line, text) for line, text in blocks(page, "python") if (SLOW in text) == is_slow]
    if any("push_to_hub" in text or "HfApi" in text for _, text in found):  # in a process that knows the local Hub
        begin = ["import os", f"os.chdir({str(folders)!r})", MED3D if is_slow else ""]
        hub.run("\n".join([*begin, *(text for _, text in found)]), timeout=280)
        return
    names = {"np": np, "torch": torch, **GIVEN.get(page, dict)()}
    for line, text in found:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n" * (line - 1) + text, str(REPOSITORY / page), "exec"), names)  # noqa: S102


# Command lines

OTHERS = {"git", "dask", "tensorboard", "cd", "python"}  # commands that are not ours, and are not looked at
LAUNCHERS = {"accelerate", "torchrun"}
PLACEHOLDERS = {"…", "..."}


def lines(page):
    for start, text in blocks(page, "sh"):
        variables = {}
        for offset, line in enumerate(re.sub(r"\\\n\s*", " ", text).splitlines()):
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[f"${name}"] = shlex.split(value)
            words = [part for word in words for part in variables.get(word, [word])]
            if words:
                yield pytest.param(words, id=f"{page}:{start + offset} {words[0]}")


def check_ours(module, words):
    """The arguments are those of the command `diffusers_byoc.commands.<module>`."""
    placeholders = PLACEHOLDERS & set(words)
    command = importlib.import_module(f"diffusers_byoc.commands.{module}")
    parse = command.parse_args
    arguments = ["--help"] if placeholders else words
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            parse(*([command.__doc__] if module.startswith("train") else []), arguments)
        except SystemExit as error:
            assert error.code == 0, said.getvalue()
    for word in words if placeholders else []:
        assert not word.startswith("--") or word in said.getvalue()


def check_script(words):
    """An existing file of the repository, and its arguments."""
    text = (REPOSITORY / words[0]).read_text(encoding="utf-8")
    command = re.search(r"from diffusers_byoc\.commands\.(\w+) import main", text)
    if command:
        fixed = re.findall(r'main\(\["(\w+)", \*', text)  # reproduce_table1.py is `byoc-reproduce table1`
        check_ours(command[1], [*fixed, *words[1:]])
    for word in [] if command else words[1:]:
        assert not word.startswith("--") or word in text, f"{words[0]} has no {word}"


@pytest.mark.parametrize("words", [line for page in PAGES + CARDS for line in lines(page)])
def test_every_command_line_exists(words, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    command, *rest = words
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    if command == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif command == "pip":
        for extras in re.findall(r"(?:^\.|diffusers_byoc)\[([\w,]+)\]", " ".join(rest)):
            for extra in extras.split(","):
                assert re.search(rf'^    "{extra}": \[|^extras\["{extra}"\]', setup, re.MULTILINE), extra
    elif command.startswith("byoc-"):
        (module,) = re.findall(rf'"{command} = diffusers_byoc\.commands\.(\w+):main"', setup)
        check_ours(module, rest)
    elif command in LAUNCHERS and "-m" in rest:
        module, *rest = rest[rest.index("-m") + 1 :]
        check_ours(module.removeprefix("diffusers_byoc.commands."), rest)
    elif command in LAUNCHERS or (command == "python" and rest[0].endswith(".py")):
        script = next(index for index, word in enumerate(rest) if word.endswith(".py"))
        for word in rest[:script]:
            assert not word.endswith(".yaml") or (REPOSITORY / word).is_file()
        check_script(rest[script:])
    else:
        assert command in OTHERS, f"{command}: a new command needs a check"


def test_a_line_that_does_not_exist_is_found():
    with pytest.raises(AssertionError, match="unrecognized arguments: --nonsense"):
        check_ours("generate", ["--pretrained", "x", "--output_dir", "y", "--nonsense"])
    with pytest.raises(AssertionError, match="has no --nonsense"):
        check_script(["benchmarks/phantoms.py", "--nonsense"])
    with pytest.raises(FileNotFoundError):
        check_script(["examples/nonsense.py"])


# The site


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "pipelines" / "index.html").read_text(encoding="utf-8")
    assert 'id="diffusers_byoc.pipelines.BYOCPipeline.__call__"' in api
    baselines = (tmp_path / "site" / "baselines" / "index.html").read_text(encoding="utf-8")
    assert "<code>src/diffusers_byoc/baselines/ha_gan.py</code>" in baselines and "](../" not in baselines
