import dataclasses
import json

import numpy as np
import pytest
import torch

from diffusers_byoc.data import VolumeProcessor


def masked_cell(shape=(2, 6, 8, 10), dtype=np.uint8, seed=0):
    """A dense cell with intensities from 1 to 255 in a crop without margin; the highest value is certain to occur."""
    cell = np.random.default_rng(seed).integers(1, 256, shape).astype(dtype)
    cell[:, 0, 0, 0] = 255
    return cell


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint64", "float16", "float32", "float64"])
def test_values_and_padding_by_hand(dtype):
    cell = masked_cell(dtype=dtype)
    cell[:, 1, 1, 1] = 0
    cube = VolumeProcessor(sample_size=12, normalization="minmax").preprocess(cell)
    assert cube.shape == (2, 12, 12, 12) and cube.dtype == torch.float32
    inside = (slice(None), slice(3, 9), slice(2, 10), slice(1, 11))
    np.testing.assert_allclose(cube[inside], cell.astype(np.float64) / 255 * 2 - 1, atol=1e-6)
    assert cube.amin() == -1 and cube.amax() == 1
    cube[inside] = -1
    assert (cube == -1).all()  # exactly, everywhere outside the cell


def test_tensor_and_array_agree():
    cell = masked_cell()
    processor = VolumeProcessor(sample_size=12)
    expected = processor.preprocess(cell)
    assert torch.equal(processor.preprocess(torch.from_numpy(cell)), expected)
    assert torch.equal(processor.preprocess(torch.from_numpy(cell).bfloat16().requires_grad_()), expected)


@pytest.mark.parametrize("normalization", ["percentile", "minmax"])
def test_background_is_exact_and_brightness_does_not_matter(normalization):
    cell = np.zeros((2, 10, 10, 10))
    cell[:, 3:8, 2:9, 4:6] = np.random.default_rng(0).uniform(50, 90, (2, 5, 7, 2))
    processor = VolumeProcessor(sample_size=16, normalization=normalization)
    cube = processor.preprocess(cell)
    assert (cube == -1).sum() == 2 * (16**3 - 5 * 7 * 2)
    torch.testing.assert_close(processor.preprocess(7 * cell), cube)
    torch.testing.assert_close(processor.preprocess(cell - 30), cube)  # float images may be negative


def test_percentile_ignores_the_amount_of_background():
    cell = masked_cell((2, 10, 10, 10))
    processor = VolumeProcessor(sample_size=32, percentiles=(0, 90))
    padded = np.pad(cell, ((0, 0), (10, 3), (1, 0), (0, 7)))
    cell_with_background = np.pad(cell, ((0, 0), (1, 1), (1, 1), (1, 1)))
    cube = processor.preprocess(padded)
    assert torch.equal(cube, processor.preprocess(cell_with_background))
    saturated = (cube == 1).sum(dim=(1, 2, 3)) / 1000
    assert ((0.09 < saturated) & (saturated < 0.12)).all()


def test_fixed_range_keeps_brightness():
    processor = VolumeProcessor(sample_size=8, normalization="fixed", intensity_range=[(100, 200), (0, 50)])
    cell = np.stack([np.full((2, 2, 2), 150.0), np.full((2, 2, 2), 10.0)])
    cell[:, 0, 0, 0] = [90, 60]
    cube = processor.preprocess(cell)[:, 3:5, 3:5, 3:5]
    assert cube[0].flatten().tolist() == pytest.approx([-1] + [0] * 7)
    assert cube[1].flatten().tolist() == pytest.approx([1] + [-0.6] * 7)


def test_cell_is_centred_whatever_its_margin():
    cell = masked_cell((2, 3, 4, 5))
    cell[1, :, :, 3:] = 0  # the nucleus is smaller; the box is that of both channels
    processor = VolumeProcessor(sample_size=12, normalization="minmax")
    off_centre = np.pad(cell, ((0, 0), (7, 0), (0, 3), (5, 6)))
    cube = processor.preprocess(off_centre)
    occupied = (cube > -1).any(dim=0).nonzero()
    assert occupied.amin(dim=0).tolist() == [4, 4, 3] and occupied.amax(dim=0).tolist() == [6, 7, 7]


