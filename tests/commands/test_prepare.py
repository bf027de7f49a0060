"""The real script: most runs in this process, those that are killed or pushed in processes of their own."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile

from diffusers_byoc import VolumeProcessor
from diffusers_byoc.commands import prepare as command
from diffusers_byoc.data import CellTable, decode_volume
from diffusers_byoc.data.microscope import preparation


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bioio.*")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "prepare_cells.py"
SHAPE = (16, 50, 90)
BOXES = {  # label -> z, y, x of a cell of 10 x 12 x 12 voxels
    1: (3, 4, 4),
    5: (3, 4, 16),  # touches the first
    40: (3, 30, 6),
    41: (3, 30, 30),  # has no nucleus
    300: (0, 30, 50),  # touches the first plane
    65535: (3, 20, 70),
}
KEPT = [1, 5, 40, 65535]


def make_stack(seed):
    rng = np.random.default_rng(seed)
    labels, data = np.zeros(SHAPE, np.uint16), np.full((3, *SHAPE), 100.0)
    for label_id, (z, y, x) in BOXES.items():
        labels[z : z + 10, y : y + 12, x : x + 12] = label_id
        data[1, z : z + 10, y : y + 12, x : x + 12] += 200
        if label_id != 41:
            data[2, z + 3 : z + 8, y + 3 : y + 9, x + 3 : x + 9] += 800
    labels[8, 44:46, 80:83] = 77  # too small
    return rng.poisson(data).astype(np.uint16), labels


def write_stack(path, data, sizes_um=(1.0, 1.0, 1.0), axes="CZYX", names=("junk", "membrane", "DNA")):
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"axes": axes} | ({"Channel": {"Name": list(names)}} if names else {})
    for axis, size in zip("ZYX", sizes_um or (), strict=False):
        metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "µm"}
    tifffile.imwrite(path, data, ome=True, photometric="minisblack", compression="zlib", metadata=metadata)


@pytest.fixture
def plate(tmp_path, monkeypatch):
    """Three stacks of two treatments on two plates, with names as they come."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["p1/Zelle ä1", "p1/Zelle ä10", "p2/Zelle ä1"]):
        data, labels = make_stack(seed)
        write_stack(tmp_path / f"my plates/{name}.ome.tif", data)
        path = tmp_path / f"masks/{name}_cp_masks.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, labels)
    rows = ["file_name,drug,plate,well", "p1\\Zelle ä1.ome.tif,DMSO,p1,007", "Zelle ä10.ome.tif,β-drug,p1,008"]
    rows.append("p2\\Zelle ä1.ome.tif,DMSO,p2,")
    (tmp_path / "treatments.csv").write_bytes("\r\n".join(["\ufeff" + rows[0], *rows[1:]]).encode())
    return tmp_path


ARGUMENTS = ["--images", "my plates/**/*.ome.tif", "--labels", "masks/**/*.tif", "--output_dir", "cells"]
ARGUMENTS += ["--metadata", "treatments.csv", "--label_column", "drug", "--channels", "cell=1", "nucleus=dna"]


@pytest.fixture
def main(monkeypatch):
    def prepare_stacks(jobs, settings, features, output_dir, *where):
        return (preparation.prepare_stack(job, settings, features, output_dir) for job in jobs)

    monkeypatch.setattr(preparation, "prepare_stacks", prepare_stacks)
    return command.main


@pytest.fixture
def prepare(main):
    return lambda *more: main([*ARGUMENTS, *more])


def cells_of(folder="cells"):
    return datasets.load_dataset(str(folder), split="train").sort(["source", "label_id"])


