from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy import ndimage
from torch import nn

from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel, TextureUNet3D
from diffusers_byoc.pipelines.schedulers import make_texture_scheduler
from diffusers_byoc.pipelines.texture import add_texture, is_connected, largest_piece


class GaussianTexture(nn.Module):
    """The exact velocity where texture is white noise of deviation `std`: the best that any network can learn."""

    downsampling_factor, dtype = 4, torch.float32

    def __init__(self, std: float, connected_cells: bool = False):
        super().__init__()
        self.std, self.config = std, SimpleNamespace(connected_cells=connected_cells)

    def forward(self, sample, timestep, reconstruction, return_dict):
        share = timestep / 1000
        variance = (1 - share) ** 2 * self.std**2 + share**2
        return ((share - (1 - share) * self.std**2) / variance * sample,)

    def apply_texture(self, reconstruction, texture):
        return reconstruction + texture


def cell(edge=24, size=8):
    volumes = torch.full((1, 2, edge, edge, edge), -1.0)
    volumes[..., 8 : 8 + size, 8 : 8 + size, 8 : 8 + size] = 0.0
    return volumes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchHeunDiscreteScheduler(),
    UniPCMultistepScheduler(**FLOW),
    make_texture_scheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("std", [0.5, 1.5])
def test_the_flow_ends_in_the_texture_s_distribution(scheduler, std):
    volumes = cell(64, 40)
    texture = (add_texture(GaussianTexture(std), scheduler, volumes, 50, seeded()) - volumes)[..., 8:48, 8:48, 8:48]
    assert texture.std().item() == pytest.approx(std, rel=0.05)
    assert texture.mean().item() == pytest.approx(0, abs=0.05)
    neighbours = (texture[..., 1:] * texture[..., :-1]).mean() / std**2
    assert neighbours.item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("std", [0.3, 0.5, 1.0])
def test_eight_steps_keep_the_variance_of_a_texture(std):
    volumes = cell(64, 40)
    textured = add_texture(GaussianTexture(std), make_texture_scheduler(), volumes, 8, seeded())
    assert (textured - volumes)[..., 8:48, 8:48, 8:48].std().item() == pytest.approx(std, rel=0.06)


def test_texture_reaches_two_voxels_beyond_the_cell_and_no_further():
    volumes = cell(32)
    volumes[..., 8:16, 8:16, 18] = 0.0  # so that the box has background in it
    textured = add_texture(GaussianTexture(1.0), FlowMatchEulerDiscreteScheduler(), volumes + 0.01, 4, seeded())
    is_drawn = (textured != -1).any(dim=1)[0]
    assert is_drawn[6:18, 6:18, 6:21].all()
    assert is_drawn.sum() == 12 * 12 * 15
    assert textured[..., 8:16, 8:16, 8:16].std() > 0.5


def test_a_cell_in_one_channel_lets_all_have_texture():
    volumes = cell(24)
    volumes[:, 1] = -1.0
    textured = add_texture(GaussianTexture(1.0), FlowMatchEulerDiscreteScheduler(), volumes, 4, seeded())
    assert (textured[:, 1, 8:16, 8:16, 8:16] != -1).all()


def test_a_volume_without_a_cell_stays_as_it_is():
    volumes = torch.full((1, 2, 8, 8, 8), -0.99)
    textured = add_texture(GaussianTexture(1.0), FlowMatchEulerDiscreteScheduler(), volumes, 4, seeded())
    assert torch.equal(textured, volumes)


def test_what_lies_apart_is_left_out_where_cells_are_of_one_piece():
    volumes = cell(32)
    volumes[:, 0, 14:22, 14, 14] = -0.8  # a faint thread
    volumes[:, 1, 22:24, 14:16, 14:16] = 0.0  # a bead
    for connected_cells in (False, True):
        texture = GaussianTexture(0.1, connected_cells)
        textured = add_texture(texture, FlowMatchEulerDiscreteScheduler(), volumes, 4, seeded())
        assert (textured[..., 8:16, 8:16, 8:16] != -1).all()
        assert (textured[..., 16:18, 14, 14] != -1).all()
        assert (textured[..., 22:24, 14:16, 14:16] == -1).all() == connected_cells
    assert not is_connected(volumes[0]) and is_connected(cell()[0])


@pytest.mark.parametrize("neck", [-1.0, -0.5])
def test_what_texture_breaks_off_is_left_out_likewise(neck):
    """Also where a neck is left that joins decoded cells, but is fainter than cells are with texture."""

    class Darkening(GaussianTexture):
        def apply_texture(self, reconstruction, texture):
            return torch.where((reconstruction < -0.3) & (reconstruction > -0.99), neck, reconstruction)

    volumes = cell(32)
    volumes[:, 0, 14:24, 14, 14] = -0.35  # a process, bright enough to join
    volumes[:, 1, 22:24, 14:16, 14:16] = 0.0
    volumes[..., 8:16, 8:16, 8:16] = 0.0
    assert is_connected(volumes[0])
    for connected_cells in (False, True):
        texture = Darkening(1.0, connected_cells)
        textured = add_texture(texture, FlowMatchEulerDiscreteScheduler(), volumes, 2, seeded())
        assert is_connected(textured[0]) == connected_cells
        assert (textured[:, 1, 22:24, 14:16, 14:16] == -1).all() == connected_cells
        assert (textured[..., 8:16, 8:16, 8:16] == 0).all()


