import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_byoc.data import PHENOTYPES, CellFolder, PhantomCells, VolumeProcessor, write_ome_tiff, write_volume


REAL_CELLS = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "mitotic_cells"
PROCESSOR = VolumeProcessor(sample_size=16)
PHANTOM_PROCESSOR = VolumeProcessor(sample_size=32, voxel_size_um=2.0)


def make_cell(seed):
    cell = np.zeros((2, 8, 9, 10), np.uint8)
    cell[:, 2:6, 2:7, 2:8] = np.random.default_rng(seed).integers(1, 255, (2, 4, 5, 6))
    return cell


def write_metadata(root, rows, columns=("file_name", "label"), encoding="utf-8"):
    with open(root / "metadata.csv", "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def folder(tmp_path):
    """Four cells of two labels in three formats; the names have spaces and letters beyond ASCII."""
    root = tmp_path / "Zellen ä 細胞"
    (root / "images").mkdir(parents=True)
    np.save(root / "images" / "b 1.npy", make_cell(0))
    write_ome_tiff(root / "images" / "ä.ome.tif", make_cell(1) / 255)
    np.savez(root / "c.npz", make_cell(2))
    np.save(root / "d.npy", make_cell(3))
    np.save(root / "not listed.npy", make_cell(4))
    rows = [("images/b 1.npy", "round"), ("images/ä.ome.tif", "flat"), ("./c.npz", "round"), ("d.npy", "flat")]
    write_metadata(root, rows)
    return root


def test_folder_with_metadata(folder):
    cells = CellFolder(folder, PROCESSOR)
    assert cells.class_names == ["flat", "round"]
    assert cells.labels == [1, 0, 1, 0]
    assert [path.name for path in cells.paths] == ["b 1.npy", "ä.ome.tif", "c.npz", "d.npy"]
    for index, seed in enumerate(range(4)):
        item = cells[index]
        torch.testing.assert_close(item["volumes"], PROCESSOR.preprocess(make_cell(seed)), atol=1e-4, rtol=0)
        assert item["class_labels"].dtype == torch.int64 and item["class_labels"] == cells.labels[index]
    assert cells.voxel_size_um is None  # .npy does not say


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches(folder, num_workers):
    batch = next(iter(DataLoader(CellFolder(folder, PROCESSOR), batch_size=4, num_workers=num_workers)))
    assert batch["volumes"].shape == (4, 2, 16, 16, 16) and batch["volumes"].dtype == torch.float32
    assert batch["class_labels"].tolist() == [1, 0, 1, 0]


def test_indexing_like_a_list(folder):
    cells = CellFolder(folder, PROCESSOR)
    assert len(cells) == len(list(cells)) == 4
    assert torch.equal(cells[-1]["volumes"], cells[3]["volumes"])
    with pytest.raises(IndexError):
        cells[4]


@pytest.mark.parametrize("cached", [0, 3, 4])
def test_cache_changes_speed_only(folder, cached, monkeypatch):
    cells = CellFolder(folder, PROCESSOR, cache_gb=cached * 4 * 2 * 16**3 / 1e9 + 1e-9)
    expected = CellFolder(folder, PROCESSOR)
    reads = []
    read = CellFolder._read
    monkeypatch.setattr(CellFolder, "_read", lambda self, index: reads.append(index) or read(self, index))
    for index in range(4):
        assert torch.equal(cells[index]["volumes"], expected[index]["volumes"])
    assert reads == list(range(cached, 4))


def test_items_do_not_share_memory(folder):
    cells = CellFolder(folder, PROCESSOR)
    before = cells[0]["volumes"]
    cells[0]["volumes"].zero_()
    assert torch.equal(cells[0]["volumes"], before)


@pytest.mark.parametrize("label", ["flat", ["flat"], ("flat", "flat")])
def test_one_label(folder, label):
    cells = CellFolder(folder, PROCESSOR, label=label)
    assert cells.class_names == ["flat"] and cells.labels == [0, 0]
    assert [path.name for path in cells.paths] == ["ä.ome.tif", "d.npy"]


def test_byte_order_mark_and_other_columns(folder):
    rows = [("3", "d.npy", "x, y"), ("4", "c.npz", "")]
    write_metadata(folder, rows, columns=("", "file_name", "note"), encoding="utf-8-sig")
    cells = CellFolder(folder, PROCESSOR)
    assert [path.name for path in cells.paths] == ["d.npy", "c.npz"]
    assert len(cells.class_names) == 1 and cells.labels == [0, 0]


def test_folder_without_metadata(folder):
    (folder / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="got 3 of 5 outside"):
        CellFolder(folder, PROCESSOR)
    flat = CellFolder(folder / "images", PROCESSOR)
    assert [path.name for path in flat.paths] == ["b 1.npy", "ä.ome.tif"] and flat.labels == [0, 0]

    (folder / "drug" / "plate 1").mkdir(parents=True)
    for name in ("c.npz", "d.npy", "not listed.npy"):
        (folder / name).rename(folder / "drug" / "plate 1" / name)
    (folder / "drug" / "._d.npy").write_bytes(b"made by macOS")
    (folder / "drug" / "notes.txt").write_text("not a cell")
    by_folder = CellFolder(folder, PROCESSOR)
    assert by_folder.class_names == ["drug", "images"] and by_folder.labels == [0, 0, 0, 1, 1]


def test_voxel_size_where_all_agree(tmp_path):
    for name, size in (("a", 0.65), ("b", 0.65)):
        write_ome_tiff(tmp_path / f"{name}.ome.tif", make_cell(0) / 255, size)
    assert CellFolder(tmp_path, PROCESSOR).voxel_size_um == (0.65, 0.65, 0.65)
    write_ome_tiff(tmp_path / "c.ome.tif", make_cell(0) / 255, 0.5)
    assert CellFolder(tmp_path, PROCESSOR).voxel_size_um is None


# bad folders, bad tables, bad files


def test_folders_without_cells(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere, which does not exist"):
        CellFolder(tmp_path / "nowhere", PROCESSOR)
    with pytest.raises(ValueError, match="Expected metadata.csv, .* got no cells"):
        CellFolder(tmp_path, PROCESSOR)


@pytest.mark.parametrize("label", ["spindly", ["flat", "spindly"], []])
def test_label_without_cells_lists_the_labels(folder, label):
    with pytest.raises(ValueError, match="Expected cells with the label .* got flat, round"):
        CellFolder(folder, PROCESSOR, label=label)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_folders_and_double_endings_are_cells_too(tmp_path, with_metadata):
    pytest.importorskip("nibabel")
    pytest.importorskip("ome_zarr")
    names = ["a.nii.gz", "b.ome.zarr", "c.ome.tif"]
    for number, name in enumerate(names):
        write_volume(tmp_path / name, make_cell(number) / 65535, 1.0)
    if with_metadata:
        (tmp_path / "metadata.csv").write_text("file_name\n" + "\n".join(names))
    cells = CellFolder(tmp_path, PROCESSOR)
    assert cells.ids == names
    for number, cell in enumerate(cells):
        torch.testing.assert_close(cell["volumes"], PROCESSOR.preprocess(make_cell(number), 1.0))


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        ([("d.npy", "a"), ("gone.npy", "a")], FileNotFoundError, "Expected the file of .*line 3, got no .*gone.npy"),
        ([("d.npy", "a"), ("c.npz", "a"), ("./d.npy", "b")], ValueError, "line 4, got './d.npy', .* line 2"),
        ([("../d.npy", "a")], ValueError, "Expected a file inside .*line 2, got '../d.npy'"),
        ([("images/../../d.npy", "a")], ValueError, "Expected a file inside .*line 2, got"),
        ([("/etc/passwd", "a")], ValueError, "Expected a file inside .*line 2, got '/etc/passwd'"),
        ([("", "a")], ValueError, "Expected a file_name in .*, line 2"),
        ([("d.npy", " ")], ValueError, "Expected a label in .*line 2, got none"),
        ([("d.npy",)], ValueError, "Expected 2 columns in .*, line 2"),
        ([("d.npy", "a", "b")], ValueError, "Expected 2 columns in .*, line 2"),
        ([], ValueError, "a row for each cell"),
    ],
)
def test_bad_rows(folder, rows, error, match):
    np.save(folder.parent / "d.npy", make_cell(0))
    write_metadata(folder, rows)
    with pytest.raises(error, match=match) as caught:
        CellFolder(folder, PROCESSOR)
    assert "metadata.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "Expected the columns file_name"),
        (b"path,label\nd.npy,a\n", r"Expected the columns file_name in .*\['path', 'label'\]"),
        (b"file_name;label\nd.npy;a\n", "separate columns by commas"),
        ("file_name,label\nd.npy,ä\n".encode("latin-1"), "Save it as CSV in UTF-8"),
        ("file_name,label\nd.npy,a\n".encode("utf-16"), "Save it as CSV in UTF-8"),
        (b'file_name,label\n"d.npy,a\n', "Expected a readable CSV"),
    ],
)
def test_bad_tables(folder, content, match):
    (folder / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        CellFolder(folder, PROCESSOR)
    assert "metadata.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (make_cell(0)[:1], "Expected 2 channels"),
        (make_cell(0)[0], "Expected 2 channels"),
        (make_cell(0) * 0, "all background"),
        (make_cell(0) * np.nan, "finite"),
        (np.pad(make_cell(0)[:, 2:6, 2:7, 2:8], ((0, 0), (0, 0), (0, 20), (0, 0)), mode="edge"), "oversize='rescale'"),
    ],
)
def test_a_bad_cell_is_found_at_construction(folder, array, match):
    np.save(folder / "d.npy", array)
    with pytest.raises(ValueError, match=match) as caught:
        CellFolder(folder, PROCESSOR)
    assert str(folder / "d.npy") in str(caught.value)