def report_of(folder="cells", name="report.csv"):
    with open(Path(folder) / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_voxel_of_every_cell(plate, prepare, capsys):
    assert prepare("--margin_um", "0") == 0
    cells = cells_of()
    assert cells.features["label"] == datasets.ClassLabel(names=["DMSO", "β-drug"])
    sources = ["p1/Zelle ä1.ome.tif", "p1/Zelle ä10.ome.tif", "p2/Zelle ä1.ome.tif"]
    assert list(zip(cells["source"], cells["label_id"], strict=True)) == [(s, i) for s in sources for i in KEPT]
    for cell in cells:
        seed = sources.index(cell["source"])
        (z, y, x), volume = BOXES[cell["label_id"]], decode_volume(cell)
        raw = make_stack(seed)[0][1:, z : z + 10, y : y + 12, x : x + 12]
        np.testing.assert_array_equal(volume.data, raw)
        assert (volume.data.dtype, volume.voxel_size_um) == (np.uint16, (1.0, 1.0, 1.0))
        assert volume.channel_names == ("cell", "nucleus")
        assert (cell["label"], cell["plate"], cell["well"]) == [(0, "p1", "007"), (1, "p1", "008"), (0, "p2", "")][
            seed
        ]

    counts = {"cells": "4", "touches the border": "1", "too small": "1", "no nucleus": "1", "not finite": "0"}
    for row, source in zip(report_of(), sources, strict=True):
        assert row.items() >= (counts | {"source": source, "error": ""}).items()
    dropped = [(row["label_id"], row["reason"]) for row in report_of(name="dropped.csv")]
    assert dropped == [("41", "no nucleus"), ("77", "too small"), ("300", "touches the border")] * 3
    printed = capsys.readouterr().out
    assert "12 cells kept, of 3 stacks" in printed and "9 cells dropped" in printed


def test_resampling_keeps_size_and_place(plate, prepare):
    for seed, path in enumerate(sorted(Path("my plates").rglob("*.tif"))):
        write_stack(path, make_stack(seed)[0], (2.0, 0.5, 0.5))
    assert prepare("--voxel_size_um", "1.0") == 0
    for cell in cells_of():
        volume = decode_volume(cell)
        assert volume.data.dtype == np.uint16 and volume.voxel_size_um == (1.0, 1.0, 1.0)
        # 10 x 12 x 12 voxels are 20 x 6 x 6 µm, and the margin at most 2 µm
        assert volume.data.shape[1:3] in {(24, 10), (22, 10)}
        inside = volume.data[0].astype(float) - volume.data[0].min()
        occupied = inside > inside.max() / 2
        assert [np.ptp(np.flatnonzero(occupied.any(axes))) + 1 for axes in ((1, 2), (0, 2), (0, 1))] == [20, 6, 6]


def test_the_table_trains(plate, prepare, monkeypatch):
    prepare()
    cells = CellTable("cells", VolumeProcessor(sample_size=32))
    assert (len(cells), cells.class_names, cells.voxel_size_um) == (12, ["DMSO", "β-drug"], (1.0, 1.0, 1.0))
    occupied = (cells[0]["volumes"] > -1).any(0).nonzero()
    assert (occupied.max(0).values - occupied.min(0).values + 1 <= 14).all()


def test_without_metadata(plate, prepare, main):
    less = ARGUMENTS[:6] + ["--channels", "cell=membrane", "nucleus=DNA"]
    assert main(less) == 0
    assert cells_of().features["label"].names == ["p1", "p2"]  # the folders
    flat = ["--images", "my plates/p1/*", "--output_dir", "flat", "--labels", "masks/p1/*"]
    assert main([*less, *flat]) == 0
    assert cells_of("flat").features["label"].names == ["cell"]


def break_stack(path, how):
    data, labels = make_stack(1)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-3000])
    elif how == "no TIFF":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "2D":
        write_stack(path, data[:, 5], axes="CYX")
    elif how == "time series":
        write_stack(path, data, axes="TZYX", names=None)
    elif how == "other shape":
        write_stack(path, data[:, :, 1:])
    elif how == "no voxel size":
        write_stack(path, data, None)
    elif how == "too few channels":
        write_stack(path, data[:1], names=["DNA"])
    elif how == "no labels":
        tifffile.imwrite("masks/p1/Zelle ä10_cp_masks.tif", labels > 0)
    elif how == "probabilities":
        tifffile.imwrite("masks/p1/Zelle ä10_cp_masks.tif", np.random.default_rng(0).random(SHAPE, np.float32))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "0 bytes"),
        ("truncated", "ä10.ome.tif, which is not .* damaged"),
        ("no TIFF", "ä10.ome.tif, which is not .* damaged"),
        ("2D", "a 2D image"),
        ("time series", "a time series"),
        ("other shape", "label image of this very stack"),
        ("no voxel size", "--source_voxel_size_um"),
        ("too few channels", "one channel '1' for cell .*, got none"),
        ("no labels", "ä10_cp_masks.tif: .*label image"),
        ("probabilities", "ä10_cp_masks.tif: .*probability map"),
    ],
)
def test_a_bad_stack_is_reported_and_does_not_stop_the_others(plate, prepare, capsys, how, message):
    path = Path("my plates/p1/Zelle ä10.ome.tif")
    good = path.read_bytes(), Path("masks/p1/Zelle ä10_cp_masks.tif").read_bytes()
    break_stack(path, how)
    assert prepare() == 1
    errors = [row["error"] for row in report_of()]
    assert errors[0] == errors[2] == "" and "ä10" in errors[1]
    assert "Traceback" not in errors[1] and errors[1] in capsys.readouterr().out
    assert re.search(message, errors[1])
    assert len(cells_of()) == 8 and not list(Path("cells").rglob(".tmp-*"))

    # mended, it is all that is left to do
    path.write_bytes(good[0])
    Path("masks/p1/Zelle ä10_cp_masks.tif").write_bytes(good[1])
    others = {path: path.stat().st_mtime_ns for path in Path("cells/data").iterdir()}
    assert prepare() == 0
    assert len(cells_of()) == 12 and not any(row["error"] for row in report_of())
    assert others.items() <= {path: path.stat().st_mtime_ns for path in Path("cells/data").iterdir()}.items()