def test_a_wide_margin_does_not_make_a_cell_too_large():
    cell = np.zeros((2, 40, 40, 40), np.uint8)
    cell[:, 10:18, 30:38, 2:10] = masked_cell((2, 8, 8, 8))
    processor = VolumeProcessor(sample_size=8, normalization="minmax")
    expected = torch.from_numpy(cell[:, 10:18, 30:38, 2:10] / 255 * 2 - 1).float()
    torch.testing.assert_close(processor.preprocess(cell), expected)


def test_oversize_error_names_size_and_choices():
    with pytest.raises(ValueError, match=r"8³ voxels, got \(6, 8, 10\).*'rescale'.*'crop'.*sample_size >= 10"):
        VolumeProcessor(sample_size=8).preprocess(masked_cell())


def test_oversize_crop_keeps_the_middle():
    cell = masked_cell((2, 4, 8, 12))
    cube = VolumeProcessor(sample_size=8, normalization="minmax", oversize="crop").preprocess(cell)
    low = cell.min(axis=(1, 2, 3), keepdims=True).astype(float)
    expected = ((cell - low) / (255 - low) * 2 - 1)[:, :, :, 2:10]
    np.testing.assert_allclose(cube[:, 2:6], expected, atol=1e-6)
    assert (cube[:, :2] == -1).all() and (cube[:, 6:] == -1).all()


def test_oversize_rescale_shrinks_alike_in_all_axes():
    cell = np.zeros((2, 10, 18, 22))
    cell[:, 1:9, 1:17, 1:21] = np.arange(20) // 2 + 1  # pairs of equal voxels along x
    processor = VolumeProcessor(sample_size=10, normalization="minmax", oversize="rescale")
    cube, record = processor.preprocess_with_record(cell, 0.5)
    assert record.step == (2, 2, 2) and record.voxel_size_um == (1, 1, 1)
    half_bright = ((cube[0] + 1) / 2 > 0.3).nonzero()
    assert (half_bright.amax(dim=0) - half_bright.amin(dim=0) + 1).tolist()[:2] == [4, 8]
    np.testing.assert_allclose(cube[0, 5, 5, :9], np.arange(1, 10) / 10 * 2 - 1, atol=1e-6)
    assert processor.preprocess_with_record(cell)[1].voxel_size_um is None  # unknown before, unknown after


def test_rescale_leaves_small_cells_alone():
    cell = masked_cell()
    assert torch.equal(
        VolumeProcessor(sample_size=10, oversize="rescale").preprocess(cell),
        VolumeProcessor(sample_size=10).preprocess(cell),
    )


def test_preprocess_undoes_postprocess():
    processor = VolumeProcessor(sample_size=12, normalization="minmax")
    cube = processor.preprocess(np.pad(masked_cell(), ((0, 0), (1, 1), (1, 1), (1, 1))))
    intensities = processor.postprocess(cube[None])
    assert intensities.dtype == np.float32 and intensities.min() == 0 and intensities.max() == 1
    torch.testing.assert_close(processor.preprocess(intensities[0]), cube)


def test_postprocess_clips_and_keeps_the_asked_type():
    volumes = torch.tensor([-3.0, -1, 0, 0.5, 1, 2]).reshape(1, 2, 1, 1, 3).bfloat16().requires_grad_()
    processor = VolumeProcessor()
    tensor = processor.postprocess(volumes, output_type="pt")
    assert tensor.flatten().tolist() == [0, 0, 0.5, 0.75, 1, 1] and not tensor.requires_grad
    np.testing.assert_array_equal(processor.postprocess(volumes), tensor.numpy())


@pytest.mark.parametrize(
    ("volumes", "output_type", "match"),
    [
        (torch.zeros(2, 4, 4, 4), "np", r"\(B, 2, D, H, W\)"),
        (torch.zeros(1, 3, 4, 4, 4), "np", r"\(B, 2, D, H, W\)"),
        (torch.full((1, 2, 4, 4, 4), torch.nan), "np", "finite"),
        (torch.zeros(1, 2, 4, 4, 4), "pil", "'np' or 'pt'"),
    ],
)
def test_postprocess_refuses(volumes, output_type, match):
    with pytest.raises(ValueError, match=match):
        VolumeProcessor().postprocess(volumes, output_type)


