"""byoc-generate, on the pipelines that the tests hold."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from diffusers import DiffusionPipeline

from conditional import DOSES, make_pipeline
from diffusers_byoc import BYOCPipeline, TextureUNet3D
from diffusers_byoc.commands.generate import main
from diffusers_byoc.data import CellFolder, CellTable, decode_volume, prepare_channel, read_volume, write_volume
from diffusers_byoc.pipelines import memory
from diffusers_byoc.pipelines.generation import generate_cells
from diffusers_byoc.pipelines.schedulers import make_texture_scheduler
from diffusers_byoc.pipelines.series import CELLS_PER_SHARD, cell_generator, cell_seed
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


def test_given_channels_are_completed_in_turn(tmp_path):
    pipeline = make_pipeline(values=None, num_class_embeds=None, channel_timesteps_prob=0.25)
    pipeline.save_pretrained(tmp_path / "completes")
    (tmp_path / "nuclei").mkdir()
    for index, radius in enumerate((2, 3)):
        ball = (np.linalg.norm(np.indices((8, 8, 8)) - 3.5, axis=0) < radius).astype(np.float32)
        write_volume(tmp_path / "nuclei" / f"{index}.ome.tif", ball[None], None, ("DAPI",))
    arguments = ["--num_samples", 3, "--batch_size", 1, "--given_channels"]
    options = {"pretrained": tmp_path / "completes"}
    generate(tmp_path / "cells", *arguments, f"nucleus={tmp_path / 'nuclei'}", **options)
    rows = table_of(tmp_path / "cells")
    assert [Path(row["given_nucleus"]).name for row in rows] == ["0.ome.tif", "1.ome.tif", "0.ome.tif"]
    nucleus = prepare_channel(read_volume(rows[1]["given_nucleus"]), pipeline.volume_processor, "nucleus")
    given = {"given_channels": {"nucleus": nucleus}, "num_inference_steps": 3, "generator": cell_generator(0, 1)}
    (alone,) = pipeline(**given).volumes
    np.testing.assert_allclose(intensities(tmp_path / "cells" / "cell_000001.ome.tif"), alone, atol=2 * STEP)
    with pytest.raises(SystemExit, match="of the same given_channels, got others"):
        generate(tmp_path / "cells", *arguments, f"nucleus={rows[0]['given_nucleus']}", **options)
    for wrong, message in (
        (f"nucleus={tmp_path / 'none'}", "Expected files of the channel nucleus in .*none, got none"),
        ("nucleus", "Expected files of the channel nucleus in a path, got none"),
        (f"actin={tmp_path / 'nuclei'}", "Expected a channel among .*, got actin"),
    ):
        with pytest.raises(SystemExit, match=message):
            generate(tmp_path / "wrong", *arguments, wrong, **options)
    with pytest.raises(SystemExit, match="Expected a model that was trained with a timestep for each channel"):
        generate(tmp_path / "wrong", *arguments, f"nucleus={tmp_path / 'nuclei'}")
    assert not (tmp_path / "wrong").exists()


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


def table_of(folder):
    with open(folder / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_can_be_made_again_alone_and_exactly_from_its_row(tmp_path):
    labels = ["--class_labels", "nocodazole", "blebbistatin"]
    arguments = [*labels, "--batch_size", 1]
    generate(tmp_path / "all", "--num_samples", 4, "--seed", 7, *arguments, pretrained="conditional")
    rows, pipeline = table_of(tmp_path / "all"), load("conditional")
    assert [row["label"] for row in rows] == ["nocodazole", "blebbistatin"] * 2
    assert [(row["cell"], int(row["seed"])) for row in rows] == [(str(i), cell_seed(7, i)) for i in range(4)]
    for row in rows[1::2]:
        generator = torch.Generator().manual_seed(int(row["seed"]))
        (cell,) = pipeline(class_labels=row["label"], num_inference_steps=3, generator=generator).volumes
        assert np.array_equal(read_volume(tmp_path / "all" / row["file_name"]).data, np.rint(np.float64(cell) * 65535))
    # by the command
    generate(tmp_path / "one", "--only", 3, "--seed", 7, *labels, pretrained="conditional")
    assert table_of(tmp_path / "one") == [rows[3]]
    again = (tmp_path / "one" / rows[3]["file_name"], tmp_path / "all" / rows[3]["file_name"])
    assert again[0].read_bytes() == again[1].read_bytes()


def test_the_folder_is_a_data_set_with_its_labels_and_grows(tmp_path):
    labels = ["--class_labels", "nocodazole", "blebbistatin"]
    for num_samples in (2, 3, 1):
        generate(tmp_path, "--num_samples", num_samples, *labels, pretrained="conditional")
    assert [row["cell"] for row in table_of(tmp_path)] == ["0", "1", "2"]
    table = tmp_path / "metadata.csv"
    table.write_text(
        table.read_text().replace("seed\n", "seed,mine\n").replace("\n", ",good\n").replace("e,good", "e")
    )
    generate(tmp_path, "--num_samples", 4, *labels, pretrained="conditional")
    assert [row["mine"] for row in table_of(tmp_path)] == ["good"] * 3 + [""]
    cells = CellFolder(tmp_path, load("conditional").volume_processor)
    assert cells.class_names == ["blebbistatin", "nocodazole"] and cells.labels == [1, 0, 1, 0]


def test_conditions_stand_in_the_table(tmp_path):
    generate_cells(make_pipeline(DOSES), tmp_path, 1, class_labels=[0], conditions={"dose_um": 2.5})
    assert table_of(tmp_path)[0]["dose_um"] == "2.5" and table_of(tmp_path)[0]["label"] == "binimetinib"


def test_parquet_holds_the_same_cells_and_what_is_missing_of_it_is_made(tmp_path):
    arguments = {"class_labels": [2, 1], "num_inference_steps": 2, "suffix": ".parquet", "batch_size": 5}
    pipeline, num_cells = load("conditional"), CELLS_PER_SHARD + 3
    paths = generate_cells(pipeline, tmp_path, num_cells, **arguments)
    assert [path.name for path in paths] == ["train-00000.parquet", "train-00001.parquet"]
    cells = CellTable(str(tmp_path), pipeline.volume_processor)
    assert len(cells) == num_cells and [cells.class_names[label] for label in cells.labels[:2]] == [
        "nocodazole",
        "blebbistatin",
    ]
    first = [paths[0].stat().st_mtime_ns, pq.read_table(paths[1]).to_pylist()]
    generate_cells(pipeline, tmp_path, num_cells + 1, **arguments)  # the second file grows
    rows = pq.read_table(paths[1]).to_pylist()
    assert paths[0].stat().st_mtime_ns == first[0] and len(rows) == 4
    for row, before in zip(rows, first[1], strict=False):
        assert {k: row[k] for k in ("label", "cell", "seed")} == {k: before[k] for k in ("label", "cell", "seed")}
        np.testing.assert_allclose(decode_volume(row).data / 65535, decode_volume(before).data / 65535, atol=2 * STEP)
    generator = torch.Generator().manual_seed(int(rows[1]["seed"]))
    (alone,) = pipeline(class_labels=rows[1]["label"], num_inference_steps=2, generator=generator).volumes
    volume = decode_volume(rows[1])
    assert rows[1]["cell"] == CELLS_PER_SHARD + 1 and volume.voxel_size_um == (1.0, 0.5, 0.5)
    np.testing.assert_allclose(volume.data / 65535, alone, atol=2 * STEP)
    generate_cells(pipeline, tmp_path, num_cells, **arguments)  # fewer take nothing away
    assert pq.read_metadata(paths[1]).num_rows == 4
    paths[0].unlink()
    shared = {"share": (1, 2)}
    assert generate_cells(pipeline, tmp_path, num_cells + 1, **arguments, **shared) and not paths[0].exists()


def test_single_cells_of_a_parquet_file_cannot_be_asked_for(tmp_path, capsys):
    for arguments in (["--only", 3, "--format", "parquet"], ["--only", -1]):
        with pytest.raises(SystemExit, match="2"):
            generate(tmp_path / "cells", *arguments)
        assert "expected numbers from 0 on, and files of a cell each" in capsys.readouterr().err


class Narrow(Spheres):
    """Has memory for two cells."""

    asked = []

    def __call__(self, num_samples, generator):
        Narrow.asked.append(num_samples)
        if num_samples > 2:
            raise torch.OutOfMemoryError("too many")
        return super().__call__(num_samples, generator)


def test_a_batch_that_does_not_fit_is_halved(tmp_path, monkeypatch):
    monkeypatch.setattr(Narrow, "asked", [])
    paths = generate_cells(Narrow(), tmp_path, 7, batch_size=12, voxel_size_um=(1.0, 1.0, 1.0))
    assert Narrow.asked == [7, 3, 1, *[1] * 6] and all(path.is_file() for path in paths)
    whole = generate_cells(Spheres(), tmp_path / "whole", 7, voxel_size_um=(1.0, 1.0, 1.0))
    for one, other in zip(paths, whole, strict=True):
        assert np.array_equal(intensities(one), intensities(other))


def test_not_even_one_cell_that_fits_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Spheres, "__call__", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(ValueError, match="Expected memory for one cell on cpu, got less"):
        generate_cells(Spheres(), tmp_path / "cells", 2)
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize(("free_mb", "processes", "expected"), [(1e6, 1, 8), (500, 1, 4), (500, 2, 2), (1, 1, 1)])
def test_as_many_cells_as_memory_holds(tmp_path, monkeypatch, free_mb, processes, expected):
    """Of 100 MB each, with a fifth of what is free left alone."""
    monkeypatch.setattr(memory.MemoryMeter, "_peak", lambda meter: meter.before + 100_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free_mb * 1e6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    asked = []
    generate = Spheres.__call__
    monkeypatch.setattr(
        Spheres,
        "__call__",
        lambda self, num_samples, generator: asked.append(num_samples) or generate(self, num_samples, generator),
    )
    generate_cells(Spheres(), tmp_path, 17, batch_size=None)
    assert asked[0] == 1 and set(asked[1:-1]) == {expected} and sum(asked) == 17


def test_the_peak_of_the_process_is_measured():
    meter = memory.MemoryMeter(torch.device("cpu"))
    block = torch.ones(50_000_000)  # 200 MB
    assert meter._peak() - meter.before >= 150_000_000 or meter._peak() > meter.before + block.nbytes
    assert 1 <= meter.cells_that_fit(1) <= memory.MOST_CELLS["cpu"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_two_processes_killed_and_started_again_make_the_same_cells(tmp_path):
    alone = generate_cells(load("plain"), tmp_path / "alone", 30, num_inference_steps=50, batch_size=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    arguments = ["--pretrained", SAVED / "plain", "--num_samples", 30, "--num_inference_steps", 50, "--batch_size", 1]
    arguments += ["--output_dir", tmp_path / "two", "--device", "cpu"]
    command = [str(part) for part in [*launch, "diffusers_byoc.commands.generate", *arguments]]
    source = str(Path(__file__).parents[2] / "src")
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 400
    while len(list((tmp_path / "two").glob("cell_*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=60)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("cell_*")}
    assert 5 <= len(before) < 30
    done = subprocess.run(command, timeout=400, stdout=subprocess.PIPE, text=True, **options)
    assert done.returncode == 0 and "30 cells in" in done.stdout
    for path in alone:
        again = tmp_path / "two" / path.name
        assert np.array_equal(intensities(path), intensities(again))
        assert again.stat().st_mtime_ns == before.get(again.name, again.stat().st_mtime_ns)
    assert len(table_of(tmp_path / "two")) == 30 and not list((tmp_path / "two").glob(f"{TEMPORARY_PREFIX}*"))


def test_help_does_not_wait_for_torch():
    script = "import sys; from diffusers_byoc.commands.generate import parse_args\ntry: parse_args(['--help'])\n"
    script += "except SystemExit: print('torch' in sys.modules)"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    assert time.perf_counter() - started < 30  # of a machine that does much else; alone 0.1 s
    assert "--num_samples" in result.stdout and result.stdout.endswith("False\n")
