"""Tables of cells, whole and streamed: what one reader gives, the other gives."""

import io
import itertools
import json
import tarfile
import zlib
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_byoc.data import (
    CellTable,
    StreamBatches,
    StreamedCells,
    Volume,
    VolumeProcessor,
    encode_volume,
    write_shards,
)
from diffusers_byoc.data.sets import batches as batches_module


PROCESSOR = VolumeProcessor(sample_size=8)
READERS = [CellTable, StreamedCells]


def make_volume(number):
    """A cell whose first voxel above background tells its number, at most 155."""
    data = np.zeros((2, 4, 5, 6), np.uint8)
    data[:, 1:3, 1:4, 1:5] = 255
    data[:, 1, 1, 1] = 100 + number
    return Volume(data, (0.5, 0.5, 0.5), ("cell", "nucleus"))


def numbers(batches):
    """Numbers of the cells of `make_volume` in items or batches."""
    found = []
    for batch in batches:
        for volume in batch["volumes"].reshape(-1, 2, 8, 8, 8):
            first = volume[0].flatten()[volume[0].flatten() > -1][0].item()
            found.append(round((first + 1) / 2 * 255) - 100)
    return found


def columns(number):
    return {"label": "ab"[number % 2], "source": f"image {number // 4}", "well": number % 3}


