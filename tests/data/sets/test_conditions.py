import numpy as np
import pytest
import torch

from diffusers_byoc.data import CellFolder, CellTable, StreamedCells, VolumeProcessor, encode_volume
from diffusers_byoc.data.formats.volume import Volume


PROCESSOR = VolumeProcessor(8, 2, ("cell", "nucleus"))


def volume(seed):
    return np.random.default_rng(seed).integers(1, 99, (2, 6, 6, 6), dtype=np.uint16)


def write_folder(root, doses):
    lines = ["file_name,label,dose_um"]
    for index, dose in enumerate(doses):
        np.save(root / f"{index}.npy", volume(index))
        lines.append(f"{index}.npy,{'ab'[index % 2]},{dose}")
    (root / "metadata.csv").write_text("\n".join(lines))


def write_table(path, doses):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        encode_volume(Volume(volume(index))) | {"label": "ab"[index % 2], "dose_um": dose, "smiles": [dose, 1.0]}
        for index, dose in enumerate(doses)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path / "cells.parquet")


def test_columns_of_a_folder_are_conditions(tmp_path):
    write_folder(tmp_path, [0.5, 2, 1e1])
    cells = CellFolder(tmp_path, PROCESSOR, condition_columns=["dose_um"])
    assert cells.conditions["dose_um"].tolist() == [[0.5], [2.0], [10.0]]
    assert cells[1]["conditions"]["dose_um"].tolist() == [2.0]
    only = CellFolder(tmp_path, PROCESSOR, "a", condition_columns=["dose_um"])
    assert only.conditions["dose_um"].tolist() == [[0.5], [10.0]]
    assert CellFolder(tmp_path, PROCESSOR).conditions == {}


@pytest.mark.parametrize("dose", ["", "high", "nan"])
def test_a_cell_without_a_number_is_named(dose, tmp_path):
    write_folder(tmp_path, [0.5, dose])
    with pytest.raises(ValueError, match="finite number.*column dose_um of .*metadata.csv, line 3, got"):
        CellFolder(tmp_path, PROCESSOR, condition_columns=["dose_um"])
    with pytest.raises(ValueError, match="columns file_name, time_h"):
        CellFolder(tmp_path, PROCESSOR, condition_columns=["time_h"])


def test_columns_of_a_table_are_conditions_also_lists(tmp_path):
    write_table(tmp_path, [0.5, 2.0, 10.0])
    columns = ["dose_um", "smiles"]
    table = CellTable(str(tmp_path), PROCESSOR, condition_columns=columns)
    stream = StreamedCells(str(tmp_path), PROCESSOR, condition_columns=columns)
    for cells in (table, stream):
        assert cells.conditions["dose_um"].tolist() == [[0.5], [2.0], [10.0]]
        assert cells.conditions["smiles"].tolist() == [[0.5, 1.0], [2.0, 1.0], [10.0, 1.0]]
    batch = next(iter(stream.loader(3, 0, 1, seed=0)))
    doses = dict(
        zip(batch["volumes"].sum((1, 2, 3, 4)).tolist(), batch["conditions"]["dose_um"][:, 0].tolist(), strict=True)
    )
    for index, item in enumerate(stream):
        assert torch.equal(item["conditions"]["smiles"], torch.tensor([item["conditions"]["dose_um"][0], 1.0]))
        assert doses[item["volumes"].sum().item()] == pytest.approx([0.5, 2.0, 10.0][index])
    assert sorted(float(cell["conditions"]["dose_um"]) for cell in stream.indexable(3, 0)) == [0.5, 2.0, 10.0]
    with pytest.raises(ValueError, match="Expected a column time_h"):
        CellTable(str(tmp_path), PROCESSOR, condition_columns=["time_h"])