def test_a_bad_cell_is_found_by_several_processes_in_the_same_words(folder):
    np.save(folder / "d.npy", make_cell(0)[:1])
    messages = []
    for num_workers in (0, 2):
        with pytest.raises(ValueError, match="Expected 2 channels") as caught:
            CellFolder(folder, PROCESSOR, num_workers=num_workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_truncated_cell_is_found_at_construction(folder):
    path = folder / "images" / "ä.ome.tif"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged") as caught:
        CellFolder(folder, PROCESSOR)
    assert str(path) in str(caught.value)


def test_swapped_channels_are_found(tmp_path):
    write_ome_tiff(tmp_path / "a.ome.tif", make_cell(0) / 255, channel_names=("Nucleus", "Cell"))
    with pytest.raises(ValueError, match=r"a\.ome\.tif: Expected the channels in the order cell, nucleus"):
        CellFolder(tmp_path, PROCESSOR)
    write_ome_tiff(tmp_path / "a.ome.tif", make_cell(0) / 255, channel_names=("membrane", "DNA"))
    assert len(CellFolder(tmp_path, PROCESSOR)) == 1  # other names say nothing about the order


@pytest.mark.parametrize("cache_gb", [-1, float("nan")])
def test_bad_cache(folder, cache_gb):
    with pytest.raises(ValueError, match="cache_gb"):
        CellFolder(folder, PROCESSOR, cache_gb=cache_gb)


# phantoms


def test_phantom_cells():
    cells = PhantomCells(5, PHANTOM_PROCESSOR, seed=3)
    assert len(cells) == 5 and cells.class_names == sorted(PHENOTYPES)
    assert cells.voxel_size_um == (2.0, 2.0, 2.0)
    for index in range(5):
        phantom = cells.phantom(index)
        assert phantom.phenotype == PHENOTYPES[index % 3] == cells.class_names[cells.labels[index]]
        assert phantom.truth == cells.truths[index]
        assert torch.equal(cells[index]["volumes"], PHANTOM_PROCESSOR.preprocess(phantom.volume, 2.0))


def test_phantoms_depend_on_seed_and_index_alone():
    few, many, others = (
        PhantomCells(n, PHANTOM_PROCESSOR, seed=seed, cache_gb=0) for n, seed in ((2, 0), (4, 0), (2, 1))
    )
    for index in range(2):
        assert torch.equal(few[index]["volumes"], many[index]["volumes"])
        assert not torch.equal(few[index]["volumes"], others[index]["volumes"])
    assert few.truths == many.truths[:2]


def test_phantoms_of_several_processes_are_the_same():
    alone, together = (PhantomCells(3, PHANTOM_PROCESSOR, num_workers=workers) for workers in (0, 2))
    for index in range(3):
        assert torch.equal(alone[index]["volumes"], together[index]["volumes"])


def test_some_phenotypes():
    cells = PhantomCells(3, PHANTOM_PROCESSOR, phenotypes=["nocodazole", "blebbistatin"])
    assert cells.class_names == ["blebbistatin", "nocodazole"] and cells.labels == [1, 0, 1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_cells": 0}, "num_cells"),
        ({"phenotypes": ["round"]}, "binimetinib"),
        ({"phenotypes": []}, "phenotypes"),
        ({"seed": -1}, "seed"),
        ({"processor": VolumeProcessor(voxel_size_um=(2.0, 1.0, 1.0))}, "cubic"),
        ({"processor": VolumeProcessor(num_channels=1, channel_names=("cell",))}, "`num_channels` 2"),
    ],
)
def test_phantom_cells_refuse(options, match):
    with pytest.raises(ValueError, match=match):
        PhantomCells(**{"num_cells": 2, "processor": PHANTOM_PROCESSOR, **options})


