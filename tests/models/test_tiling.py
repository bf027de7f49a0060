import pytest
import torch
import torch.nn.functional as F

from diffusers_byoc.models.tiling import blend_tiles


def double(volume):
    return F.interpolate(volume, scale_factor=2.0, mode="nearest")


def halve(volume):
    return F.max_pool3d(volume, 2)


@pytest.mark.parametrize(("function", "scale"), [(double, 2), (halve, 0.5), (torch.square, 1)])
@pytest.mark.parametrize("shape", [(8, 8, 8), (12, 8, 20), (10, 14, 6), (4, 4, 4)])
def test_a_pointwise_function_is_the_same_in_tiles(function, scale, shape):
    volume = torch.randn(2, 3, *shape)
    tiled = blend_tiles(function, volume, tile_size=8, overlap=2, scale=scale)
    torch.testing.assert_close(tiled, function(volume), atol=1e-6, rtol=1e-5)


def test_one_tile_is_exact_and_computed_once():
    calls = []

    def function(volume):
        calls.append(tuple(volume.shape))
        return volume.sin()

    volume = torch.randn(1, 2, 8, 6, 8)
    assert torch.equal(blend_tiles(function, volume, tile_size=8, overlap=2, scale=1), volume.sin())
    assert calls == [(1, 2, 8, 6, 8)]


def test_no_tile_is_larger_than_asked_for():
    sizes = []

    def function(volume):
        sizes.append(max(volume.shape[2:]))
        return volume

    blend_tiles(function, torch.randn(1, 1, 20, 9, 13), tile_size=8, overlap=3, scale=1)
    assert len(sizes) == 4 * 2 * 2
    assert max(sizes) == 8


def test_tiles_fade_into_each_other():
    values = iter([0.0, 1.0])
    tiled = blend_tiles(lambda tile: torch.full_like(tile, next(values)), torch.zeros(1, 1, 12, 1, 1), 8, 4, 1)
    profile = tiled.flatten()
    torch.testing.assert_close(profile[4:8], torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert (profile[:4] == 0).all()
    assert (profile[8:] == 1).all()