def test_strict_stops_at_the_first(plate, prepare):
    break_stack(Path("my plates/p1/Zelle ä1.ome.tif"), "empty")
    with pytest.raises(SystemExit, match="0 bytes.*--strict"):
        prepare("--strict")
    assert not Path("cells/README.md").exists() and not list(Path("cells/data").iterdir())


def test_not_a_number_costs_the_cells_that_have_it(plate, prepare):
    data, _ = make_stack(0)
    data = data.astype(np.float32) - 150  # negative numbers are as good as others
    data[1, 5, 6, 6] = np.nan
    write_stack(Path("my plates/p1/Zelle ä1.ome.tif"), data)
    assert prepare("--margin_um", "0") == 0
    assert report_of()[0]["not finite"] == "1" and report_of()[0]["cells"] == "3"
    volume = decode_volume(cells_of()[0])
    assert volume.data.dtype == np.float32
    z, y, x = BOXES[5]
    np.testing.assert_array_equal(volume.data, data[1:, z : z + 10, y : y + 12, x : x + 12])


def test_the_source_voxel_size_is_for_files_that_have_none(plate, prepare):
    write_stack(Path("my plates/p2/Zelle ä1.ome.tif"), make_stack(2)[0], None)
    assert prepare("--source_voxel_size_um", "1", "1", "1") == 0
    with pytest.raises(SystemExit, match="source_voxel_size_um"):  # another argument in the same folder
        prepare("--source_voxel_size_um", "2", "1", "1")
    assert prepare("--source_voxel_size_um", "2", "1", "1", "--output_dir", "other") == 1
    assert ["Correct the file" in row["error"] for row in report_of("other")] == [True, True, False]


def test_labels_of_nuclei_decide(plate, prepare):
    for path in Path("masks").rglob("*.tif"):
        labels = tifffile.imread(path)
        nuclei = np.where(np.isin(labels, [41, 65535]), 9, 0).astype(np.uint8)
        target = Path("nuclei", *path.parts[1:])
        target.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(target.with_name(path.name.replace("cp_masks", "nuclei")), nuclei)
    assert prepare("--nucleus_labels", "nuclei/**/*.tif") == 0
    assert sorted(set(cells_of()["label_id"])) == [41, 65535]