def test_three_channels_are_a_matter_of_configuration():
    processor = VolumeProcessor(sample_size=12, num_channels=3, channel_names=("cell", "nucleus", "mitochondria"))
    assert processor.preprocess(masked_cell((3, 6, 8, 10))).shape == (3, 12, 12, 12)
    assert processor.postprocess(torch.zeros(1, 3, 4, 4, 4)).shape == (1, 3, 4, 4, 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"percentiles": (1.0, 99.0), "oversize": "crop", "voxel_size_um": (1.0, 0.5, 0.5)},
        {"normalization": "fixed", "intensity_range": [(10, 200), (5, 100)], "sample_size": 16},
    ],
)
def test_save_and_load(tmp_path, options):
    processor = VolumeProcessor(**options)
    processor.save_config(tmp_path)
    assert (tmp_path / "volume_processor_config.json").is_file()
    loaded = VolumeProcessor.from_config(VolumeProcessor.load_config(tmp_path))
    assert loaded.voxel_size_um == processor.voxel_size_um
    assert list(loaded.config.channel_names) == ["cell", "nucleus"]
    cell = masked_cell((2, 10, 10, 10))
    assert torch.equal(loaded.preprocess(cell, 0.5), processor.preprocess(cell, 0.5))


# voxel sizes


def ball(radius_um, voxel_um, margin_um=3.0):
    """A ball in the cell channel and a smaller one beside its middle in the nucleus channel, of values 0 and 200."""
    lengths = [int(2 * (radius_um + margin_um) / size) | 1 for size in voxel_um]
    axes = [(np.arange(n) - n // 2) * size for n, size in zip(lengths, voxel_um, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    inside = [z**2 + y**2 + x**2 <= radius_um**2, z**2 + (y - 2) ** 2 + x**2 <= (radius_um / 2) ** 2]
    return np.stack(inside).astype(np.uint8) * 200


@pytest.mark.parametrize("source_um", [(0.5, 0.5, 0.5), (1.5, 0.4, 0.4), (1.0, 1.0, 1.0), (2.0, 1.0, 0.7)])
@pytest.mark.parametrize("target_um", [0.8, 1.0, (1.5, 1.0, 1.0)])
def test_a_ball_of_any_voxel_size_becomes_the_same_ball(source_um, target_um):
    processor = VolumeProcessor(sample_size=32, normalization="minmax", voxel_size_um=target_um)
    cube, record = processor.preprocess_with_record(ball(9.0, source_um), source_um)
    assert record.voxel_size_um == processor.voxel_size_um
    share, voxel_um = (cube + 1) / 2, torch.tensor(processor.voxel_size_um)
    centers = [(share[c].nonzero() * share[c][share[c] > 0][:, None]).sum(0) / share[c].sum() for c in (0, 1)]
    volume_um3 = share.sum(dim=(1, 2, 3)) * voxel_um.prod()
    for channel, radius in enumerate((9.0, 4.5)):
        raw = (ball(9.0, source_um)[channel] > 0).sum() * np.prod(source_um)
        assert float(volume_um3[channel]) == pytest.approx(raw, rel=0.05)
        assert raw == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.15)
    # middle to middle; an odd number of copied voxels has none in an even cube
    halfway = 0.5 if record.step == (1, 1, 1) else 0.0
    torch.testing.assert_close(centers[0].float(), torch.full((3,), 15.5), atol=halfway + 0.02, rtol=0)
    torch.testing.assert_close((centers[1] - centers[0]) * voxel_um, torch.tensor([0.0, 2.0, 0.0]), atol=0.2, rtol=0)


def test_a_voxel_size_that_differs_by_rounding_is_the_same():
    processor = VolumeProcessor(sample_size=12, voxel_size_um=0.65)
    cell = masked_cell()
    cube, record = processor.preprocess_with_record(cell, (0.65, 0.6500001, 0.6499))
    assert torch.equal(cube, VolumeProcessor(sample_size=12).preprocess(cell))
    assert record.step == (1, 1, 1) and record.voxel_size_um == (0.65, 0.65, 0.65)


def test_crops_are_taken_as_they_are_without_a_voxel_size():
    processor = VolumeProcessor(sample_size=12)
    cube, record = processor.preprocess_with_record(masked_cell(), 0.3)
    assert record.voxel_size_um == (0.3, 0.3, 0.3) and torch.equal(cube, processor.preprocess(masked_cell()))
    assert processor.voxel_size_um is None and processor.preprocess_with_record(masked_cell())[1].voxel_size_um is None


@pytest.mark.parametrize(
    ("wanted", "given", "match"),
    [
        (1.0, None, "known voxel size.*write_volume.*None to take all crops"),
        (None, (2.0, 0.5, 0.5), r"cubic voxels, got \(2.0, 0.5, 0.5\).*resampled to, for example 2.0"),
        (None, (1.0, 1.01, 1.0), "cubic voxels"),
        (None, 0.0, "voxel_size_um"),
        (1.0, (1.0, 1.0), "voxel_size_um"),
        (0.1, 1.0, r"at most 12³ voxels, got \(60, 80, 100\)"),
        (650.0, 0.65, "at least one voxel .*Check the units"),
    ],
)
def test_voxel_sizes_that_would_change_the_scale_are_refused(wanted, given, match):
    with pytest.raises(ValueError, match=match):
        VolumeProcessor(sample_size=12, voxel_size_um=wanted).preprocess(masked_cell(), given)


def test_the_record_says_how_far_each_cell_was_shrunk():
    processor = VolumeProcessor(sample_size=16, voxel_size_um=1.0, oversize="rescale")
    sizes = {}
    for radius in (4.0, 10.0, 20.0):
        cube, record = processor.preprocess_with_record(ball(radius, (1.0, 0.5, 0.5)), (1.0, 0.5, 0.5))
        sizes[radius] = record.voxel_size_um
        volume_um3 = float(((cube[0] + 1) / 2).sum()) * np.prod(record.voxel_size_um)
        assert volume_um3 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.15)  # at the recorded size
    assert sizes[4.0] == (1.0, 1.0, 1.0)
    assert sizes[10.0] == pytest.approx((21 / 16,) * 3)  # z is the longest: 21 voxels of 1 µm
    assert sizes[20.0] == pytest.approx((41 / 16,) * 3)