@pytest.fixture(params=["parquet", "webdataset"])
def shards(request, tmp_path, monkeypatch):
    """23 cells in three files, of labels a and b, four of each source image."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cells = ((make_volume(number), columns(number)) for number in range(23))
    assert write_shards(tmp_path / "cells", cells, request.param, cells_per_shard=10) == 23
    return tmp_path / "cells"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["one", "splits", "formatted"])
def test_what_save_to_disk_wrote(tmp_path, reader, kind):
    rows = [encode_volume(make_volume(number)) | columns(number) for number in range(70)]
    table = datasets.Dataset.from_list(rows)
    if kind == "splits":
        table = datasets.DatasetDict({"train": table, "test": table.select([0])})
    elif kind == "formatted":
        table = table.with_format("numpy")
    table.save_to_disk(str(tmp_path / "saved"))
    cells = reader(str(tmp_path / "saved"), PROCESSOR)
    assert len(cells) == 70 and cells.class_names == ["a", "b"] and cells.voxel_size_um == (0.5, 0.5, 0.5)
    assert cells.population.groups[::4] == tuple(f"image {number}" for number in range(18))
    items = [cells[index] for index in range(70)] if cells.is_indexable else list(cells)
    assert numbers(items) == list(range(70))
    some = cells.subset(cells.ids[::7]).indexable(10, 0)
    assert sorted(numbers(some[index] for index in range(10))) == list(range(0, 70, 7))
    loader = cells.loader(7, 0, 10, seed=0, buffer_size=9)
    assert sorted(numbers(loader)) == list(range(70))


@pytest.mark.parametrize("reader", READERS)
def test_a_saved_data_set_that_is_damaged_or_has_no_split(tmp_path, reader):
    table = datasets.Dataset.from_list([encode_volume(make_volume(0))])
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="split .train. in .*other, got .'test'."):
        reader(str(tmp_path / "other"), PROCESSOR)
    table.save_to_disk(str(tmp_path / "saved"))
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(ValueError, match="saved, which cannot be read"):
        reader(str(tmp_path / "saved"), PROCESSOR)


@pytest.fixture
def write_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(rows, features=None):
        (tmp_path / "table").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "table" / "train.parquet")
        return str(tmp_path / "table")

    return write


@pytest.mark.parametrize("reader", READERS)
def test_a_table(shards, reader):
    cells = reader(str(shards), PROCESSOR)
    assert len(cells) == 23 and cells.class_names == ["a", "b"]
    assert cells.labels == [number % 2 for number in range(23)]
    assert cells.voxel_size_um == (0.5, 0.5, 0.5)
    assert cells.population.groups == tuple(f"image {number // 4}" for number in range(23))
    items = list(cells)
    assert numbers(items) == list(range(23))
    assert [int(item["class_labels"]) for item in items] == cells.labels
    torch.testing.assert_close(items[3]["volumes"], PROCESSOR.preprocess(make_volume(3).data), rtol=0, atol=0)


@pytest.mark.parametrize("reader", READERS)
def test_parts_of_a_table(shards, reader):
    ids = reader(str(shards), PROCESSOR).ids
    only_b = reader(str(shards), PROCESSOR, label="b")
    assert only_b.class_names == ["b"] and numbers(only_b) == list(range(1, 23, 2))
    assert len(only_b.population.ids) == 23  # a split does not depend on the label
    some = only_b.subset([ids[2], ids[3], ids[21], "another cell"])
    assert len(some) == 2 and some.labels == [0, 0] and some.ids == [ids[3], ids[21]]
    assert numbers(DataLoader(some, batch_size=1, num_workers=0)) == [3, 21]
    by_well = reader(str(shards), PROCESSOR, label_column="well", group_column="label")
    assert by_well.class_names == ["0", "1", "2"] and set(by_well.population.groups) == {"a", "b"}


def test_both_readers_name_the_same_cells(shards):
    assert CellTable(str(shards), PROCESSOR).population == StreamedCells(str(shards), PROCESSOR).population


def test_workers_share_a_pass(shards):
    cells = StreamedCells(str(shards), PROCESSOR)
    assert sorted(numbers(DataLoader(cells, batch_size=4, num_workers=3))) == list(range(23))


@pytest.mark.parametrize("num_processes", [1, 2, 5])
@pytest.mark.parametrize("buffer_size", [1, 4, 1000])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_cell_once_an_epoch(shards, monkeypatch, num_processes, buffer_size, num_workers):
    """Three epochs of three files, of which five processes must share some; workers take turns with batches of two."""
    cells = StreamedCells(str(shards), PROCESSOR)
    monkeypatch.setattr(cells, "_item", lambda row, content: {"row": torch.tensor(row)})
    streams = []
    for rank in range(num_processes):
        loader = StreamBatches(cells, 2, 0, 40, 0, buffer_size, rank, num_processes)
        workers = []
        for worker in range(num_workers):
            info = SimpleNamespace(id=worker, num_workers=num_workers)
            monkeypatch.setattr(batches_module, "get_worker_info", lambda info=info: info)
            workers.append([batch["row"].tolist() for batch in loader])
        turns = itertools.chain.from_iterable(itertools.zip_longest(*workers, fillvalue=()))
        streams.append(itertools.chain.from_iterable(turns))
    epochs = []
    for epoch in range(3):
        places = [(rank + epoch) % num_processes for rank in range(num_processes)]
        lengths = [23 * (place + 1) // num_processes - 23 * place // num_processes for place in places]
        epochs.append([row for stream, length in zip(streams, lengths, strict=True) for row in islice(stream, length)])
        assert sorted(epochs[-1]) == list(range(23))
    assert len(set(map(tuple, epochs))) > 1


def test_the_buffers_of_all_workers_together(shards, monkeypatch):
    """A worker's share of the buffer is filled at once, and stays full: a row is read for each that is given."""
    cells = StreamedCells(str(shards), PROCESSOR)
    read, given = [], []
    original = cells._read

    def counting(*arguments):
        for row in original(*arguments):
            read.append(row[0])
            yield row

    monkeypatch.setattr(cells, "_read", counting)
    monkeypatch.setattr(batches_module, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=3))
    for batch in StreamBatches(cells, 1, 0, 60, 0, buffer_size=12):
        given.append(batch)
        assert len(read) - len(given) <= 4
    assert len(given) == 20 and len(read) - len(given) >= 3


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_a_stream_goes_on_where_it_stopped(shards, num_workers):
    cells = (
        StreamedCells(str(shards), PROCESSOR).subset([f"row {row}" for row in range(2, 20)])
        if any(shards.glob("*.parquet"))
        else StreamedCells(str(shards), PROCESSOR)
    )

    def load(first):
        stream = StreamBatches(cells, 2, first, 30 - first, seed=3, buffer_size=4, process_index=1, num_processes=2)
        return numbers(DataLoader(stream, batch_size=None, num_workers=num_workers))

    unbroken = load(0)
    assert len(unbroken) == 60
    for first in (1, 4, 13):
        assert load(first) == unbroken[2 * first :]


def test_more_workers_than_cells(shards):
    cells = StreamedCells(str(shards), PROCESSOR)
    few = cells.subset(cells.ids[:2])
    streams = [numbers(StreamBatches(few, 1, 0, 6, 0, process_index=rank, num_processes=3)) for rank in range(3)]
    assert all(len(stream) == 6 and set(stream) == {0, 1} for stream in streams)