def test_ome_zarr(plate, prepare, main):
    data, labels = make_stack(0)
    write_zarr("images/A1.ome.zarr", data, "czyx")
    write_zarr("labels/A1_labels.ome.zarr", labels[None], "czyx")
    arguments = ["--images", "images/*.ome.zarr", "--labels", "labels/*.zarr", "--output_dir", "zarr"]
    assert main([*arguments, "--channels", "cell=1", "nucleus=2"]) == 0
    prepare()
    from_tiff = cells_of().select(range(4))
    for cell, expected in zip(cells_of("zarr"), from_tiff, strict=True):
        assert cell["volume"] == expected["volume"] and cell["voxel_size_um"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--margin_um", "1"], "margin_um = 2.0, got 1.0"),
        (["--channels", "cell=2", "nucleus=1"], "channels"),
        (["--images", "my plates/p1/*", "--labels", "masks/p1/*", "--metadata", "p1.csv"], "all stacks of cells"),
    ],
)
def test_other_arguments_need_another_folder(plate, prepare, more, message):
    assert prepare() == 0
    Path("p1.csv").write_text(
        "file_name,drug,plate,well\nZelle ä1.ome.tif,DMSO,,\nZelle ä10.ome.tif,β-drug,,\n", "utf-8"
    )
    before = sorted(Path("cells").rglob("*"))
    with pytest.raises(SystemExit, match=message):
        prepare(*more)
    assert sorted(Path("cells").rglob("*")) == before


def test_a_folder_of_something_else_is_left_alone(plate, prepare):
    Path("cells").mkdir()
    Path("cells/thesis.txt").write_text("2019-2026")
    with pytest.raises(SystemExit, match="holds other files"):
        prepare()
    assert Path("cells/thesis.txt").read_text() == "2019-2026"


@pytest.mark.parametrize(
    ("name", "message"),
    [("masks/p1/Zelle ä1_cp_masks.tif", "cannot be written to"), ("[1] cells", "for patterns; give another")],
)
def test_where_no_data_set_can_be(plate, prepare, name, message):
    with pytest.raises(SystemExit, match=message):
        prepare("--output_dir", name)
    assert not Path("[1] cells").exists()


def test_a_full_disk_ends_the_run(plate, prepare, monkeypatch):
    def cut_cells(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "cut_cells", cut_cells)
        with pytest.raises(SystemExit, match="cells: the disk is full; make room"):
            prepare()
    assert not list(Path("cells").rglob(".tmp-*"))
    assert prepare() == 0 and len(cells_of()) == 12


def test_a_lost_shard_is_cut_again_and_a_foreign_one_refused(plate, prepare):
    assert prepare() == 0
    lost, short, _ = shards = sorted(Path("cells/data").iterdir())
    before = [path.read_bytes() for path in shards]
    lost.unlink()
    short.write_bytes(before[1][:-100])
    assert prepare() == 0
    assert [path.read_bytes() for path in shards] == before
    Path("cells/data/other.parquet").write_bytes(before[0])
    with pytest.raises(SystemExit, match=r"got other\.parquet"):
        prepare()
    Path("cells/data/other.parquet").unlink()
    Path("cells/prepare_cells.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"Expected what byoc-prepare writes in .*prepare_cells\.json, got a list"):
        prepare()


def test_a_changed_file_is_cut_again(plate, prepare):
    assert prepare() == 0
    path = Path("masks/p2/Zelle ä1_cp_masks.tif")
    labels = tifffile.imread(path)
    labels[labels == 1] = 0
    tifffile.imwrite(path, labels)
    assert prepare() == 0
    assert list(cells_of()["label_id"]) == KEPT + KEPT + KEPT[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("masks/p2/Zelle ä1_cp_masks.tif").unlink(), "ä1.ome.tif: has no labels"),
        (lambda: Path("my plates/p2/Zelle ä1.ome.tif").unlink(), "belongs to no image|masks"),
        (lambda: Path("treatments.csv").write_text("file_name,drug\nx.tif,y\n"), "'x.tif' names no image"),
        (lambda: Path("treatments.csv").write_text("file_name,treatment\nx,y\n"), "columns file_name, drug"),
        (lambda: Path("treatments.csv").unlink(), "treatments.csv"),
    ],
)
def test_what_does_not_fit_together_is_said_before_any_work(plate, prepare, change, message):
    change()
    with pytest.raises(SystemExit, match=message):
        prepare()
    assert not Path("cells").exists()


def test_a_column_that_is_taken(plate, prepare):
    text = Path("treatments.csv").read_text("utf-8-sig").replace("well", "label_id")
    Path("treatments.csv").write_text(text, "utf-8")
    with pytest.raises(SystemExit, match="label_id.*Rename"):
        prepare()


