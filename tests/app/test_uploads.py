import os

import numpy as np
import pytest

from diffusers_byoc.app import uploads
from diffusers_byoc.app.uploads import as_cell, read_upload
from diffusers_byoc.data import VolumeProcessor, write_volume


def cell(edge=12):
    volume = np.zeros((2, edge, edge, edge), np.float32)
    volume[0, 2:10, 2:10, 3:9], volume[1, 4:8, 4:8, 4:8] = 0.5, 1.0
    return volume


PROCESSOR = VolumeProcessor(16, voxel_size_um=1.0, percentiles=(0, 100))


@pytest.mark.parametrize("ending", [".ome.tif", ".npz", ".nii.gz"])
def test_a_cell_comes_as_training_cells_do(tmp_path, ending):
    path = tmp_path / f"cell{ending}"
    write_volume(path, cell(), 1.0)
    prepared = as_cell(read_upload(str(path)), PROCESSOR)
    assert prepared.shape == (2, 16, 16, 16) and prepared.min() == 0 and prepared.max() == 1
    assert (prepared[0] > 0.5).sum() == 8 * 8 * 6 and (prepared[1] > 0.5).sum() == 4**3


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_bad_files_are_named_by_their_names_and_nothing_of_them_runs(tmp_path, monkeypatch):
    harmful = tmp_path / "harmful.npy"
    np.save(harmful, np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    text = tmp_path / "cell.tif"
    text.write_text("no image")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "cell.czi").write_bytes(b"x")
    for name, message in (
        ("harmful.npy", "harmful.npy"),
        ("cell.tif", "cell.tif"),
        ("empty.npy", "an empty file"),
        ("cell.czi", r"ending in \.tif, .*got cell.czi"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_upload(str(tmp_path / name))
        assert str(tmp_path) not in str(error.value)
    assert not (tmp_path / "sprung").exists()
    large = tmp_path / "large.npy"
    np.save(large, cell())
    monkeypatch.setattr(uploads, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1000 bytes, got 13824 in large.npy"):
        read_upload(str(large))
