import numpy as np
import pytest
import torch
from diffusers import AutoModel, DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_byoc import WGAN, BaselinePipeline, VolumeProcessor
from diffusers_byoc.baselines import GANOutput
from diffusers_byoc.data import read_volume
from diffusers_byoc.evaluation import autoencoder_of, channel_names_of, has_classes
from diffusers_byoc.pipelines.generation import generate_cells


def make_pipeline(**config):
    torch.manual_seed(0)
    return BaselinePipeline(WGAN(sample_size=8, latent_dim=4, base_channels=4).eval(), **config)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_volumes_are_the_models_in_the_unit_interval():
    pipeline = make_pipeline()
    volumes = pipeline(3, generator=seeded()).volumes
    assert volumes.shape == (3, 2, 8, 8, 8) and volumes.dtype == np.float32
    expected = pipeline.model(torch.randn(3, 4, generator=seeded())).sample.detach() / 2 + 0.5
    np.testing.assert_allclose(volumes, expected, atol=1e-6)
    (plain,) = pipeline(3, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(plain, torch.from_numpy(volumes))


def test_each_sample_has_its_own_generator():
    pipeline = make_pipeline()
    both = pipeline(2, generator=[seeded(1), seeded(2)]).volumes
    for index, seed in enumerate((1, 2)):
        np.testing.assert_allclose(both[index], pipeline(generator=seeded(seed)).volumes[0], atol=1e-6)


def test_latents_can_be_given():
    pipeline, latents = make_pipeline(), torch.randn(2, 4)
    np.testing.assert_array_equal(pipeline(2, latents=latents).volumes, pipeline(2, latents=latents).volumes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "Expected num_samples of at least 1, got 0"),
        ({"num_samples": 2, "num_inference_steps": 5}, "as WGAN makes cells in one pass, got 5. Leave it out"),
        ({"num_samples": 2, "generator": [seeded()]}, r"Expected one generator, or one per sample \(2\), got 1"),
        ({"num_samples": 2, "latents": torch.zeros(1, 4)}, r"Expected latents \(2, 4\), got \(1, 4\)"),
        ({"output_type": "pil"}, "Expected `output_type` 'np' or 'pt', got 'pil'"),
    ],
)
def test_arguments_that_fit_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**arguments)


def test_save_and_load(tmp_path):
    config = dict(VolumeProcessor(sample_size=8, percentiles=(1.0, 99.0)).config) | {"voxel_size_um": (1.0, 1.0, 1.0)}
    pipeline = make_pipeline(volume_processor_config=config)
    pipeline.save_pretrained(tmp_path)
    expected = pipeline(2, generator=seeded()).volumes
    for loaded in (BaselinePipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        assert type(loaded) is BaselinePipeline and type(loaded.model) is WGAN and loaded.unet is None
        assert loaded.volume_processor.voxel_size_um == (1.0, 1.0, 1.0)
        assert tuple(loaded.volume_processor.config.percentiles) == (1.0, 99.0)
        np.testing.assert_array_equal(loaded(2, generator=seeded()).volumes, expected)
    assert type(AutoModel.from_pretrained(str(tmp_path), subfolder="model")) is WGAN
    assert '"diffusers_byoc"' in (tmp_path / "model_index.json").read_text()


def test_without_a_processor_it_has_the_models_sizes_and_names():
    processor = make_pipeline().volume_processor
    assert processor.config.sample_size == 8 and processor.voxel_size_um is None
    assert tuple(processor.config.channel_names) == ("cell", "nucleus")


def test_an_evaluation_knows_what_it_is():
    pipeline = make_pipeline()
    assert channel_names_of(pipeline) == ("cell", "nucleus")
    assert not has_classes(pipeline) and autoencoder_of(pipeline) is None


def test_a_series_of_cells_is_kept_for_the_same_weights_alone(tmp_path):
    pipeline = make_pipeline()
    paths = generate_cells(pipeline, tmp_path, 3, batch_size=2, suffix=".npz")
    cells = [read_volume(path).data for path in paths]
    paths[1].unlink()
    generate_cells(pipeline, tmp_path, 3, suffix=".npz")
    np.testing.assert_array_equal(read_volume(paths[1]).data, cells[1])
    with torch.no_grad():
        pipeline.model.generator.project.bias.add_(1.0)
    with pytest.raises(ValueError, match="of the same weights, got others"):
        generate_cells(pipeline, tmp_path, 4, suffix=".npz")


# ---------------------------------------------------------------------- of diffusion models


class Halves(ModelMixin, ConfigMixin):
    """Decodes a latent, once 0.2 is added to it, to a volume of itself, halved."""

    latent_shape = (2, 4, 4, 4)

    @register_to_config
    def __init__(self, sample_size: int = 4, num_channels: int = 2, channel_names: tuple = ("cell", "nucleus")):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def denormalize_latents(self, latents):
        return latents + 0.2

    def decode(self, latents):
        return GANOutput(sample=self.scale * latents)


class Points(ModelMixin, ConfigMixin):
    """Takes all that is not `target` for noise."""

    latent_shape = (2, 4, 4, 4)

    @register_to_config
    def __init__(self, target: float = 0.6):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))
        self.scheduler = None

    def forward(self, sample, timestep):
        alpha = self.alphas[timestep]
        return GANOutput(sample=(sample - alpha.sqrt() * self.config.target) / (1 - alpha).sqrt())


def test_a_denoiser_and_its_scheduler_take_noise_to_latents():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    unet = Points()
    unet.alphas = scheduler.alphas_cumprod
    pipeline = BaselinePipeline(Halves(), unet, scheduler, default_num_inference_steps=10)
    pipeline.set_progress_bar_config(disable=True)
    volumes = pipeline(2, generator=seeded()).volumes
    np.testing.assert_allclose(volumes, 0.5 * (0.6 + 0.2) / 2 + 0.5, atol=1e-3)
    assert len(pipeline.scheduler.timesteps) == 10
    pipeline(2, num_inference_steps=3, generator=seeded())
    assert len(pipeline.scheduler.timesteps) == 3
    with pytest.raises(ValueError, match="Expected num_inference_steps of at least 1, got 0"):
        pipeline(2, num_inference_steps=0)
    with pytest.raises(ValueError, match="Expected num_inference_steps of at least 1, got None"):
        BaselinePipeline(Halves(), unet, scheduler)(2)


def test_a_denoiser_needs_its_scheduler():
    with pytest.raises(ValueError, match="Expected unet and scheduler, or neither, got a unet alone"):
        BaselinePipeline(Halves(), Points())


def test_a_denoiser_of_other_latents_is_refused():
    unet = Points()
    unet.latent_shape = (3, 4, 4, 4)
    with pytest.raises(ValueError, match=r"for the model's latents \(2, 4, 4, 4\), got one for \(3, 4, 4, 4\)"):
        BaselinePipeline(Halves(), unet, DDPMScheduler())
