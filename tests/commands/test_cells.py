"""The cells that arguments name, and the batches that a training makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_byoc.commands.cells import read_cells, split_for_training
from diffusers_byoc.commands.train_arguments import parse_args
from diffusers_byoc.data import CellTable, StreamedCells, Volume, write_shards
from diffusers_byoc.training import StageSettings
from diffusers_byoc.training.batches import remaining_batches, sample_cells


CHANNELS = ("cell", "nucleus")
SOURCE = Path(__file__).resolve().parents[2] / "src"
# prints, for 0 and 2 workers, the cells that every process sees, by their numbers of bright voxels
SEEN_BY_PROCESSES = """
import json, sys
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers_byoc.commands.cells import read_cells, split_for_training
from diffusers_byoc.commands.train_arguments import parse_args
from diffusers_byoc.training import StageSettings
from diffusers_byoc.training.batches import remaining_batches

state = PartialState(cpu=True)
args = parse_args("", sys.argv[1:])
train, _ = split_for_training(args, read_cells(args, ("cell", "nucleus"), streaming=True))
for num_workers in (0, 2):
    settings = StageSettings(
        max_train_steps=16,
        train_batch_size=3,
        dataloader_num_workers=num_workers,
        shuffle_buffer_size=args.shuffle_buffer_size,
    )
    batches = list(remaining_batches(train, settings, 0))
    seen = [int(count) for batch in batches for count in (batch["volumes"][:, 0] > 0).sum((1, 2, 3))]
    seen_by = gather_object([seen])
    if state.is_main_process:
        print(json.dumps({"train": [int(name.split()[1]) for name in train.ids], "seen_by": seen_by}))
