"""What diffusers' tests ask of any model, of the three GANs."""

import pytest
import torch

from diffusers_byoc import HAGAN, WGAN, AlphaGAN


TINY = {
    WGAN: {"sample_size": 16, "latent_dim": 8, "base_channels": 4},
    AlphaGAN: {"sample_size": 16, "latent_dim": 8, "base_channels": 4, "code_hidden_size": 16},
    HAGAN: {"sample_size": 32, "latent_dim": 8, "base_channels": 16},
}
each = pytest.mark.parametrize("model_class", TINY)


def make(model_class, **changes):
    torch.manual_seed(0)
    return model_class(**(TINY[model_class] | changes)).eval()


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@each
@pytest.mark.parametrize("num_channels", [1, 3])
@torch.no_grad()
def test_noise_becomes_volumes_of_any_number_of_channels(model_class, num_channels):
    model = make(model_class, num_channels=num_channels, channel_names=tuple("abc"[:num_channels]))
    volumes = model(seeded(2, *model.latent_shape)).sample
    size = TINY[model_class]["sample_size"]
    assert volumes.shape == (2, num_channels, size, size, size)
    assert volumes.abs().max() <= 1 and volumes.std() > 1e-3
    assert torch.equal(model(seeded(2, 8), return_dict=False)[0], volumes)


@each
@torch.no_grad()
def test_a_volume_depends_on_its_noise_alone(model_class):
    model = make(model_class)
    latents = seeded(3, 8)
    together, alone = model(latents).sample, model(latents[1:2]).sample
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


@each
@torch.no_grad()
def test_save_and_load_are_identical(model_class, tmp_path):
    model = make(model_class)
    for buffer in model.buffers():  # statistics of batch norm, vectors of spectral norm
        if buffer.is_floating_point():
            buffer.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= TINY[model_class].items() and not loaded.training
    states = [network.state_dict() for network in (model, loaded)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(loaded(seeded(2, 8)).sample, model(seeded(2, 8)).sample)


@each
def test_every_parameter_of_the_generator_takes_part(model_class):
    model = make(model_class)
    model.train()
    model(seeded(2, 8)).sample.square().sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in model.named_parameters() if name.startswith("generator")}
    assert names == {name for name in expected if not name.startswith("generator.low")}  # HA-GAN's low resolution


@each
@torch.no_grad()
def test_half_precision_stays_near(model_class, tmp_path):
    model = make(model_class)
    model.save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    error = (half(seeded(2, 8).bfloat16()).sample.float() - model(seeded(2, 8)).sample).abs()
    assert error.mean() < 0.02


@each
@torch.no_grad()
def test_it_compiles_into_one_graph(model_class):
    model = make(model_class)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(seeded(2, 8)).sample, model(seeded(2, 8)).sample)


@each
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_offloading_in_groups_changes_nothing(model_class, offload_type):
    model = make(model_class)
    expected = model(seeded(2, 8)).sample
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), offload_type=offload_type, **blocks)
    assert torch.equal(model(seeded(2, 8)).sample, expected)


@each
@torch.no_grad()
def test_layerwise_casting_stays_near(model_class):
    model = make(model_class)
    expected = model(seeded(2, 8)).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters())
    assert (model(seeded(2, 8)).sample - expected).abs().mean() < 0.3 * expected.abs().mean()


@each
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": ("cell",)}, "Expected 2 channel_names, got .*Name every channel"),
        ({"sample_size": 48}, "Expected a sample_size of .*, got 48. Choose one of these"),
        ({"sample_size": 4}, "Expected a sample_size of .*, got 4. Choose one of these"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(model_class, changes, message):
    with pytest.raises(ValueError, match=message):
        make(model_class, **changes)


@each
def test_noise_of_another_length_is_refused(model_class):
    with pytest.raises(ValueError, match=r"Expected latents \(B, 8\), got \(2, 9\)"):
        make(model_class)(torch.zeros(2, 9))