def test_labels_of_a_class_label(write_parquet):
    features = datasets.Features(
        {
            "image": datasets.Value("binary"),
            "shape": datasets.List(datasets.Value("int64")),
            "dtype": datasets.Value("string"),
            "drug": datasets.ClassLabel(names=["z", "y"]),
        }
    )
    rows = [encode_volume(make_volume(number)) for number in range(2)]
    table = write_parquet(
        [
            {"image": row["volume"], "shape": row["shape"], "dtype": row["dtype"], "drug": "zy"[i]}
            for i, row in enumerate(rows)
        ],
        features,
    )
    for reader in READERS:
        cells = reader(table, PROCESSOR, volume_column="image", label_column="drug")
        assert cells.class_names == ["y", "z"] and cells.labels == [1, 0] and cells.voxel_size_um is None
        with pytest.raises(ValueError, match="columns volume, shape and dtype in .*, got image, .*--image_column"):
            reader(table, PROCESSOR)
        with pytest.raises(ValueError, match="Expected bytes in the column drug"):
            reader(table, PROCESSOR, volume_column="drug")
        with pytest.raises(ValueError, match="Expected a column label in .*, got image, shape, dtype, drug"):
            reader(table, PROCESSOR, volume_column="image", label_column="label")


# hostile tables


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": [3, 4, 5, 6]}, r"Expected shape .* 2 channels \(cell, nucleus\) in .*row 1, got \[3, 4, 5, 6\]"),
        ({"shape": None}, "Expected shape .*row 1, got None"),
        ({"label": " "}, "text or a whole number in the column label of .*row 1, got ' '"),
        ({"label": None}, "Expected text .*row 1, got None"),
        ({"source": ""}, "column source of .*row 1"),
        ({"voxel_size_um": [1.0, 0.0, 1.0]}, "voxel_size_um"),
    ],
)
def test_what_columns_tell_is_found_at_once(write_parquet, reader, change, match):
    rows = [encode_volume(make_volume(number)) | {"label": "a", "source": "s"} for number in range(3)]
    table = write_parquet([rows[0], rows[1] | change, rows[2]])
    with pytest.raises(ValueError, match=match):
        reader(table, PROCESSOR)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"volume": b"no zlib"}, "damaged"),
        ({"volume": None}, "damaged|bytes"),
        ({"volume": zlib.compress(bytes(10**7))}, "another number"),
        ({"shape": [2, 4, 5, 60]}, "another number"),
        ({"shape": [2, 40000, 40000, 40000]}, "at most"),
        ({"dtype": "object"}, "dtype 'object'"),
        ({"dtype": None}, "dtype 'None'|dtype None"),
        ({"channel_names": ["nucleus", "cell"]}, "in the order cell, nucleus"),
    ],
)
def test_a_damaged_row_is_named(write_parquet, reader, change, match):
    rows = [encode_volume(make_volume(number)) for number in range(3)]
    cells = reader(write_parquet([rows[0], rows[1] | change, rows[2]]), PROCESSOR)
    with pytest.raises(ValueError, match=f"row 1: .*({match})"):
        list(cells)


@pytest.mark.parametrize("reader", READERS)
def test_where_there_is_no_table(tmp_path, reader):
    with pytest.raises(OSError, match="got nowhere, which is none|got .*nowhere, which is none"):
        reader(str(tmp_path / "nowhere"), PROCESSOR)
    with pytest.raises(OSError, match="Expected files of the name"):
        reader(str(tmp_path / "*.tar"), PROCESSOR)
    (tmp_path / "[1] cells").mkdir()
    with pytest.raises(ValueError, match=r"\[1\] cells: .* for patterns. Rename it"):
        reader(str(tmp_path / "[1] cells"), PROCESSOR)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken\.parquet|readable Parquet"):
        reader(str(tmp_path / "broken.parquet"), PROCESSOR)
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"readable, uncompressed tar, got .*broken\.tar"):
        reader(str(tmp_path / "broken.tar"), PROCESSOR)
    (tmp_path / "cells.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"ending in \.parquet, or in \.tar, in .*, got \.csv"):
        reader(str(tmp_path / "cells.csv"), PROCESSOR)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            (path.parent / "member").write_bytes(content)
            archive.add(path.parent / "member", name)
    return str(path)


def npy(data):
    stream = io.BytesIO()
    np.save(stream, data, allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"a.json": b"{}"}, "no cells"),
        ({"a.npy": npy(make_volume(0).data), "b.json": b"{}"}, r"a volume beside b\.json"),
        ({"a.npy": b"", "a.json": b"{}"}, r"Expected a file of 1 to .*a\.npy"),
        ({"a.npy": b"x", "a.npz": b"x"}, "got a.npz again"),
        ({"a.npy": b"x", "a.json": b"[1]"}, "a JSON object"),
        ({"a.npy": b"x", "a.json": b"[" * 100_000}, "a JSON object"),
        ({"a.npy": npy(np.array([print], object)), "a.json": b"{}"}, r"cells\.tar, a\.npy: .*"),
        ({"a.npy": npy(make_volume(0).data)[:-9]}, r"cells\.tar, a\.npy: .*truncated"),
        ({"a.npy": npy(make_volume(0).data), "a.json": b'{"voxel_size_um": "large"}'}, "voxel_size_um"),
        ({"a.npy": npy(make_volume(0).data[:1])}, r"cells\.tar, a\.npy: Expected 2 channels"),
    ],
)
def test_hostile_archives(tmp_path, reader, members, match):
    with pytest.raises(ValueError, match=match):
        list(reader(write_tar(tmp_path / "cells.tar", members), PROCESSOR))