state.destroy_process_group()
"""


def load(*arguments, **options):
    args = parse_args("", ["--sample_size", "16", *map(str, arguments)])
    return split_for_training(args, read_cells(args, CHANNELS, args.streaming), **options)


@pytest.fixture
def folder(tmp_path):
    """Twenty cells of two labels from ten images."""
    root = tmp_path / "files"
    root.mkdir()
    rows = ["file_name,label,source,plate"]
    for number in range(20):
        cell = np.zeros((2, 8, 9, 10), np.uint8)
        cell[:, 2:6, 2:7, 2:8] = np.random.default_rng(number).integers(1, 255, (2, 4, 5, 6))
        np.save(root / f"{number}.npy", cell)
        rows.append(f"{number}.npy,{'ab'[number % 2]},image {number // 2},plate {number // 10}")
    (root / "metadata.csv").write_text("\n".join(rows))
    return root


@pytest.fixture
def shards(folder, tmp_path):
    cells = ((Volume(np.load(folder / f"{number}.npy")), {"label": "ab"[number % 2]}) for number in range(20))
    write_shards(tmp_path / "shards", cells, "webdataset")
    return tmp_path / "shards"


def test_cells_are_split_by_source_image(folder):
    train, held_out = load("--train_data_dir", folder)
    assert (len(train), len(held_out)) == (16, 4)
    images = [{int(Path(name).stem) // 2 for name in cells.ids} for cells in (train, held_out)]
    assert not images[0] & images[1]
    assert train.paths[0].name == train.ids[0]
    index = train.population.ids.index(held_out.ids[0])
    assert torch.equal(held_out[0]["volumes"], train.processor.preprocess(np.load(folder / f"{index}.npy")))


def test_a_label_holds_out_the_same_cells(folder):
    _, held_out = load("--train_data_dir", folder)
    train, of_one_label = load("--train_data_dir", folder, "--label", "a")
    assert of_one_label.ids == [name for name in held_out.ids if int(Path(name).stem) % 2 == 0]
    assert not set(train.ids) & set(held_out.ids)


def test_folds_by_plate(folder):
    parts = [
        load("--train_data_dir", folder, "--num_folds", 2, "--fold", fold, "--group_column", "plate")[1].ids
        for fold in (0, 1)
    ]
    assert sorted(map(len, parts)) == [10, 10] and not set(parts[0]) & set(parts[1])
    assert len({int(Path(name).stem) // 10 for name in parts[0]}) == 1


def test_all_cells_can_be_trained_on(folder):
    train, held_out = load("--train_data_dir", folder, "--held_out", 0)
    assert len(train) == 20 and held_out is None


def test_the_split_is_kept_with_the_run(folder, tmp_path):
    run = tmp_path / "run"
    train, _ = load("--train_data_dir", folder, "--split_seed", 1, run_dir=run)
    assert sorted(json.loads((run / "split.json").read_text())["train"]) == sorted(train.ids)
    again, _ = load("--train_data_dir", folder, "--split_seed", 1, run_dir=run, resumes=True)
    elsewhere, _ = load("--train_data_dir", folder, "--split_file", run / "split.json", "--split_seed", 2)
    assert again.ids == elsewhere.ids == train.ids
    with pytest.raises(ValueError, match="Expected the held-out cells of .* Give --split_file"):
        load("--train_data_dir", folder, "--split_seed", 2, run_dir=run, resumes=True)
    (folder / "metadata.csv").write_text("file_name,label\n0.npy,a\n1.npy,b\n")
    with pytest.raises(ValueError, match=r"the 20 cells for which .*split\.json"):
        load("--train_data_dir", folder, "--split_file", run / "split.json")


def test_phantoms_are_their_own_groups():
    train, held_out = load("--num_phantoms", 10, "--sample_size", 32)
    assert (len(train), len(held_out)) == (8, 2) and train.class_names == ["nocodazole"]


def test_one_loader_for_every_source(folder, shards):
    table, _ = load("--train_data_dir", shards)
    stream, _ = load("--dataset_name", f"{shards}/*.tar", "--streaming")
    files, _ = load("--train_data_dir", folder, "--held_out", 0)
    assert type(table) is CellTable and type(stream) is StreamedCells and table.ids == stream.ids
    settings = StageSettings(max_train_steps=3, train_batch_size=3, gradient_accumulation_steps=2)
    for cells in (table, stream, files):
        batches = list(remaining_batches(cells, settings, first_step=1))
        assert len(batches) == 4 and all(batch["volumes"].shape == (3, 2, 16, 16, 16) for batch in batches)
        assert all(batch["class_labels"].shape == (3,) for batch in batches)
        some = cells.indexable(5, 0)
        assert len(some) == (5 if cells is stream else len(cells)) and some[4]["volumes"].shape == (2, 16, 16, 16)


def test_a_sample_is_of_different_cells(folder, shards):
    files, _ = load("--train_data_dir", folder, "--held_out", 0)
    sample = sample_cells(files, 5, seed=0)
    assert len(sample) == 5 == len({tuple(item["volumes"].flatten().tolist()) for item in sample})
    assert sample_cells(files, 20, seed=0) is files
    assert sample.indices != sample_cells(files, 5, seed=1).indices
    stream, _ = load("--dataset_name", f"{shards}/*.tar", "--streaming")
    assert len(sample_cells(stream, 5, seed=0)) == 5


@pytest.mark.timeout(300)
def test_two_processes_stream_every_cell_once_an_epoch(tmp_path):
    """Two epochs of 23 of 29 cells, in shards of 6: the process that had a cell less then has a cell more."""
    data = np.zeros((29, 2, 4, 4, 4), np.uint8)
    for row in range(29):
        data[row].reshape(2, -1)[:, : row + 1] = 255
    write_shards(tmp_path / "cells", ((Volume(cell), {}) for cell in data), cells_per_shard=6)
    script = tmp_path / "script.py"
    script.write_text(SEEN_BY_PROCESSES)
    options = ["--dataset_name", tmp_path / "cells", "--streaming", "--shuffle_buffer_size", 5, "--sample_size", 8]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", script]
        + [str(option) for option in options],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    orders = set()
    for line in done.stdout.splitlines():
        result = json.loads(line)
        expected = [row + 1 for row in result["train"]]
        first, second = result["seen_by"]
        assert len(expected) == 23 and len(first) == len(second) == 48
        epochs = [first[:11] + second[:12], first[11:23] + second[12:23]]
        assert all(sorted(epoch) == expected for epoch in epochs) and epochs[0] != epochs[1]
        orders.update(map(tuple, epochs))
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (["--streaming"], ValueError, "a table of cells for --streaming, got none"),
        (["--dataset_name", "x", "--train_data_dir", "y"], ValueError, "one source of cells"),
        (["--dataset_name", "no/thing/here"], OSError, "a data set here or on the Hub, got no/thing/here"),
        (["--train_data_dir", "FOLDER", "--label", "c"], ValueError, "Expected cells with the label c"),
        (["--train_data_dir", "FOLDER", "--label_column", "drug"], ValueError, "the columns file_name, drug"),
        (["--train_data_dir", "FOLDER", "--group_column", "dish"], ValueError, "the columns file_name, dish"),
        (["--train_data_dir", "FOLDER", "--fold", "1"], ValueError, "Expected `num_folds`"),
        (["--train_data_dir", "FOLDER", "--split_file", "gone.json"], OSError, "gone.json"),
    ],
)
def test_refusals(folder, arguments, error, match):
    with pytest.raises(error, match=match):
        load(*(str(folder) if argument == "FOLDER" else argument for argument in arguments))