@pytest.mark.parametrize(
    "more",
    [
        ["--channels", "cell"],
        ["--channels", "cell=0", "cell=1"],
        ["--voxel_size_um", "0"],
        ["--voxel_size_um", "1", "2"],
        ["--margin_um", "nan"],
        ["--num_proc", "0"],
    ],
)
def test_wrong_arguments(capsys, more):
    with pytest.raises(SystemExit):
        command.parse_args([*ARGUMENTS, *more])
    assert more[0] in capsys.readouterr().err


def test_no_cell_left(plate, prepare):
    with pytest.raises(SystemExit, match="none that was kept"):
        prepare("--min_volume_um3", "1e9")
    assert {row["reason"] for row in report_of(name="dropped.csv")} == {"touches the border", "too small"}


# what people have


def new_group(path):
    zarr = pytest.importorskip("zarr")
    return zarr.open_group(str(path), mode="w", **({"zarr_format": 2} if zarr.__version__ >= "3" else {}))


def write_zarr(path, data, axes, name="", **attributes):
    group = new_group(path)
    create = getattr(group, "create_array", None) or group.create_dataset  # zarr 3, zarr 2
    create("0", data=data, chunks=(1,) * (data.ndim - 2) + data.shape[-2:])
    described = [
        {"name": axis, "type": "space", "unit": "micrometer"} if axis in "zyx" else {"name": axis} for axis in axes
    ]
    scale = [{"type": "scale", "scale": [1.0] * len(axes)}]
    datasets_ = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [{"version": "0.4", "name": name, "axes": described, "datasets": datasets_}]
    group.attrs.update(attributes)


def write_field(path, seed, has_labels=True):
    data, labels = make_stack(seed)
    write_zarr(path, data, "czyx")
    if has_labels:
        group = new_group(path / "labels")
        group.attrs["labels"] = ["cells"]
        write_zarr(path / "labels" / "cells", labels, "zyx")


def write_plate(path, wells, has_labels=True):
    """`wells`: name -> numbers of its fields, of which None are listed and not there; None for a whole well."""
    plate = new_group(path)
    plate.attrs["plate"] = {"version": "0.4", "wells": [{"path": well} for well in wells]}
    for well, seeds in wells.items():
        if seeds is None:
            continue
        group = new_group(path / well)
        group.attrs["well"] = {"version": "0.4", "images": [{"path": str(field)} for field in range(len(seeds))]}
        for field, seed in enumerate(seeds):
            if seed is not None:
                write_field(path / well / str(field), seed, has_labels)


def assert_cells(cells, seeds):
    """The cells are, voxel for voxel, those of the stacks of these seeds, by source."""
    assert list(zip(cells["source"], cells["label_id"], strict=True)) == [(s, i) for s in sorted(seeds) for i in KEPT]
    for cell in cells:
        z, y, x = BOXES[cell["label_id"]]
        raw = make_stack(seeds[cell["source"]])[0][1:, z : z + 10, y : y + 12, x : x + 12]
        np.testing.assert_array_equal(decode_volume(cell).data, raw)


def fails(main, arguments):
    """No stack can be used; the reports say why."""
    with pytest.raises(SystemExit, match="none that was kept"):
        main(arguments)


EXACT = ["--channels", "cell=1", "nucleus=2", "--margin_um", "0", "--mask_out", "none"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "labels", [[], ["--labels", "A*.ome.zarr/labels/cells"], ["--labels", "A1.ome.zarr", "A2.ome.zarr"]]
)
def test_labels_within_an_ome_zarr(here, main, labels):
    for seed in (1, 2):
        write_field(here / f"A{seed}.ome.zarr", seed)
    assert main(["--images", "A1.ome.zarr", "A2.ome.zarr", *labels, "--output_dir", "cells", *EXACT]) == 0
    assert_cells(cells_of(), {"A1.ome.zarr": 1, "A2.ome.zarr": 2})


def test_no_labels_within_an_ome_zarr(here, main):
    write_field(here / "A1.ome.zarr", 1, has_labels=False)
    with pytest.raises(SystemExit, match="A1.ome.zarr: has no labels"):
        main(["--images", "A1.ome.zarr", "--output_dir", "cells", *EXACT])