def test_other_members_are_left_alone(tmp_path):
    members = {
        "a.npy": npy(make_volume(7).data),
        "a.json": b'{"label": "x"}',
        "a.pkl": b"cos\nsystem\n",
        "a.pth": b"?",
    }
    cells = CellTable(write_tar(tmp_path / "cells.tar", members), PROCESSOR)
    assert cells.class_names == ["x"] and numbers(cells) == [7]


def test_writing_is_checked(tmp_path):
    cells = [(make_volume(0), {"label": "a"})]
    with pytest.raises(ValueError, match="kind"):
        write_shards(tmp_path, cells, "zarr")
    with pytest.raises(ValueError, match="cells_per_shard"):
        write_shards(tmp_path, cells, cells_per_shard=0)
    assert write_shards(tmp_path, cells) == 1
    with pytest.raises(ValueError, match="which holds one"):
        write_shards(tmp_path, cells)


@pytest.mark.parametrize("reader", READERS)
def test_some_voxel_sizes_are_unknown(write_parquet, tmp_path, reader):
    cells = [(make_volume(0), {}), (Volume(make_volume(1).data), {})]
    write_shards(tmp_path / "cells", cells, cells_per_shard=1)
    read = reader(str(tmp_path / "cells"), PROCESSOR)
    assert read.voxel_size_um is None and read.class_names == ["cell"] and numbers(read) == [0, 1]


def test_a_failed_write_leaves_no_part(tmp_path):
    def cells():
        yield make_volume(0), {}
        raise RuntimeError("the microscope is off")

    with pytest.raises(RuntimeError):
        write_shards(tmp_path, cells(), "webdataset")
    assert not list(tmp_path.iterdir())


def test_a_data_set_on_the_hub(hub, tmp_path):
    write_shards(tmp_path, ((make_volume(number), columns(number)) for number in range(23)), cells_per_shard=10)
    hub.create({"name": "cells", "organization": "org", "type": "dataset"})
    files = {f"data/{path.name}": path.read_bytes() for path in tmp_path.glob("*.parquet")}
    hub.repos["datasets/org/cells"]["commits"]["0" * 40].update(files)
    printed = hub.run("""
import json
from diffusers_byoc.data import CellTable, StreamedCells, VolumeProcessor
for reader in (StreamedCells, CellTable):
    cells = reader("org/cells", VolumeProcessor(sample_size=8), label="b")
    total = sum(item["volumes"].double().sum().item() for item in cells)
    print(json.dumps([len(cells), cells.class_names, cells.population.fingerprint, total]))
    try:
        reader("org/nothing", VolumeProcessor())
    except OSError as error:
        print(json.dumps(str(error)))
""")
    streamed, error, whole, other_error = (json.loads(line) for line in printed.splitlines())
    assert streamed == whole and streamed[:2] == [11, ["b"]]
    assert "got org/nothing, which is none" in error and "got org/nothing, which is none" in other_error


@pytest.mark.parametrize("reader", READERS)
def test_cells_in_other_classes(shards, reader):
    cells = reader(str(shards), PROCESSOR)
    names = ["new", *reversed(cells.class_names)]
    indices = [names.index(name) for name in cells.class_names]
    same = cells.with_classes(names, indices)
    assert [names[label] for label in same.labels] == [cells.class_names[label] for label in cells.labels]
    assert same.ids == cells.ids and 0 not in same.labels
    (item,), (before,) = (
        part.indexable(1, seed=0)[:1] if reader is StreamedCells else [part[0]] for part in (same, cells)
    )
    assert names[int(item["class_labels"])] == cells.class_names[int(before["class_labels"])]
    part = cells.subset(cells.ids[:2]).with_classes(names, [0] * len(cells.class_names))
    assert part.labels == [0, 0] and len(part) == 2