# what the record says


@pytest.mark.parametrize("oversize", ["error", "crop"])
def test_where_voxels_are_copied_the_record_says_from_where(oversize):
    crop = np.pad(masked_cell((2, 4, 8, 12)), ((0, 0), (1, 2), (3, 0), (0, 4)))
    processor = VolumeProcessor(8 if oversize == "crop" else 12, normalization="minmax", oversize=oversize)
    cube, record = processor.preprocess_with_record(crop, 0.4)
    assert record.shape == crop.shape[1:] and record.dtype == crop.dtype.name and record.step == (1.0, 1.0, 1.0)
    assert record.voxel_size_um == (0.4, 0.4, 0.4)
    padded = np.pad(crop, ((0, 0), (20, 20), (20, 20), (20, 20)))
    box = tuple(slice(int(start) + 20, int(start) + 20 + cube.shape[-1]) for start in record.start)
    for channel, (low, high) in enumerate(record.intensity_ranges):
        intensities = low + (cube[channel].numpy() + 1) / 2 * (high - low)
        np.testing.assert_allclose(intensities, padded[channel][box], atol=1e-3)


@pytest.mark.parametrize("source_um", [(0.5, 0.5, 0.5), (1.5, 0.4, 0.4), (2.0, 1.0, 0.7)])
@pytest.mark.parametrize(("sample_size", "oversize"), [(32, "error"), (16, "rescale")])
def test_the_record_says_where_a_resampled_cell_was(source_um, sample_size, oversize):
    crop = np.pad(ball(9.0, source_um), ((0, 0), (0, 3), (5, 0), (1, 9)))
    processor = VolumeProcessor(sample_size, normalization="minmax", voxel_size_um=1.0, oversize=oversize)
    cube, record = processor.preprocess_with_record(crop, source_um)
    for channel in range(2):
        weights = (cube[channel].numpy() + 1) / 2
        for axis in range(3):
            other_axes = tuple(other for other in range(3) if other != axis)
            middles = []
            for volume in (weights, crop[channel].astype(float)):
                profile = volume.sum(axis=other_axes)
                middles.append((profile * np.arange(len(profile))).sum() / profile.sum())
            in_crop = record.start[axis] + record.step[axis] * middles[0]
            assert abs(in_crop - middles[1]) * source_um[axis] < 0.1 * record.voxel_size_um[axis]
            assert record.step[axis] * source_um[axis] == pytest.approx(record.voxel_size_um[axis])