FIELDS = {"A/1": [1, 2], "B/12": [3]}


@pytest.mark.parametrize("kind", ["inside", "said", "another plate", "files"])
def test_a_plate_is_one_input(here, main, kind):
    write_plate(here / "p.ome.zarr", FIELDS, has_labels=kind in ("inside", "said"))
    arguments = ["--images", "p.ome.zarr", "--output_dir", "cells", *EXACT]
    if kind == "said":
        arguments += ["--labels", "p.ome.zarr/*/*/*/labels/cells"]
    if kind == "another plate":
        write_plate(here / "p_labels.ome.zarr", FIELDS, has_labels=False)
        for well, seeds in FIELDS.items():
            for field, seed in enumerate(seeds):
                write_zarr(here / "p_labels.ome.zarr" / well / str(field), make_stack(seed)[1], "zyx")
        arguments += ["--labels", "p_labels.ome.zarr"]
    if kind == "files":
        for well, seeds in FIELDS.items():
            for field, seed in enumerate(seeds):
                tifffile.imwrite(f"p_{well.replace('/', '_')}_{field}_masks.tif", make_stack(seed)[1])
        arguments += ["--labels", "*_masks.tif"]
    Path("treatments.csv").write_text("file_name,label\nA/1,DMSO\nB/12/0,drug\n")  # a well, a field
    assert main([*arguments, "--metadata", "treatments.csv"]) == 0
    seeds = {"p.ome.zarr/A/1/0": 1, "p.ome.zarr/A/1/1": 2, "p.ome.zarr/B/12/0": 3}
    assert_cells(cells_of(), seeds)
    assert cells_of()["label"] == [0] * 8 + [1] * 4


def test_fields_that_are_not_there_cost_themselves(here, main):
    write_plate(here / "p.ome.zarr", {"A/1": [1, None, 3], "A/2": None, "B/1": [4, 5]})
    shutil.rmtree("p.ome.zarr/B/1/1")
    Path("p.ome.zarr/B/1/1").mkdir()
    assert main(["--images", "p.ome.zarr", "--output_dir", "cells", *EXACT]) == 1
    assert_cells(cells_of(), {"p.ome.zarr/A/1/0": 1, "p.ome.zarr/A/1/2": 3, "p.ome.zarr/B/1/0": 4})
    errors = {row["source"]: row["error"] for row in report_of() if row["error"]}
    assert set(errors) == {"p.ome.zarr/A/1/1", "p.ome.zarr/A/2", "p.ome.zarr/B/1/1"}
    assert all("which its plate lists, got none" in error for error in errors.values())


@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_the_time_points_of_a_series(here, main, kind):
    data, labels = (np.stack(arrays) for arrays in zip(*(make_stack(seed) for seed in range(3)), strict=True))
    if kind == "tiff":
        metadata = {"axes": "TCZYX"} | {f"PhysicalSize{axis}": 1.0 for axis in "ZYX"}
        tifffile.imwrite("A1.ome.tif", data, ome=True, photometric="minisblack", metadata=metadata)
        tifffile.imwrite("A1_masks.tif", labels, metadata={"axes": "TZYX"})
        files = ["--images", "A1.ome.tif", "--labels", "A1_masks.tif"]
    else:
        write_zarr(here / "A1.ome.zarr", data, "tczyx")
        new_group("A1.ome.zarr/labels").attrs["labels"] = ["cells"]
        write_zarr(here / "A1.ome.zarr/labels/cells", labels, "tzyx")
        files = ["--images", "A1.ome.zarr"]
    source = "A1.ome.tif" if kind == "tiff" else "A1.ome.zarr"
    fails(main, [*files, "--output_dir", "none", *EXACT])
    assert "a time series" in report_of("none")[0]["error"] and "--time N" in report_of("none")[0]["error"]
    assert main([*files, "--output_dir", "one", "--time", "2", *EXACT]) == 0
    assert_cells(cells_of("one"), {source: 2})
    assert main([*files, "--output_dir", "all", "--time", "all", *EXACT]) == 0
    cells = cells_of("all")
    assert_cells(cells, {f"{source}, time {seed}": seed for seed in range(3)})
    assert cells["time"] == [0] * 4 + [1] * 4 + [2] * 4 and set(cells["series"]) == {source}
    fails(main, [*files, "--output_dir", "late", "--time", "3", *EXACT])
    assert "Expected the time point 3" in report_of("late")[0]["error"]


