"""Labels in NumPy's files, Cellpose's _seg.npy among them."""

import pickle
import sys

import numpy as np
import pytest

from diffusers_byoc.data.microscope.stacks import open_stack, read_channels


SHAPE = (2, 5, 24, 26)


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 2**16, SHAPE).astype(np.uint16)


def save_seg(path, masks, **more):
    """As Cellpose's graphical interface does: a dictionary in an array of one object, pickled."""
    content = {
        "outlines": masks * 0,
        "colors": np.ones((5, 3), np.uint8),
        "masks": masks,
        "filename": "C:/images/A1.tif",
        "flows": [np.zeros((1, 5, 6), np.uint8), np.float32(0.5), [1, 2], None],
        "ismanual": np.zeros(3, bool),
        "manual_changes": [],
        "model_path": 0,
        "diameter": np.nan,
    }
    np.save(path, content | more)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", ">i4", "int64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_labels_of_cellpose(tmp_path, dtype, order):
    masks = np.asarray(np.random.default_rng(0).integers(0, 100, SHAPE[1:]).astype(dtype), order=order)
    save_seg(tmp_path / "A1_seg.npy", masks)
    read = read_channels(open_stack(tmp_path / "A1_seg.npy"))
    np.testing.assert_array_equal(read.data, masks[None])
    assert read.data.dtype == masks.dtype.newbyteorder("=")
    np.save(tmp_path / "A1_masks.npy", masks)
    np.testing.assert_array_equal(read_channels(open_stack(tmp_path / "A1_masks.npy")).data, masks[None])


class Trap:
    def __reduce__(self):
        return (exec, ("import sys; sys._byoc_trap = True",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_file_of_cellpose_is_never_run(tmp_path, protocol):
    path = tmp_path / "A1_seg.npy"
    save_seg(path, np.ones(SHAPE[1:], np.uint16), filename=Trap())
    header = path.read_bytes()[: path.read_bytes().index(b"\n") + 1]
    content = {"masks": np.ones(SHAPE[1:], np.uint16), "x": Trap()}
    array = np.empty((), object)
    array[()] = content
    path.write_bytes(header + pickle.dumps(array, protocol))
    with pytest.raises(ValueError, match="which cannot be read without running code. Save the labels as TIFF"):
        open_stack(path)
    assert not hasattr(sys, "_byoc_trap")


def test_what_is_no_label_image_of_cellpose(tmp_path):
    save_seg(tmp_path / "flat_seg.npy", np.ones((24, 26), np.uint16))
    with pytest.raises(ValueError, match="a 2D image"):
        open_stack(tmp_path / "flat_seg.npy")
    np.save(tmp_path / "b_seg.npy", {"no": "masks"})
    with pytest.raises(ValueError, match="dictionary with an array of masks"):
        open_stack(tmp_path / "b_seg.npy")
    np.save(tmp_path / "c_seg.npy", {"masks": np.array([{}], object)})
    with pytest.raises(ValueError, match="plain numbers as masks"):
        open_stack(tmp_path / "c_seg.npy")
    save_seg(tmp_path / "d_seg.npy", np.ones(SHAPE[1:], np.uint16))
    whole = (tmp_path / "d_seg.npy").read_bytes()
    for length in range(130, len(whole), 500):
        (tmp_path / "d_seg.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="d_seg.npy"):
            open_stack(tmp_path / "d_seg.npy")


def test_a_stack_larger_than_memory_is_read_by_boxes(tmp_path, data):
    np.save(tmp_path / "a.npy", data.astype(">u2"))
    stack = open_stack(tmp_path / "a.npy", max_gb=5e-6)
    chosen = read_channels(stack, [1], 5e-6)
    assert not isinstance(chosen.data, np.ndarray)
    np.testing.assert_array_equal(np.asarray(chosen.data[:, 1:4, 3:9, 20:]), data[1:, 1:4, 3:9, 20:])