def test_the_record_is_plain_data():
    crop = ball(5.0, (1.0, 0.5, 0.5))
    record = VolumeProcessor(sample_size=16, voxel_size_um=1.0).preprocess_with_record(crop, (1.0, 0.5, 0.5))[1]
    read_back = json.loads(json.dumps(dataclasses.asdict(record)))
    assert read_back["intensity_ranges"] == [[0, 200], [0, 200]] and read_back["voxel_size_um"] == [1.0, 1.0, 1.0]


# what is refused


def with_value(value):
    cell = masked_cell().astype(np.float32)
    cell[1, 2, 3, 4] = value
    return cell


def with_empty_nucleus(value=0):
    cell = masked_cell()
    cell[1] = value
    return cell


@pytest.mark.parametrize(
    ("volume", "match"),
    [
        (masked_cell()[0], r"2 channels, z, y, x, got shape \(6, 8, 10\)"),
        (masked_cell()[None], "2 channels, z, y, x"),
        (masked_cell()[:, :0], "2 channels, z, y, x"),
        (masked_cell()[:1], r"Expected 2 channels \(cell, nucleus\).*\(1, 6, 8, 10\)"),
        (masked_cell((3, 6, 8, 10)), "Expected 2 channels"),
        (masked_cell().swapaxes(0, 1), "Expected 2 channels"),
        (with_value(np.nan), "finite"),
        (with_value(np.inf), "finite"),
        (masked_cell().astype(np.complex64), "complex64"),
        (masked_cell().astype(object), "object"),
        (masked_cell() * 0, r"contrast in channel 0 \(cell\), got all background"),
        (with_empty_nucleus(), r"contrast in channel 1 \(nucleus\), got all background"),
        (with_empty_nucleus(7), r"all background \(every voxel is 7\)"),
        (np.where(masked_cell() > 128, 1.7e308, -1.7e308), "Expected contrast"),
    ],
)
def test_preprocess_refuses(volume, match):
    with pytest.raises(ValueError, match=match):
        VolumeProcessor(sample_size=12).preprocess(volume)


def test_fixed_range_above_the_cell_is_refused():
    processor = VolumeProcessor(sample_size=12, normalization="fixed", intensity_range=(300, 400))
    with pytest.raises(ValueError, match="nothing is above 300.*Lower `intensity_range`"):
        processor.preprocess(masked_cell())


@pytest.mark.parametrize(
    "options",
    [
        {"sample_size": 0},
        {"sample_size": -4},
        {"num_channels": 3},
        {"num_channels": 0, "channel_names": ()},
        {"normalization": "zscore"},
        {"percentiles": (50, 50)},
        {"percentiles": (-1, 99)},
        {"normalization": "fixed"},
        {"intensity_range": (0, 255)},
        {"normalization": "fixed", "intensity_range": (255, 0)},
        {"normalization": "fixed", "intensity_range": [(0, 1)] * 3},
        {"voxel_size_um": 0},
        {"voxel_size_um": (1.0, 1.0)},
        {"oversize": "ignore"},
    ],
)
def test_bad_configuration_is_refused(options):
    with pytest.raises(ValueError, match="`"):
        VolumeProcessor(**options)