def test_labels_of_one_time_point_alone(here, main):
    data = np.stack([make_stack(seed)[0] for seed in range(2)])
    metadata = {"axes": "TCZYX"} | {f"PhysicalSize{axis}": 1.0 for axis in "ZYX"}
    tifffile.imwrite("A1.ome.tif", data, ome=True, photometric="minisblack", metadata=metadata)
    tifffile.imwrite("A1_masks.tif", make_stack(1)[1])
    files = ["--images", "A1.ome.tif", "--labels", "A1_masks.tif", *EXACT]
    assert main([*files, "--output_dir", "cells", "--time", "1"]) == 0
    assert_cells(cells_of(), {"A1.ome.tif": 1})
    fails(main, [*files, "--output_dir", "all", "--time", "all"])
    assert all("labels of each of its 2 time points" in row["error"] for row in report_of("all"))


@pytest.mark.parametrize("value", [1, 255, True, 1.0])
def test_a_mask_is_no_label_image(here, main, value):
    data, labels = make_stack(0)
    write_stack(here / "A1.ome.tif", data)
    mask = np.isin(labels, KEPT)
    dtype = {bool: bool, float: np.float32}.get(type(value), np.uint8)
    tifffile.imwrite("A1_masks.tif", (mask * value).astype(dtype), photometric="minisblack")
    files = ["--images", "A1.ome.tif", "--labels", "A1_masks.tif", *EXACT]
    fails(main, [*files, "--output_dir", "cells"])
    assert "--allow_binary_labels" in report_of()[0]["error"] and "abel" in report_of()[0]["error"]
    assert main([*files, "--output_dir", f"one of {value}", "--allow_binary_labels"]) == 0
    (cell,) = cells_of(f"one of {value}")
    assert cell["label_id"] == int(value)
    inside = np.argwhere(mask)
    box = tuple(slice(low, high + 1) for low, high in zip(inside.min(0), inside.max(0), strict=True))
    np.testing.assert_array_equal(decode_volume(cell).data, data[1:][(slice(None), *box)])


def test_the_masks_of_cellpose(here, main):
    for seed in (1, 2):
        data, labels = make_stack(seed)
        write_stack(here / f"A{seed}.ome.tif", data)
        np.save(f"A{seed}_seg.npy", {"masks": labels, "outlines": labels * 0, "filename": "A1.tif"})
    assert main(["--images", "A*.ome.tif", "--labels", "*_seg.npy", "--output_dir", "cells", *EXACT]) == 0
    assert_cells(cells_of(), {"A1.ome.tif": 1, "A2.ome.tif": 2})


# processes of their own

# a stack whose name has "crash" in it ends its process, as a reader does that is written in C
HOSTILE = """
import os, sys
from diffusers_byoc.commands.prepare import main
from diffusers_byoc.data.microscope import preparation
original = preparation.open_stack
def open_stack(path, *arguments):
    if "crash" in path:
        os.abort()
    return original(path, *arguments)
preparation.open_stack = open_stack
if __name__ == "__main__":
    sys.exit(main())
"""


def environment():
    source = str(SCRIPT.parents[1] / "src")
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def many_stacks(folder, names):
    for seed, name in enumerate(names):
        data, labels = make_stack(seed)
        write_stack(folder / f"images/{name}.ome.tif", data)
        (folder / "masks").mkdir(exist_ok=True)
        tifffile.imwrite(folder / f"masks/{name}_masks.tif", labels)


