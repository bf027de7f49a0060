"""byoc-generate, on the pipelines that the tests hold."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from diffusers import DiffusionPipeline

from conditional import DOSES, make_pipeline
from diffusers_byoc import BYOCPipeline, TextureUNet3D
from diffusers_byoc.commands.generate import main
from diffusers_byoc.data import read_volume
from diffusers_byoc.pipelines.generation import cell_generator, generate_cells
from diffusers_byoc.pipelines.schedulers import make_texture_scheduler
from diffusers_byoc.whole_files import TEMPORARY_PREFIX


SAVED = Path(__file__).parents[1] / "pipelines" / "saved"
STEP = 1 / 65535  # of the files' integers


def generate(output_dir, *arguments, pretrained="plain"):
    common = ["--pretrained", SAVED / pretrained, "--output_dir", output_dir, "--num_inference_steps", 3]
    main([str(argument) for argument in [*common, "--device", "cpu", *arguments]])


def intensities(path):
    if path.suffix != ".zarr":
        return read_volume(path).data / 65535
    image = zarr.open(str(path), mode="r")
    return image[image.attrs["multiscales"][0]["datasets"][0]["path"]][:] / 65535


def load(name):
    pipeline = BYOCPipeline.from_pretrained(SAVED / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("suffix", ["ome.tif", "ome.zarr", "npz"])
def test_each_file_is_the_pipelines_cell_of_its_own_seed(tmp_path, suffix):
    generate(tmp_path / "cells", "--num_samples", 3, "--batch_size", 2, "--seed", 5, "--format", suffix)
    paths = sorted((tmp_path / "cells").glob(f"*.{suffix}"))
    assert [path.name for path in paths] == [f"cell_{index:06}.{suffix}" for index in range(3)]
    pipeline = load("plain")
    for index, path in enumerate(paths):
        (alone,) = pipeline(num_inference_steps=3, generator=cell_generator(5, index)).volumes
        np.testing.assert_allclose(intensities(path), alone, atol=2 * STEP)
    assert not np.array_equal(intensities(paths[0]), intensities(paths[1]))


def test_classes_come_in_turn_by_name_or_number_with_voxel_size_and_channel_names(tmp_path):
    labels = ["--class_labels", "nocodazole", "1"]
    generate(tmp_path, "--num_samples", 3, *labels, pretrained="conditional")
    pipeline = load("conditional")
    for index, label in enumerate(["nocodazole", "blebbistatin", "nocodazole"]):
        volume = read_volume(tmp_path / f"cell_{index:06}.ome.tif")
        generator = cell_generator(0, index)
        (alone,) = pipeline(class_labels=label, num_inference_steps=3, generator=generator).volumes
        np.testing.assert_allclose(volume.data / 65535, alone, atol=2 * STEP)
        assert volume.voxel_size_um == (1.0, 0.5, 0.5)
        assert volume.channel_names == ("cell", "nucleus")


def test_what_is_missing_is_made_and_nothing_else(tmp_path):
    generate(tmp_path, "--num_samples", 3)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.ome.tif")}
    (tmp_path / "cell_000001.ome.tif").unlink()
    (tmp_path / f"{TEMPORARY_PREFIX}x").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}x" / "cell_000002.ome.tif").write_bytes(b"half of one")
    kept = (tmp_path / "cell_000000.ome.tif").stat().st_mtime_ns
    generate(tmp_path, "--num_samples", 4)
    assert (tmp_path / "cell_000000.ome.tif").stat().st_mtime_ns == kept
    again = intensities(tmp_path / "cell_000001.ome.tif")
    (tmp_path / "old.ome.tif").write_bytes(first["cell_000001.ome.tif"])
    np.testing.assert_allclose(again, intensities(tmp_path / "old.ome.tif"), atol=2 * STEP)
    assert len(list(tmp_path.glob("cell_*"))) == 4 and not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--seed", 1], "seed"), (["--num_inference_steps", 4], "num_inference_steps"), (["--format", "npz"], "suffix")],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, arguments, named):
    generate(tmp_path, "--num_samples", 1)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit, match=f"byoc-generate: error: Expected .* of the same {named}, got others"):
        generate(tmp_path, "--num_samples", 2, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_texture_steps_reach_the_pipeline_and_the_record(tmp_path):
    pipeline = load("plain")
    pipeline.register_modules(texture_unet=TextureUNet3D(2, (8,), (1,)), texture_scheduler=make_texture_scheduler())
    pipeline.save_pretrained(tmp_path / "textured")
    generate(tmp_path / "cells", "--num_samples", 1, "--num_texture_steps", 2, pretrained=tmp_path / "textured")
    arguments = {"num_inference_steps": 3, "generator": cell_generator(0, 0)}
    (drawn,) = pipeline(num_texture_steps=2, **arguments).volumes
    np.testing.assert_allclose(intensities(tmp_path / "cells" / "cell_000000.ome.tif"), drawn, atol=2 * STEP)
    record = json.loads((tmp_path / "cells" / "generation.json").read_text())
    assert record["num_texture_steps"] == 2 and record["texture_scheduler"]["flow_shift"] == 0.5
    with pytest.raises(SystemExit, match="of the same num_texture_steps, got others"):
        generate(tmp_path / "cells", "--num_texture_steps", 0, pretrained=tmp_path / "textured")
    with pytest.raises(SystemExit, match="Expected a pipeline with a texture_unet for --num_texture_steps 2"):
        generate(tmp_path / "none", "--num_texture_steps", 2)


def test_conditions_and_their_scale_reach_the_pipeline_and_the_record(tmp_path):
    pipeline = make_pipeline(DOSES)
    pipeline.save_pretrained(tmp_path / "doses")
    arguments = ["--class_labels", "nocodazole", "--conditions", "dose_um=2.5", "--num_samples", 1]
    generate(tmp_path / "cells", *arguments, "--guidance_scale", 2, pretrained=tmp_path / "doses")
    given = {"class_labels": "nocodazole", "conditions": {"dose_um": 2.5}, "guidance_scale": 2.0}
    (cell,) = pipeline(**given, num_inference_steps=3, generator=cell_generator(0, 0)).volumes
    np.testing.assert_allclose(intensities(tmp_path / "cells" / "cell_000000.ome.tif"), cell, atol=2 * STEP)
    record = json.loads((tmp_path / "cells" / "generation.json").read_text())
    assert record["conditions"] == {"dose_um": 2.5} and record["guidance_scale"] == 2.0
    for other in (["--conditions", "dose_um=3", "--guidance_scale", 2], ["--conditions", "dose_um=2.5"]):
        with pytest.raises(SystemExit, match="of the same (conditions|guidance_scale), got others"):
            generate(tmp_path / "cells", *arguments[:2], *other, pretrained=tmp_path / "doses")
    with pytest.raises(SystemExit, match="2"):
        generate(tmp_path / "cells", "--conditions", "dose_um", pretrained=tmp_path / "doses")
    with pytest.raises(SystemExit, match="Expected no conditions, got"):
        generate(tmp_path / "plain", "--conditions", "dose_um=2")


def test_a_folder_of_another_pipeline_is_refused(tmp_path):
    pipeline = load("plain")
    generate_cells(pipeline, tmp_path, 1, num_inference_steps=2)
    pipeline.unet.conv_out.bias.data += 1e-3
    with pytest.raises(ValueError, match="of the same weights, got others"):
        generate_cells(pipeline, tmp_path, 2, num_inference_steps=2)


def test_a_folder_of_another_range_of_latents_is_refused(tmp_path):
    pipeline = load("plain")
    generate_cells(pipeline, tmp_path, 1, num_inference_steps=2)
    pipeline.vqvae.register_to_config(latent_range="absolute")  # an ablation of the same weights
    with pytest.raises(ValueError, match="of the same latent_range, got others"):
        generate_cells(pipeline, tmp_path, 2, num_inference_steps=2)


class Spheres(DiffusionPipeline):
    """Another generator: no networks, no classes, one channel."""

    def __init__(self, smallest_radius: int = 3):
        super().__init__()
        self.register_to_config(smallest_radius=smallest_radius)

    def __call__(self, num_samples, generator):
        radii = [self.config.smallest_radius + 3 * torch.rand(1, generator=own).item() for own in generator]
        z, y, x = np.ogrid[-8:8, -8:8, -8:8]
        volumes = np.stack([(z**2 + y**2 + x**2 < radius**2)[None] for radius in radii])
        assert len(volumes) == num_samples
        return SimpleNamespace(volumes=volumes.astype(np.float32))


def test_any_pipeline_that_returns_volumes_can_make_a_series(tmp_path):
    whole = generate_cells(Spheres(), tmp_path / "a", 3, voxel_size_um=(1.0, 1.0, 1.0))
    single = generate_cells(Spheres(), tmp_path / "b", 3, voxel_size_um=(1.0, 1.0, 1.0), batch_size=1)
    for one, other in zip(whole, single, strict=True):
        assert np.array_equal(intensities(one), intensities(other))
    assert read_volume(whole[0]).voxel_size_um == (1.0, 1.0, 1.0)
    assert len({intensities(path).sum() for path in whole}) > 1


def test_arguments_that_the_pipeline_refuses_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="class_labels"):
        generate_cells(load("conditional"), tmp_path / "cells", 1)
    assert not (tmp_path / "cells").exists()


def test_processes_share_a_series(tmp_path):
    pipeline = load("plain")
    for rank in range(2):
        paths = generate_cells(pipeline, tmp_path / "shared", 3, num_inference_steps=2, share=(rank, 2))
        assert [path.is_file() for path in paths] == [True, rank == 1, True]
    alone = generate_cells(pipeline, tmp_path / "alone", 3, num_inference_steps=2)
    for one, other in zip(paths, alone, strict=True):
        np.testing.assert_allclose(intensities(one), intensities(other), atol=2 * STEP)


@pytest.mark.parametrize(
    ("pretrained", "arguments", "message"),
    [
        ("conditional", [], "Expected class_labels .*nocodazole"),
        ("conditional", ["--class_labels", "taxol"], "got 'taxol'"),
        ("conditional", ["--class_labels", "3"], "got 3"),
        ("plain", ["--class_labels", "nocodazole"], "Expected no class_labels"),
        ("nothing", [], "nothing"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, pretrained, arguments, message):
    with pytest.raises(SystemExit, match=f"byoc-generate: error: .*{message}") as stop:
        generate(tmp_path / "cells", *arguments, pretrained=pretrained)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "cells").exists()


def test_the_record_says_what_the_cells_were_made_with(tmp_path):
    generate(tmp_path, "--num_samples", 1, "--class_labels", "nocodazole", pretrained="conditional")
    record = json.loads((tmp_path / "generation.json").read_text())
    assert record["class_labels"] == [2] and record["seed"] == 0 and record["num_inference_steps"] == 3
    assert record["scheduler"]["name"] == "DDPMScheduler"


def test_help_does_not_wait_for_torch():
    script = "import sys; from diffusers_byoc.commands.generate import parse_args\ntry: parse_args(['--help'])\n"
    script += "except SystemExit: print('torch' in sys.modules)"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    assert time.perf_counter() - started < 30  # of a machine that does much else; alone 0.1 s
    assert "--num_samples" in result.stdout and result.stdout.endswith("False\n")
