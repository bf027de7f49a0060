import pytest
import torch

from diffusers_byoc import TextureUNet3D
from diffusers_byoc.models.texture import from_cubes, to_cubes


TINY = {"block_out_channels": (8, 16), "layers_per_block": (1, 1)}


def model(**changes):
    torch.manual_seed(0)
    network = TextureUNet3D(**(TINY | changes)).eval()
    for parameter in network.parameters():  # the last layers begin at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize("shape", [(8, 8, 8), (4, 8, 12)])
@torch.no_grad()
def test_the_velocity_has_the_shape_of_the_texture(num_channels, shape):
    network = model(num_channels=num_channels)
    sample, reconstruction = torch.randn(2, 2, num_channels, *shape)
    output = network(sample, torch.tensor([10.0, 900.0]), reconstruction).sample
    assert output.shape == sample.shape
    assert torch.equal(network(sample, torch.tensor([10.0, 900.0]), reconstruction, return_dict=False)[0], output)


def test_cubes_hold_neighbouring_voxels_and_come_back():
    volumes = torch.arange(2 * 3 * 4 * 6 * 8.0).view(2, 3, 4, 6, 8)
    cubes = to_cubes(volumes)
    assert cubes.shape == (2, 24, 2, 3, 4)
    assert set(cubes[0, 8:16, 1, 2, 3].tolist()) == set(volumes[0, 1, 2:4, 4:6, 6:8].flatten().tolist())
    assert torch.equal(from_cubes(cubes), volumes)


@torch.no_grad()
def test_a_crop_is_to_it_what_the_whole_is():
    """Nothing is normalised over the volume: far from a crop's border the velocity is that of the whole."""
    network = model()
    sample, reconstruction = torch.randn(2, 1, 2, 68, 68, 68)
    whole = network(sample, 500, reconstruction).sample
    inner = (..., slice(4, 64), slice(4, 64), slice(4, 64))
    crop = network(sample[inner], 500, reconstruction[inner]).sample
    difference = (crop - whole[inner]).abs()
    assert difference[..., 28:32, 28:32, 28:32].max() < 1e-4  # it sees 26 voxels far
    assert difference[..., :4, :4, :4].max() > 1e-2


@torch.no_grad()
def test_time_and_reconstruction_matter():
    network = model()
    sample, reconstruction = torch.randn(2, 1, 2, 8, 8, 8)
    output = network(sample, 500, reconstruction).sample
    assert not torch.allclose(output, network(sample, 600, reconstruction).sample, atol=1e-4)
    assert not torch.allclose(output, network(sample, 500, reconstruction + 0.1).sample, atol=1e-4)


def test_texture_is_undone_and_background_stays_background():
    network = model(texture_scale=0.2, background_margin=0.1)
    volumes, reconstruction = torch.rand(2, 1, 2, 4, 4, 4) * 2 - 1
    volumes[:, :, 0] = -1
    texture = network.texture(volumes, reconstruction)
    assert torch.allclose(network.apply_texture(reconstruction, texture), volumes, atol=1e-6)
    wrong = texture + 0.4 * torch.rand_like(texture)  # within the margin
    assert (network.apply_texture(reconstruction, wrong)[:, :, 0] == -1).all()


def test_an_untrained_network_says_zero():
    network = TextureUNet3D(**TINY)
    assert not network(torch.randn(1, 2, 4, 4, 4), 3, torch.randn(1, 2, 4, 4, 4)).sample.any()


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        network = model().train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        torch.manual_seed(1)
        sample, reconstruction = torch.randn(2, 1, 2, 8, 8, 8)
        network(sample, 5, reconstruction).sample.square().mean().backward()
        gradients.append(network.conv_in.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_it_is_saved_and_loaded(tmp_path):
    network = model(texture_scale=0.25)
    network.save_pretrained(tmp_path)
    loaded = TextureUNet3D.from_pretrained(tmp_path)
    assert loaded.config.texture_scale == 0.25
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sample", "reconstruction", "message"),
    [
        ((1, 3, 8, 8, 8), (1, 3, 8, 8, 8), r"Expected sample and reconstruction \(B, 2, D, H, W\)"),
        ((1, 2, 8, 8, 8), (1, 2, 4, 8, 8), "Expected sample and reconstruction"),
        ((1, 2, 6, 8, 8), (1, 2, 6, 8, 8), "Expected axes divisible by 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(sample, reconstruction, message):
    with pytest.raises(ValueError, match=message):
        model()(torch.zeros(sample), 0, torch.zeros(reconstruction))


def test_layers_must_fit_the_resolutions():
    with pytest.raises(ValueError, match="Expected 2 layers_per_block"):
        TextureUNet3D(block_out_channels=(8, 16), layers_per_block=(1,))


def test_the_velocity_is_the_sample_by_a_gain_plus_a_shift():
    network = TextureUNet3D(2, (8,), (1,)).eval()
    with torch.no_grad():
        network.conv_out.bias[:16].fill_(0.25)  # 2 channels in cubes of 8 voxels: the shift
        network.conv_out.bias[16:].fill_(-2.0)
    sample, reconstruction = torch.randn(1, 2, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8)
    velocity = network(sample, 500, reconstruction).sample
    torch.testing.assert_close(velocity, 0.25 - 2.0 * sample)
    assert TextureUNet3D(2, (8,), (1,), voxel_gain=False).conv_out.out_channels == 16
