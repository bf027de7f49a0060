import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_byoc import WGAN, BaselinePipeline, BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.commands.evaluate import parse_args
from diffusers_byoc.commands.evaluate_run import generated_cells, load_pipeline
from diffusers_byoc.data import PhantomCells, VolumeProcessor, read_volume, write_ome_tiff
from diffusers_byoc.evaluation import EvaluationSettings, channel_names_of


REPOSITORY = Path(__file__).parents[2]
SMALL = ["--num_phantoms", "36", "--sample_size", "32", "--num_folds", "2", "--features", "morphology"]
SMALL += ["--no-volume_classifier", "--num_cpu_threads", "1"]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def evaluate(*arguments, launcher=(), check=True) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "diffusers_byoc.commands.evaluate", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """20 files as a generator would leave them."""
    folder = tmp_path_factory.mktemp("generated")
    cells = PhantomCells(20, VolumeProcessor(sample_size=32), ["nocodazole"], seed=7)
    for index in range(20):
        write_ome_tiff(folder / f"{index:02}.ome.tif", (cells[index]["volumes"] + 1) / 2)
    return folder


@pytest.mark.slow
def test_volumes_made_elsewhere_are_judged_and_the_bad_rows_are_worse(phantoms, tmp_path):
    evaluate("--generated_dir", phantoms, "--output_dir", tmp_path, *SMALL)
    results = json.loads((tmp_path / "metrics.json").read_text())
    rows = results["summary"]
    assert set(rows) == {"generated", "real", "shuffled channels", "blurred"} and len(results["folds"]) == 2
    frechet = {name: row["morphology/frechet"]["mean"] for name, row in rows.items()}
    assert frechet["blurred"] > 5 * max(frechet["generated"], frechet["real"])
    folds = [fold["generated"]["morphology/frechet"] for fold in results["folds"]]
    assert frechet["generated"] == pytest.approx(np.mean(folds))
    assert rows["generated"]["morphology/frechet"]["std"] == pytest.approx(np.std(folds, ddof=1))
    table = (tmp_path / "metrics.md").read_text()
    assert "| Fréchet distance, morphology | low |" in table
    for name in ("cells.png", "metrics.png", "distributions_morphology.png", "nearest.png"):
        assert (tmp_path / name).stat().st_size > 1000 and f"({name})" in table

    splits = [json.loads((tmp_path / f"split_{number}.json").read_text()) for number in range(2)]
    assert sorted(splits[0]["held_out"]) == sorted(splits[1]["train"]) and splits[0]["held_out"]

    # again, by two processes: nothing is computed twice, and nothing changes
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611")
    evaluate("--generated_dir", phantoms, "--output_dir", tmp_path, *SMALL, launcher=launcher)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == kept
    assert json.loads((tmp_path / "metrics.json").read_text())["folds"] == results["folds"]


