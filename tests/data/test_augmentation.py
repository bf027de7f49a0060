import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_byoc.data import augment_cells, draw_augmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def positions(size):
    return torch.stack(torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 3, indexing="ij"))


def ellipsoids(num_cells=4, size=32, cell_radii=(9.0, 6.0, 12.0), nucleus_radii=(4.0, 3.0, 5.0)):
    """Smooth cells and, off their middles, smooth nuclei, of different sizes."""
    z, y, x = positions(size)
    cells = []
    for index in range(num_cells):
        channels = []
        for radii, shift in ((cell_radii, 0.0), (nucleus_radii, 3.0)):
            a, b, c = (radius * (1 - 0.05 * index) for radius in radii)
            radius = ((z / a) ** 2 + (y / b) ** 2 + ((x - shift) / c) ** 2).sqrt()
            channels.append(((1 - radius) * b).clamp(0, 1))
        cells.append(torch.stack(channels))
    return torch.stack(cells) * 2 - 1


def noise(num_cells=3, num_channels=2, size=6):
    return torch.rand(num_cells, num_channels, size, size, size, generator=generator()) * 2 - 1


def draw(volumes, seed=0, **options):
    return draw_augmentation(*volumes.shape[:2], generator(seed), **options)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.integers(1, 7))
def test_quarter_turns_move_voxels_within_their_planes(seed, num_cells, num_channels, size):
    volumes = noise(num_cells, num_channels, size)
    turned = augment_cells(volumes, *draw(volumes, seed))
    assert turned.is_contiguous()
    # the sorted values of each plane of each channel: a permutation, and z is not mixed with y and x
    assert torch.equal(turned.flatten(3).sort().values, volumes.flatten(3).sort().values)


def test_quarter_turns_are_the_eight_of_the_square_and_equally_frequent():
    square = torch.arange(4.0).reshape(1, 1, 1, 2, 2).expand(4000, 1, 2, 2, 2) / 4
    turned = augment_cells(square, *draw(square))
    plane = square[0, 0, 0]
    expected = [mirrored.rot90(turns) for mirrored in (plane, plane.T) for turns in range(4)]
    counts = [int((turned[:, 0, 0] == wanted).all(dim=(1, 2)).sum()) for wanted in expected]
    assert sum(counts) == 4000 and min(counts) > 400


@pytest.mark.parametrize("rotation", ["quarter_turns", "axial", "full"])
def test_all_channels_of_a_cell_turn_alike_and_cells_differ(rotation):
    volumes = (noise(1, 1) if rotation == "quarter_turns" else ellipsoids(1)[:, :1]).expand(16, 3, -1, -1, -1)
    turned = augment_cells(volumes, *draw(volumes, rotation=rotation))
    assert torch.equal(turned[:, :1].expand_as(turned), turned)
    assert len({cell.numpy().tobytes() for cell in turned}) > 4