MANY = ["--images", "images/*", "--labels", "masks/*", "--channels", "cell=1", "nucleus=2", "--num_proc", "2"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_any_moment_it_goes_on(tmp_path):
    many_stacks(tmp_path, [f"A{number}" for number in range(12)])
    command = [sys.executable, str(SCRIPT), *MANY]
    options = {"cwd": tmp_path, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    subprocess.run([*command, "--output_dir", "whole"], check=True, timeout=250, **options)
    records = tmp_path / "broken" / "stacks"
    for num_done in (1, 5):
        process = subprocess.Popen([*command, "--output_dir", "broken"], start_new_session=True, **options)
        deadline = time.monotonic() + 120
        while len(list(records.glob("*.json"))) < num_done and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)  # the parent alone: its workers must end by themselves
        process.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 5 <= len(done) < 12
    subprocess.run([*command, "--output_dir", "broken"], check=True, timeout=250, **options)
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}.items()
    whole, broken = cells_of(tmp_path / "whole"), cells_of(tmp_path / "broken")
    assert len(whole) == 12 * len(KEPT) and whole.to_dict() == broken.to_dict()
    for path in (tmp_path / "whole" / "data").iterdir():
        assert path.read_bytes() == (tmp_path / "broken" / "data" / path.name).read_bytes()
    assert not list((tmp_path / "broken").rglob(".tmp-*"))


@pytest.mark.slow
def test_a_crash_of_a_reader_costs_one_stack(tmp_path):
    many_stacks(tmp_path, ["A1", "A2", "A3 crash", "A4", "A5", "A6 crash", "A7"])
    (tmp_path / "hostile.py").write_text(HOSTILE)
    command = [sys.executable, "hostile.py", *MANY, "--output_dir", "cells"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), timeout=280, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    errors = {row["source"]: row["error"] for row in report_of(tmp_path / "cells")}
    assert {source for source, error in errors.items() if "a crash of its reader" in error} == {
        "A3 crash.ome.tif",
        "A6 crash.ome.tif",
    }
    assert len(cells_of(tmp_path / "cells")) == 5 * len(KEPT)


@pytest.mark.slow
def test_to_the_hub_and_back(hub):
    many_stacks(hub.home, ["A1", "A2"])
    command = [*MANY, "--output_dir", "cells", "--push_to_hub", "org/cells"]
    for _ in range(2):  # again, and nothing is doubled
        hub.run(
            f"import runpy, sys; sys.argv = {['x', *command]}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
        )
    files = hub.files("org/cells", "dataset")
    assert {path.split("/")[0] for path in files} - {".gitattributes"} == {"README.md", "data"}
    printed = hub.run("""
from datasets import load_dataset
import json
cells = load_dataset("org/cells", split="train")
print(json.dumps([len(cells), cells.features["label"].names, sorted(set(cells["source"]))]))
from diffusers_byoc import VolumeProcessor
from diffusers_byoc.data import CellTable
print(len(CellTable("org/cells", VolumeProcessor(sample_size=32))))
""")
    first, second = printed.strip().splitlines()
    assert json.loads(first) == [8, ["cell"], ["A1.ome.tif", "A2.ome.tif"]] and second == "8"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_cluster_does_each_stack_once_and_what_a_killed_worker_left(tmp_path):
    distributed = pytest.importorskip("distributed")
    many_stacks(tmp_path, [f"A{number:02}" for number in range(40)])
    options = {"cwd": tmp_path, "env": environment() | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.DEVNULL}
    command = [sys.executable, str(SCRIPT), *MANY]
    subprocess.run([*command, "--output_dir", "here"], check=True, timeout=250, **options)
    with distributed.LocalCluster(n_workers=0, processes=True, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1"]
        workers = [subprocess.Popen([*worker, "--no-dashboard"], **options) for _ in range(2)]
        try:
            with distributed.Client(address) as client:
                client.wait_for_workers(2, timeout=100)
            arguments = [*command, "--output_dir", "cluster", "--dask_scheduler", address]
            run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, **options)
            records, deadline = tmp_path / "cluster" / "stacks", time.monotonic() + 120
            while len(list(records.glob("*.json"))) < 5 and time.monotonic() < deadline:
                time.sleep(0.01)
            workers[0].kill()
            done = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
            assert 5 <= len(done) < 40
            assert run.wait(timeout=200) == 0
        finally:
            for process in workers:
                process.kill()
    # what was done then was not done again
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}.items()
    for path in (tmp_path / "here" / "data").iterdir():
        assert path.read_bytes() == (tmp_path / "cluster" / "data" / path.name).read_bytes()
    assert len(list(records.glob("*.json"))) == 40 and len(cells_of(tmp_path / "cluster")) == 40 * len(KEPT)