@pytest.mark.slow
def test_a_pipeline_generates_each_cell_from_its_seed_and_number_alone(tmp_path):
    pipeline = BYOCPipeline(
        MultiCodebookVQModel(latent_channels=2, num_vq_embeddings=8, block_out_channels=(4, 8), sample_size=32),
        DualChannelUNet3D(latent_channels=2, sample_size=16, block_out_channels=(8, 8), layers_per_block=1),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    arguments = ["--pretrained", tmp_path / "pipeline", "--num_inference_steps", "2", *SMALL]
    evaluate(*arguments, "--output_dir", tmp_path / "a", "--num_samples", "14", "--batch_size", "4")
    results = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert results["num_cells"]["generated"] == 14
    assert set(results["reconstruction"]) == {"cell", "nucleus"}
    assert 0 < results["reconstruction"]["cell"]["codes_used"] <= 1
    assert "Reconstruction" in (tmp_path / "a" / "metrics.md").read_text()
    assert set(results["summary"]) == {"generated", "real", "encoded and decoded", "shuffled channels", "blurred"}

    # more cells, in other batches, by two processes: the first ones stay what they are
    generated = sorted((tmp_path / "a" / "generated").glob("*.tif"))
    before = [path.read_bytes() for path in generated]
    generated[3].unlink()
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29612")
    more = ["--output_dir", tmp_path / "a", "--num_samples", "16", "--batch_size", "3"]
    evaluate(*arguments, *more, launcher=launcher)
    after = sorted((tmp_path / "a" / "generated").glob("*.tif"))
    assert len(after) == 16
    for path, content in zip(after, before, strict=False):
        np.testing.assert_allclose(
            read_volume(path).data.astype(int), read_volume_bytes(content, tmp_path).astype(int), atol=40
        )

    # other weights, the same folder
    with torch.no_grad():
        pipeline.unet.conv_out.bias.add_(1)
    pipeline.save_pretrained(tmp_path / "pipeline")
    done = evaluate(*arguments, "--output_dir", tmp_path / "a", "--num_samples", "14", check=False)
    assert done.returncode != 0 and "cells of the same weights, got others" in done.stderr


def read_volume_bytes(content: bytes, folder: Path) -> np.ndarray:
    (folder / "before.tif").write_bytes(content)
    return read_volume(folder / "before.tif").data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --pretrained or --generated_dir"),
        (["--generated_dir", "nowhere"], "at least 10 volumes in nowhere, got 0"),
        (["--generated_dir", "nowhere", "--features", "med3d"], "Download resnet_50.pth"),
        (["--generated_dir", "nowhere", "--num_folds", "5", "--num_phantoms", "20"], "at least 10 real cells"),
        (["--generated_dir", "nowhere", "--num_samples", "9"], "--num_samples of at least 10, got 9"),
        (["--generated_dir", "nowhere", "--streaming"], "unrecognized arguments: --streaming"),
        (["--generated_dir", "nowhere", "--augmentation", "full"], "unrecognized arguments: --augmentation"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(arguments, message, tmp_path):
    done = evaluate(*SMALL, *arguments, "--output_dir", tmp_path, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_help_does_not_wait_for_torch():
    script = (
        "import sys\nfrom diffusers_byoc.commands.evaluate import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print({'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n") and "--generated_dir" in done.stdout, done.stderr


BLURRED_NOISE = """
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput


@dataclass
class Output(BaseOutput):
    volumes: torch.Tensor


class Blur(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channel_names=("membrane", "dna")):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, noise):
        return torch.nn.functional.avg_pool3d(noise, 3, stride=1, padding=1) * self.scale


class BlurredNoisePipeline(DiffusionPipeline):
    def __init__(self, network: Blur):
        super().__init__()
        self.register_modules(network=network)

    @torch.no_grad()
    def __call__(self, num_samples=1, generator=None):
        return Output(self.network(torch.stack([torch.rand(2, 32, 32, 32, generator=one) for one in generator])))
"""


def test_a_generator_that_nobody_knows_is_judged_by_the_name_of_its_class(tmp_path, monkeypatch):
    (tmp_path / "blurred_noise.py").write_text(BLURRED_NOISE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("blurred_noise")
    module.BlurredNoisePipeline(module.Blur()).save_pretrained(tmp_path / "pipeline")
    command = ["--pretrained", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path), "--num_samples", "10"]
    args = parse_args([*command, "--pipeline_class", "blurred_noise:BlurredNoisePipeline"])
    pipeline = load_pipeline(args, torch.device("cpu"))
    names = channel_names_of(pipeline)
    assert names == ("membrane", "dna")

    cells = PhantomCells(1, VolumeProcessor(sample_size=32, channel_names=names), ["nocodazole"], seed=7)
    generated = generated_cells(args, cells, pipeline, EvaluationSettings(channel_names=names))
    assert generated.num_cells == 10 and generated.labels is None
    volume = generated.volume(3)
    assert volume.shape == (2, 32, 32, 32) and 0.45 < volume[:, 2:-2, 2:-2, 2:-2].mean() < 0.55

    args.pipeline_class = "blurred_noise:Sharp"
    with pytest.raises(ValueError, match="MODULE:CLASS that can be imported, got blurred_noise:Sharp"):
        load_pipeline(args, torch.device("cpu"))


def test_a_range_of_latents_is_the_autoencoders(tmp_path):
    saved = REPOSITORY / "tests" / "pipelines" / "saved" / "plain"
    command = ["--pretrained", str(saved), "--latent_range"]
    pipeline = load_pipeline(parse_args([*command, "nucleus"]), torch.device("cpu"))
    assert pipeline.vqvae.config.latent_range == "nucleus"
    assert load_pipeline(parse_args(command[:2]), torch.device("cpu")).vqvae.config.latent_range == "per_channel"
    with pytest.raises(
        ValueError, match="Expected latent_range among per_channel, absolute, cell, nucleus, got 'all'"
    ):
        load_pipeline(parse_args([*command, "all"]), torch.device("cpu"))
    BaselinePipeline(WGAN(sample_size=32, latent_dim=8, base_channels=4)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="Expected a pipeline with codebooks for --latent_range, got BaselinePipeline"
    ):
        load_pipeline(parse_args(["--pretrained", str(tmp_path), "--latent_range", "cell"]), torch.device("cpu"))