@pytest.mark.parametrize("rotation", ["none", "quarter_turns", "axial", "full"])
def test_the_generator_decides(rotation):
    volumes = ellipsoids()
    untouched = volumes.clone()
    options = {"rotation": rotation, "intensity_jitter": 0.3}
    first, again, other = (augment_cells(volumes, *draw(volumes, seed, **options)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(volumes, untouched)


@pytest.mark.parametrize("rotation", ["quarter_turns", "axial", "full"])
def test_shares_of_a_batch_are_the_batch(rotation):
    volumes = ellipsoids()
    poses, gammas = draw(volumes, rotation=rotation, intensity_jitter=0.1)
    whole = augment_cells(volumes, poses, gammas)
    parts = [augment_cells(*part) for part in zip(*(x.chunk(2) for x in (volumes, poses, gammas)), strict=True)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("rotation", ["axial", "full"])
def test_a_rotated_cell_is_the_same_cell(rotation):
    volumes = ellipsoids(12)
    poses, gammas = draw(volumes, rotation=rotation)
    rotated = augment_cells(volumes, poses, gammas)
    assert rotated.amin() == -1 and rotated.amax() <= 1
    torch.testing.assert_close(
        (rotated + 1).sum(dim=(2, 3, 4)), (volumes + 1).sum(dim=(2, 3, 4)), rtol=0.03, atol=0
    )  # volume
    cell, nucleus = (rotated > 0).unbind(1)
    assert not (nucleus & ~cell).any()
    # what is at pose @ p comes to p: so do the axes of the ellipsoid, by its second moments
    for before, after, pose in zip(volumes, rotated, poses, strict=True):
        moments = [
            torch.einsum("izyx,jzyx,zyx->ij", positions(32), positions(32), v[0] + 1) / (v[0] + 1).sum()
            for v in (before, after)
        ]
        torch.testing.assert_close(moments[1], pose.T @ moments[0] @ pose, atol=0.5, rtol=0.05)


@pytest.mark.parametrize("rotation", ["axial", "full"])
def test_nothing_new_appears_around_a_rotated_cell(rotation):
    volumes = ellipsoids(12)
    poses, gammas = draw(volumes, rotation=rotation, intensity_jitter=0.5)
    rotated = augment_cells(volumes, poses, gammas)
    for index, (after, pose) in enumerate(zip(rotated, poses, strict=True)):
        came_from = torch.einsum("ij,jzyx->izyx", pose, positions(32))
        for channel, radii, shift in ((after[0], (9.0, 6.0, 12.0), 0.0), (after[1], (4.0, 3.0, 5.0), 3.0)):
            lengths = torch.tensor(radii)[:, None, None, None] * (1 - 0.05 * index)
            # an interpolated voxel sees its eight neighbours, which are less than two voxels away
            is_far = (came_from - torch.tensor([0.0, 0.0, shift])[:, None, None, None]).abs() - 2
            is_far = ((is_far.clamp(min=0) / lengths) ** 2).sum(0) > 1
            assert is_far.any() and (channel[is_far] == -1).all()


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rotation", ["quarter_turns", "full"])
def test_a_device_gives_what_the_cpu_gives(rotation):
    volumes = ellipsoids()
    draws = draw(volumes, rotation=rotation, intensity_jitter=0.2)
    device = torch.accelerator.current_accelerator()
    expected = augment_cells(volumes, *draws)
    for poses_and_gammas in (draws, [x.to(device) for x in draws]):
        on_device = augment_cells(volumes.to(device), *poses_and_gammas)
        assert on_device.device.type == device.type
        torch.testing.assert_close(on_device.cpu(), expected, atol=1e-4, rtol=0)


def test_no_voxel_goes_through_numpy(monkeypatch):
    """Which would bring a batch back from a GPU."""
    volumes = ellipsoids()
    draws = draw(volumes, rotation="full", intensity_jitter=0.2)
    for name in ("numpy", "tolist", "__array__", "cpu"):
        original = getattr(torch.Tensor, name)

        def refuse_volumes(self, *arguments, original=original, **options):
            assert self.numel() < 100
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, refuse_volumes)
    augment_cells(volumes, *draws)


def test_rotations_interpolate_what_quarter_turns_move():
    volumes = ellipsoids(1, 16, (4.0, 3.0, 6.0), (2.0, 2.0, 2.0))
    for quarter in range(4):
        angle = quarter * math.pi / 2
        cos, sin = round(math.cos(angle)), round(math.sin(angle))
        exact = torch.tensor([[[1.0, 0, 0], [0, cos, -sin], [0, sin, cos]]])
        nearly_cos, nearly_sin = math.cos(angle + 1e-4), math.sin(angle + 1e-4)
        nearly = torch.tensor([[[1.0, 0, 0], [0, nearly_cos, -nearly_sin], [0, nearly_sin, nearly_cos]]])
        gammas = torch.ones(1, 2)
        moved, interpolated = (augment_cells(volumes, poses, gammas) for poses in (exact, nearly))
        assert not torch.equal(moved, interpolated)
        torch.testing.assert_close(moved, interpolated, atol=2e-3, rtol=0)


def test_axial_rotation_leaves_every_plane_its_own():
    volumes = torch.full((8, 1, 16, 16, 16), -1.0)
    volumes[:, :, 5, 5:11, 5:9] = 1
    rotated = augment_cells(volumes, *draw(volumes, rotation="axial"))
    occupied = (rotated > -1).any(dim=(3, 4))[:, 0]
    assert occupied[:, 5].all() and occupied.sum() == 8


@pytest.mark.parametrize("rotation", ["axial", "full"])
def test_a_cell_that_would_leave_the_cube_takes_a_quarter_turn(rotation):
    volumes = torch.full((8, 2, 12, 12, 12), -1.0)
    diagonal = torch.arange(12)
    volumes[:, :, 5, diagonal, :] = 0.5  # a sheet that fills a plane up to its corners
    turned = augment_cells(volumes, *draw(volumes, rotation=rotation))
    assert torch.equal(turned.flatten(2).sort().values, volumes.flatten(2).sort().values)
    small = ellipsoids(8, 12, (2.0, 2.0, 3.0), (1.5, 1.5, 1.5))
    assert not torch.equal(
        augment_cells(small, *draw(small, rotation=rotation)).flatten(2).sort().values, small.flatten(2).sort().values
    )


def test_intensity_jitter_keeps_background_range_and_order():
    volumes = ellipsoids()
    poses, gammas = draw(volumes, rotation="none", intensity_jitter=0.2)
    assert ((gammas >= 1 / 1.2) & (gammas <= 1.2)).all() and gammas.unique().numel() == 8
    jittered = augment_cells(volumes, poses, gammas)
    assert torch.equal(jittered == -1, volumes == -1) and torch.equal(jittered == 1, volumes == 1)
    expected = ((volumes + 1) / 2) ** gammas[:, :, None, None, None] * 2 - 1
    torch.testing.assert_close(jittered, expected)
    assert torch.equal(augment_cells(volumes, *draw(volumes, rotation="none")), volumes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rotation", ["quarter_turns", "full"])
def test_any_dtype(dtype, rotation):
    volumes = ellipsoids()
    draws = draw(volumes, rotation=rotation, intensity_jitter=0.2)
    augmented = augment_cells(volumes.to(dtype), *draws)
    assert augmented.dtype == dtype and augmented.amin() == -1 and augmented.amax() <= 1
    torch.testing.assert_close(augmented.float(), augment_cells(volumes, *draws), atol=0.02, rtol=0)


def test_an_empty_cell_stays_empty():
    volumes = torch.full((2, 1, 8, 8, 8), -1.0)
    assert torch.equal(augment_cells(volumes, *draw(volumes, rotation="full", intensity_jitter=0.5)), volumes)


@pytest.mark.parametrize("options", [{"rotation": "half"}, {"intensity_jitter": -0.1}, {"intensity_jitter": 2.0}])
def test_bad_draws(options):
    with pytest.raises(ValueError, match="`"):
        draw_augmentation(2, 2, generator(), **options)


@pytest.mark.parametrize(
    ("shape", "num_poses", "gammas_shape", "match"),
    [
        ((2, 2, 4, 4, 5), 2, (2, 2), "cubes"),
        ((2, 4, 4, 4), 2, (2, 2), "cubes"),
        ((2, 2, 4, 4, 4), 3, (2, 2), "Draw them for this batch"),
        ((2, 2, 4, 4, 4), 2, (2, 3), "Draw them for this batch"),
    ],
)
def test_bad_batches(shape, num_poses, gammas_shape, match):
    with pytest.raises(ValueError, match=match):
        augment_cells(torch.zeros(shape), torch.eye(3).repeat(num_poses, 1, 1), torch.ones(gammas_shape))