def test_what_lies_close_by_takes_nothing_bright_of_the_cell_with_it():
    volumes = cell(32)
    volumes[:, 0, 17, 12, 12] = 0.0  # a voxel of background between
    texture = GaussianTexture(0.0, connected_cells=True)
    textured = add_texture(texture, FlowMatchEulerDiscreteScheduler(), volumes, 2, seeded())
    torch.testing.assert_close(textured, cell(32))


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 1.0])
def test_the_largest_piece_is_that_of_scipy(share):
    mask = torch.rand(17, 20, 23, generator=seeded()) < share
    labels, number = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.flatten())[1:]
    found = largest_piece(mask).numpy()
    assert found.sum() == (sizes.max() if number else 0)
    assert len(np.unique(labels[found])) == (number > 0)


def test_a_spiral_is_of_one_piece():
    """However long the way through it."""
    mask = torch.zeros(1, 41, 41, dtype=torch.bool)
    for turn in range(10):
        low, high = 2 * turn, 40 - 2 * turn
        mask[0, low, low : high + 1] = mask[0, low : high + 1, high] = mask[0, high, low : high + 1] = True
        mask[0, low + 2 : high + 1, low] = True
        mask[0, low + 2, low : low + 3] = True
    assert torch.equal(largest_piece(mask), mask)


def test_a_sample_does_not_depend_on_those_beside_it():
    volumes = torch.cat([cell(size=4), cell(size=8), cell(size=10)])
    arguments = (GaussianTexture(1.0), FlowMatchEulerDiscreteScheduler())
    together = add_texture(*arguments, volumes, 4, [seeded(i) for i in range(3)])
    alone = add_texture(*arguments, volumes[2:], 4, [seeded(2)])
    assert torch.equal(together[2:], alone)


def make_pipeline(**components):
    torch.manual_seed(0)
    sizes = {"latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1}
    vqvae = MultiCodebookVQModel(num_vq_embeddings=16, sample_size=16, **sizes)
    vqvae.initialize_codebooks(torch.randn(4, 8, 8, 8, 8))
    nn.init.zeros_(vqvae.decoder.conv_out.bias)  # not all background
    unet = DualChannelUNet3D(sample_size=8, attention_head_dim=4, **sizes)
    components = {
        "texture_unet": TextureUNet3D(block_out_channels=(8, 16), layers_per_block=(1, 1), texture_scale=0.3).eval(),
        "texture_scheduler": FlowMatchEulerDiscreteScheduler(),
    } | components
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    arguments = {"default_num_inference_steps": 2, "default_num_texture_steps": 3}
    pipeline = BYOCPipeline(vqvae.eval(), unet.eval(), scheduler, **components, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_texture_comes_on_top_of_the_decoded_cells():
    pipeline = make_pipeline()
    decoded = pipeline(2, num_texture_steps=0, generator=seeded(), output_type="pt").volumes
    textured = pipeline(2, generator=seeded(), output_type="pt").volumes
    # untrained, its velocity is 0: the texture is the noise that it began with
    difference = (textured - decoded)[(decoded > 0.2) & (decoded < 0.8) & (textured > 0) & (textured < 1)]
    assert difference.std().item() == pytest.approx(0.15, rel=0.2)
    again = pipeline(2, num_texture_steps=3, generator=seeded(), output_type="pt").volumes
    assert torch.equal(textured, again)


def test_a_pipeline_without_texture_decodes():
    pipeline, without = make_pipeline(), make_pipeline(texture_unet=None, texture_scheduler=None)
    decoded = pipeline(2, num_texture_steps=0, generator=seeded(), output_type="pt").volumes
    assert torch.equal(without(2, generator=seeded(), output_type="pt").volumes, decoded)


def test_texture_is_saved_with_the_pipeline(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    assert loaded.config.default_num_texture_steps == 3
    loaded.set_progress_bar_config(disable=True)
    expected = pipeline(2, generator=seeded(), output_type="pt").volumes
    assert torch.equal(loaded(2, generator=seeded(), output_type="pt").volumes, expected)
    without = BYOCPipeline.from_pretrained(tmp_path, texture_unet=None, texture_scheduler=None)
    assert without.texture_unet is None


def test_reconstruct_encodes_decodes_and_draws():
    pipeline = make_pipeline()
    volumes = torch.full((2, 2, 16, 16, 16), -1.0)
    volumes[..., 4:12, 4:12, 4:12] = 0.5
    plain = pipeline.reconstruct(volumes, num_texture_steps=0)
    assert torch.equal(plain, pipeline.vqvae(volumes).sample.clamp(-1, 1))
    assert (pipeline.reconstruct(volumes, generator=seeded()) - plain).std() > 0.05


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (
            {"texture_scheduler": DPMSolverMultistepScheduler()},
            "Expected a texture_scheduler with prediction_type='flow_prediction', use_flow_sigmas=True .* got DPMSol",
        ),
        ({"texture_scheduler": None}, "Expected a texture_scheduler for flow matching .* got NoneType"),
        ({"texture_unet": TextureUNet3D(3, (8,), (1,))}, "Expected a texture_unet for .* num_channels 2, got 3"),
        ({"texture_unet": TextureUNet3D(2, (8,) * 5, (1,) * 5)}, "multiple of the texture_unet's 32, got 16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(components, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**components)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="Expected num_texture_steps of at least 0, got -1"):
        make_pipeline()(1, num_texture_steps=-1)