# real cells, and the package


@pytest.mark.skipif(not REAL_CELLS.is_dir(), reason="needs ../shared/data/mitotic_cells")
def test_real_cells():
    cells = CellFolder(REAL_CELLS, VolumeProcessor(), label=["metaphase", "telophase"])
    assert len(cells) == 24 and cells.class_names == ["metaphase", "telophase"] and cells.labels.count(0) == 12
    assert cells.voxel_size_um == (0.65, 0.65, 0.65)
    for cell in cells:
        background = (cell["volumes"] == -1).float().mean(dim=(1, 2, 3))
        assert (background > 0.8).all() and cell["volumes"].amax() == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the newest diffusers there imports scipy where it finds it")
def test_only_what_needs_scipy_and_tifffile_imports_them():
    code = """
import sys
sys.modules["scipy"] = sys.modules["tifffile"] = sys.modules["pandas"] = None
import diffusers_byoc.data as data
data.VolumeProcessor()
try:
    data.make_phantom("nocodazole", 0)
except ImportError as error:
    print(error)
"""
    path = [str(Path(__file__).resolve().parents[3] / "src"), *sys.path]
    code = f"import sys\nsys.path[:] = {path!r}\n{code}"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert output.returncode == 0, output.stderr
    assert "diffusers_byoc[data]" in output.stdout
