import math

import dask.array
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from diffusers_byoc.data import VolumeProcessor, resample_volume
from diffusers_byoc.data.microscope.cutting import cut_cells, find_cells, is_mask, mask_crop, nucleus_contrast
from diffusers_byoc.data.microscope.stacks import Stack


NAMES = ("cell", "nucleus")
LABELS = [3, 700, 2**20 + 7, 2**32 - 1]  # with gaps, more than an int32 holds


def make_labels(shape=(14, 40, 46), dtype=np.uint32):
    """Four cells: two that touch, one in two parts, one alone."""
    labels = np.zeros(shape, dtype)
    labels[3:9, 4:12, 5:13] = LABELS[0]
    labels[3:9, 4:12, 13:20] = LABELS[1]  # touches the first
    labels[2:6, 20:27, 4:12] = LABELS[2]
    labels[8:12, 30:36, 6:14] = LABELS[2]  # its other part
    labels[4:12, 22:34, 28:40] = LABELS[3]
    return labels


def make_stack(labels, dtype=np.uint16, offset=100, seed=0):
    """Cells of which a ball in the middle of each label's box is bright in the nucleus channel."""
    rng = np.random.default_rng(seed)
    data = np.full((2, *labels.shape), float(offset))
    data[0][labels > 0] += 300
    for label_id, box in find_cells(labels).items():
        middle = tuple(slice(edge.start + 2, edge.stop - 2) for edge in box)
        data[1][middle][labels[middle] == label_id] += 900
    return rng.poisson(data).astype(dtype)


def stack_of(data, voxel_size_um=(1.0, 1.0, 1.0)):
    data = data if data.ndim == 4 else data[None]
    return Stack("memory", data, voxel_size_um, tuple(f"Channel:0:{index}" for index in range(len(data))))


def cut(data, labels, voxel_size_um=(1.0, 1.0, 1.0), target_um=1.0, **options):
    names = options.pop("names", NAMES)
    options = {"min_volume_um3": 0.0, "min_nucleus_contrast": 0.0} | options
    return list(cut_cells(stack_of(data, voxel_size_um), stack_of(labels), names, target_um, **options))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.float64])
def test_boxes_by_brute_force(dtype, lazy):
    labels = make_labels(dtype=dtype)
    array = dask.array.from_array(labels, chunks=(5, 40, 23)) if lazy else labels
    boxes = find_cells(array)
    assert list(boxes) == LABELS
    for label_id, box in boxes.items():
        where = np.argwhere(labels == label_id)
        assert [(edge.start, edge.stop) for edge in box] == list(
            zip(where.min(axis=0), where.max(axis=0) + 1, strict=True)
        )


def test_large_labels_stay_apart():
    labels = np.zeros((4, 5, 6), np.uint64)
    labels[1, 1, 1], labels[2, 2, 2] = 2**60, 2**60 + 1  # one number to a float
    assert list(find_cells(labels)) == [2**60, 2**60 + 1]
    labels[3] = 2**63
    with pytest.raises(ValueError, match="labels of at most"):
        find_cells(labels)


def test_small_labels_take_the_short_way_to_the_same_boxes():
    labels = make_labels()
    compact = np.searchsorted([0, *LABELS], labels).astype(np.uint8)
    assert list(find_cells(compact).values()) == list(find_cells(labels).values())
    assert find_cells(np.zeros((3, 4, 5), np.uint16)) == {}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.ones((3, 3, 3), bool), "binary mask"),
        (np.full((3, 3, 3), 0.5), "probability map"),
        (np.full((3, 3, 3), np.nan), "whole numbers"),
        (np.full((3, 3, 3), -1), "from 0 on, got -1"),
    ],
)
def test_what_is_no_label_image_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        find_cells(labels)


def blobs(values, size=6, shape=(10, 30, 50)):
    """Cubes of `size`, one for each of `values`, apart."""
    labels = np.zeros(shape, np.uint8)
    for number, value in enumerate(values):
        y, x = 2 + 14 * (number // 4), 2 + 12 * (number % 4)
        labels[2 : 2 + size, y : y + size, x : x + size] = value
    return labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (blobs([1]), False),  # one cell
        (blobs([1, 1]), True),
        (blobs([255] * 5), True),
        (blobs([1, 2]), False),
        (blobs([1, 1, 2]), False),  # a cell in two parts
        (blobs([1, 1, 1, 2, 2]), True),  # classes
        (np.where(blobs([1] * 4) > 0, 2, 1).astype(np.uint8), True),  # ilastik's background is 1
        (blobs([1, 2, 3, 1, 1]), False),
        (blobs([]), False),
        (np.ones((10, 30, 50), np.uint8), False),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_mask_is_told_from_a_label_image(labels, expected, lazy):
    array = dask.array.from_array(labels, chunks=(5, 30, 23)) if lazy else labels
    assert is_mask(array, find_cells(array), min_voxels=100) == expected
    assert not is_mask(array, find_cells(array), min_voxels=1000) or labels.min() > 0  # parts too small for cells


def test_specks_make_no_mask():
    labels = blobs([1])
    labels[::3, ::5, -2] = 1
    assert not is_mask(labels, find_cells(labels), min_voxels=0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("mask_out", ["background", "neighbours", "none"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_every_voxel_of_every_crop(dtype, mask_out, lazy):
    labels = make_labels()
    data = (make_stack(labels) // 8).astype(dtype) - (20 if np.dtype(dtype).kind in "if" else 0)
    arrays = [dask.array.from_array(array, chunks=11) for array in (data, labels[None])] if lazy else [data, labels]
    cells = cut(*arrays, (2.0, 1.0, 1.0), (2.0, 1.0, 1.0), margin_um=3.0, mask_out=mask_out)
    assert [cell.label_id for cell in cells] == LABELS
    for cell in cells:
        where = np.argwhere(labels == cell.label_id)
        first = np.maximum(where.min(axis=0) - [2, 3, 3], 0)  # 3 µm are two voxels of 2 µm, or three of 1 µm
        last = np.minimum(where.max(axis=0) + [3, 4, 4], labels.shape)
        box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        got, raw, crop_labels = cell.volume.data, data[(slice(None), *box)], labels[box]
        assert got.dtype == dtype and got.shape == raw.shape
        assert cell.volume.voxel_size_um == (2.0, 1.0, 1.0) and cell.volume.channel_names == NAMES
        mine, free = crop_labels == cell.label_id, crop_labels == 0
        replaced = {"background": ~mine, "neighbours": ~mine & ~free, "none": np.zeros_like(mine)}[mask_out]
        np.testing.assert_array_equal(got[:, ~replaced], raw[:, ~replaced])
        for channel, raw_channel in zip(got, raw, strict=True):
            middle = np.sort(raw_channel[free])[(free.sum() - 1) // 2]
            assert (channel[replaced] == min(middle, raw_channel[mine].min())).all()
        assert cell.num_parts == (2 if cell.label_id == LABELS[2] else 1)
        assert cell.extent == tuple(where.max(axis=0) + 1 - where.min(axis=0))


def test_the_processor_finds_the_cell_alone():
    """An offset does not become an edge: what is masked out is the channel's background, the rest is the cell."""
    labels = make_labels()
    for cell in cut(make_stack(labels), labels, margin_um=5.0):
        cube = VolumeProcessor().preprocess(cell.volume.data)
        occupied = np.argwhere((cube > -1).any(0).numpy())
        extent = occupied.max(axis=0) + 1 - occupied.min(axis=0)
        assert (np.abs(extent - cell.extent) <= 1).all()  # the cell's darkest voxel is background as well


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("source_um", [(2.0, 0.5, 0.5), (0.65, 0.65, 0.65)])
def test_resampling_keeps_scale_type_and_background(source_um, dtype):
    labels = make_labels()
    data = (make_stack(labels) // 8).astype(dtype)
    raw = cut(data, labels, source_um, source_um)
    for cell, before in zip(cut(data, labels, source_um, 1.0), raw, strict=True):
        data_before, got = before.volume.data, cell.volume.data
        assert got.dtype == dtype and cell.volume.voxel_size_um == (1.0, 1.0, 1.0)
        assert got.shape[1:] == tuple(
            math.floor(length * size + 0.5) for length, size in zip(data_before.shape[1:], source_um, strict=True)
        )
        expected = resample_volume(data_before, source_um, 1.0)
        np.testing.assert_allclose(got, expected, atol=0.51 if dtype != np.float32 else 1e-3)
        # background is one number, not nearly one: the processor takes the lowest for it
        level = data_before.reshape(2, -1).min(axis=1)
        corner = got[:, :1, :1, :1].ravel()
        np.testing.assert_array_equal(corner, level)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from(["background", "neighbours"]))
def test_cells_put_back_are_the_stack(seed, num_cells, mask_out):
    """Cutting loses nothing: crops put where they were give every labelled voxel again."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((6, 14, 15), np.uint16)
    for label_id in rng.choice(1000, num_cells, replace=False) + 1:
        start = [rng.integers(0, length - 2) for length in labels.shape]
        labels[tuple(slice(s, s + rng.integers(1, 8)) for s in start)] = label_id
    data = rng.integers(0, 2**16, (2, *labels.shape)).astype(np.uint16)
    again = np.zeros_like(data)
    boxes = find_cells(labels)
    for cell in cut(data, labels, margin_um=0.0, mask_out=mask_out, keep_border=True):
        box = boxes.pop(cell.label_id)
        mine = labels[box] == cell.label_id
        again[(slice(None), *box)][:, mine] = cell.volume.data[:, mine]
    assert not boxes
    np.testing.assert_array_equal(again, data * (labels > 0))


def test_each_reason():
    labels = np.zeros((12, 40, 70), np.uint8)
    labels[2:10, 5:15, 5:15] = 1  # kept
    labels[0:8, 5:15, 20:30] = 2  # first plane
    labels[2:10, 5:15, 60:70] = 3  # last column
    labels[4:6, 5:8, 35:38] = 4  # 18 voxels
    labels[2:10, 25:35, 5:15] = 5  # no nucleus
    labels[2:10, 25:35, 20:30] = 6  # not a number
    data = make_stack(labels, np.float32)
    data[1][labels == 5] = np.random.default_rng(0).poisson(100, (labels == 5).sum())
    data[0, 5, 30, 25] = np.nan
    options = {"min_volume_um3": 18.5, "min_nucleus_contrast": 0.7}
    reasons = {cell.label_id: cell.reason for cell in cut(data, labels, **options)}
    expected = {1: "", 2: "touches the border", 3: "touches the border", 4: "too small", 5: "no nucleus"}
    assert reasons == expected | {6: "not finite"}
    assert {cell.label_id for cell in cut(data, labels, **options, keep_border=True) if not cell.reason} == {1, 2, 3}
    # 18 voxels of 2 µm³ are 36 µm³
    reasons = {cell.label_id: cell.reason for cell in cut(data, labels, (2.0, 1.0, 1.0), **options)}
    assert reasons[4] == ""
    # without a nucleus channel, there is no nucleus to miss
    assert cut(data, labels, names=("cell", "membrane"), **options)[4].reason == ""
    # with labels of nuclei, these decide: one voxel of cell 5, and none of the others
    nuclei = np.zeros_like(labels)
    nuclei[5, 30, 10] = 77
    reasons = {cell.label_id: cell.reason for cell in cut(data, labels, nucleus_labels=stack_of(nuclei), **options)}
    assert (reasons[5], reasons[1]) == ("", "no nucleus")


def test_contrast_in_closed_form():
    rng = np.random.default_rng(0)
    everywhere = np.ones((30, 30, 30), bool)
    assert nucleus_contrast(np.full(everywhere.shape, 7, np.uint16), everywhere) == 0
    assert nucleus_contrast(np.full(everywhere.shape, 1e7), everywhere) == 0
    assert nucleus_contrast(rng.poisson(100, everywhere.shape), everywhere) == pytest.approx(2 / math.pi, abs=0.02)
    assert nucleus_contrast(rng.poisson(0.1, everywhere.shape), everywhere) == pytest.approx(2 / math.pi, abs=0.05)
    ramp = np.broadcast_to(np.arange(30.0), everywhere.shape)
    assert nucleus_contrast(ramp, everywhere) == pytest.approx(0.75, abs=0.02)
    halves = np.broadcast_to(np.repeat([0.0, 1.0], 300), (3, 3, 600))
    assert nucleus_contrast(halves, np.ones(halves.shape, bool)) == pytest.approx(1, abs=0.01)
    assert nucleus_contrast(halves * 1e6 + 1e4, halves >= 0) == pytest.approx(nucleus_contrast(halves, halves >= 0))
    assert nucleus_contrast(halves, np.eye(3, dtype=bool)[:, :, None] & (np.arange(600) == 0)) <= 1


def test_a_crop_without_free_voxels_has_the_background_of_its_darkest():
    crop, labels = np.arange(16, dtype=np.uint8).reshape(2, 2, 2, 2) + 10, np.ones((2, 2, 2), int)
    labels[0] = 2
    masked, levels = mask_crop(crop, labels, 1)
    np.testing.assert_array_equal(levels, [14, 22])
    np.testing.assert_array_equal(masked[:, 0].ravel(), [14] * 4 + [22] * 4)
    np.testing.assert_array_equal(masked[:, 1], crop[:, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.ones((14, 40, 45), np.uint8)}, "label image of this very stack"),
        ({"labels": np.ones((2, 14, 40, 46), np.uint8)}, "Expected one channel"),
        ({"labels": np.ones((14, 40, 46), bool)}, "memory: Expected a label image"),
        ({"nucleus_labels": stack_of(np.ones((14, 40, 45), np.uint8))}, "label image of this very stack"),
        ({"voxel_size_um": None}, "size of the voxels of memory in µm"),
        ({"target_um": 0.0}, "positive"),
        ({"mask_out": "all"}, "mask_out"),
    ],
)
def test_wrong_arguments(change, message):
    labels = make_labels()
    with pytest.raises(ValueError, match=message):
        cut(**{"data": make_stack(labels), "labels": labels} | change)


def test_the_parts_of_a_label_are_counted_with_corners():
    labels = np.zeros((6, 12, 12), np.uint8)
    labels[2:4, 2:6, 2:6] = labels[2:4, 6:9, 6:9] = 1  # they meet at an edge
    (cell,) = cut(make_stack(labels), labels)
    assert cell.num_parts == 1
    assert ndimage.label(labels)[1] == 2
