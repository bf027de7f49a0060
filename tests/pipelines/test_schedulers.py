import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler, PNDMScheduler
from diffusers.utils import is_scipy_available, is_torchsde_available

from diffusers_byoc import USABLE_SCHEDULERS, BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.pipelines.schedulers import SCHEDULERS_FOR


# Every other scheduler class of diffusers that reads a DDPM configuration
UNUSABLE_SCHEDULERS = (
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDPMParallelScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "RePaintScheduler",
    "SCMScheduler",
    "TCDScheduler",
)


# diffusers' schedulers are not yet ready for NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def make_pipeline(**scheduler_config):
    torch.manual_seed(0)
    vqvae = MultiCodebookVQModel(
        latent_channels=2, num_vq_embeddings=8, block_out_channels=(8, 8), layers_per_block=1, sample_size=8
    )
    vqvae.initialize_codebooks(torch.randn(2, 4, 4, 4, 4))
    unet = DualChannelUNet3D(latent_channels=2, sample_size=4, block_out_channels=(8,), layers_per_block=1)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, **scheduler_config)
    pipeline = BYOCPipeline(vqvae.eval(), unet.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def from_config(name, pipeline):
    scheduler_class = getattr(diffusers, name)
    leading = {"timestep_spacing": "leading"} if name in ("HeunDiscreteScheduler", "PNDMScheduler") else {}
    return scheduler_class.from_config(pipeline.scheduler.config, **leading)


@pytest.mark.parametrize("name", USABLE_SCHEDULERS)
def test_usable_schedulers_sample_before_and_after_saving(name, tmp_path):
    if name == "DPMSolverSDEScheduler" and not is_torchsde_available():
        pytest.skip("DPMSolverSDEScheduler needs torchsde")
    if name == "LMSDiscreteScheduler" and not is_scipy_available():
        pytest.skip("LMSDiscreteScheduler needs scipy")
    pipeline = make_pipeline()
    pipeline.scheduler = from_config(name, pipeline)

    def sample(pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        arguments = {"num_inference_steps": 12, "generator": generators, "output_type": "latent"}
        torch.manual_seed(0)
        return pipe(num_samples=2, **arguments).volumes

    latents = sample(pipeline)
    assert latents.shape == (2, 4, 4, 4, 4)
    assert torch.isfinite(latents).all()
    assert latents[0].std() > 0
    pipeline.save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler).__name__ == name
    if name != "DPMSolverSDEScheduler":  # its Brownian motion has a seed of its own
        torch.testing.assert_close(sample(loaded), latents)


def test_one_scheduler_object_serves_call_after_call():
    pipeline = make_pipeline()
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        pipeline.scheduler = from_config(name, pipeline)
        first, again = (
            pipeline(num_inference_steps=4, generator=torch.Generator().manual_seed(0)).volumes for _ in range(2)
        )
        assert (first == again).all()


@pytest.mark.parametrize("name", UNUSABLE_SCHEDULERS)
def test_unusable_schedulers_are_refused_with_the_list_of_usable_ones(name):
    if name == "CosineDPMSolverMultistepScheduler" and not is_torchsde_available():
        pytest.skip("CosineDPMSolverMultistepScheduler needs torchsde")
    pipeline = make_pipeline()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=f"got {name}") as error:
        pipeline(num_inference_steps=2)
    for usable in USABLE_SCHEDULERS:
        assert usable in str(error.value)


def test_a_scheduler_that_diverges_says_so():
    pipeline = make_pipeline()
    pipeline.scheduler = from_config("KDPM2AncestralDiscreteScheduler", pipeline)
    with pytest.raises(ValueError, match="KDPM2AncestralDiscreteScheduler in 4 steps.*leading"):
        pipeline(num_inference_steps=4)
    pipeline.scheduler = diffusers.KDPM2AncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading"
    )
    pipeline(num_inference_steps=4)


@pytest.mark.parametrize("scheduler_class", [HeunDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_schedulers_that_need_leading_spacing_say_so(scheduler_class, spacing):
    pipeline = make_pipeline()
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    with pytest.raises(ValueError, match=f"timestep_spacing='leading', got '{spacing}'"):
        pipeline(num_inference_steps=4)


@pytest.mark.parametrize(("steps", "below", "above"), [(150, 125, 200), (400, 250, 500), (600, 500, 1000)])
def test_ddim_refuses_steps_that_its_timesteps_do_not_allow(steps, below, above):
    """It moves a cell by 1000 // 400 = 2, where the timesteps are 2.5 apart: measured, the cells are then wrong."""
    pipeline = make_pipeline(timestep_spacing="trailing")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=f"got {steps}: .*DDIMScheduler.* Take {below} or {above}"):
        pipeline(num_inference_steps=steps)
    with pytest.raises(ValueError, match="cannot be larger than"):  # as diffusers says
        pipeline(num_inference_steps=1500)
    pipeline(num_inference_steps=30)  # falls short by a hundredth of a step
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline(num_inference_steps=400)


def test_pndm_needs_four_steps_for_its_start():
    pipeline = make_pipeline()
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="at least 4 num_inference_steps.*PNDMScheduler, got 3"):
        pipeline(num_inference_steps=3)
    pipeline(num_inference_steps=4)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    pipeline(num_inference_steps=3)


def test_another_prediction_type_than_the_models_is_refused():
    pipeline = make_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type='epsilon'.*got DDIMScheduler.*'v_prediction'"):
        pipeline(num_inference_steps=2)


def test_the_prediction_type_is_remembered_by_the_saved_pipeline(tmp_path):
    pipeline = make_pipeline(prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    loaded(num_inference_steps=2)
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, prediction_type="epsilon")
    with pytest.raises(ValueError, match="'v_prediction'.*got DDIMScheduler with prediction_type='epsilon'"):
        loaded(num_inference_steps=2)


@pytest.mark.parametrize("name", USABLE_SCHEDULERS)
def test_a_model_of_samples_is_sampled_or_its_scheduler_refused(name):
    if name == "DPMSolverSDEScheduler" and not is_torchsde_available():
        pytest.skip("DPMSolverSDEScheduler needs torchsde")
    if name == "LMSDiscreteScheduler" and not is_scipy_available():
        pytest.skip("LMSDiscreteScheduler needs scipy")
    pipeline = make_pipeline(prediction_type="sample")
    pipeline.scheduler = from_config(name, pipeline)
    if name in SCHEDULERS_FOR["sample"]:
        assert torch.isfinite(pipeline(num_inference_steps=12, output_type="latent").volumes).all()
    else:
        with pytest.raises(ValueError, match=f"prediction_type='sample', got {name}. Use one of: DDPMScheduler, "):
            pipeline(num_inference_steps=12)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"beta_schedule": "linear"}, "beta_end=0.02, beta_schedule='linear', beta_start=0.0001"),
        ({"num_train_timesteps": 500}, "beta_schedule='squaredcos_cap_v2', num_train_timesteps=500. "),
    ],
)
def test_another_noise_schedule_than_the_models_is_refused(changes, got, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    pipeline = BYOCPipeline.from_pretrained(tmp_path)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    with pytest.raises(ValueError, match="schedule='squaredcos_cap_v2', num_train_timesteps=1000 .*got DDIM") as error:
        pipeline(num_inference_steps=2)
    message = str(error.value)
    assert got in message
    call = message[message.index("DDIMScheduler.from_config") :].rstrip(".")
    pipeline.scheduler = eval(call, {"DDIMScheduler": DDIMScheduler, "pipe": pipeline})  # what the message advises
    pipeline(num_inference_steps=2)


def test_defaults_of_another_scheduler_do_not_replace_the_bounds_of_a_linear_schedule():
    pipeline = make_pipeline()
    linear = DDPMScheduler(clip_sample=False)  # Heun's defaults are other ones than these
    pipeline = BYOCPipeline(pipeline.vqvae, pipeline.unet, linear)
    pipeline.scheduler = HeunDiscreteScheduler.from_config(linear.config, timestep_spacing="leading")
    with pytest.raises(ValueError, match="beta_start=0.0001.*got HeunDiscreteScheduler.*beta_start=0.00085"):
        pipeline(num_inference_steps=2)


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_cutting_latents_off_is_refused(setting):
    """`clip_sample` is diffusers' default of DDPM and DDIM: for images, which end at 1."""
    pipeline = make_pipeline()
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **{setting: True})
    with pytest.raises(ValueError, match=f"Expected a scheduler with {setting}=False"):
        pipeline(num_inference_steps=2)


def test_flow_sigmas_are_refused():
    pipeline = make_pipeline()
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config, use_flow_sigmas=True)
    with pytest.raises(ValueError, match="use_flow_sigmas=False .*got UniPCMultistepScheduler"):
        pipeline(num_inference_steps=2)


def test_a_distilled_pipeline_takes_the_steps_it_was_distilled_to(tmp_path):
    pipeline = make_pipeline()
    trailing = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline = BYOCPipeline(
        pipeline.vqvae, pipeline.unet, trailing, default_num_inference_steps=4, num_distilled_steps=4
    )
    pipeline.save_pretrained(tmp_path)
    pipeline = BYOCPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(output_type="latent")
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="Expected 4 num_inference_steps, as the unet was distilled to, got 5"):
        pipeline(num_inference_steps=5)
    for other, message in (
        (DDPMScheduler.from_config(trailing.config), "Expected DDIMScheduler, whose 4 steps .* got DDPMScheduler"),
        (DDIMScheduler.from_config(trailing.config, timestep_spacing="leading"), "got DDIMScheduler .*'leading'"),
        (DDIMScheduler.from_config(trailing.config, set_alpha_to_one=False), "got DDIM.* set_alpha_to_one=False"),
    ):
        pipeline.scheduler = other
        with pytest.raises(ValueError, match=message) as error:
            pipeline(output_type="latent")
        advised = str(error.value)
        call = advised[advised.index("DDIMScheduler.from_config") :].rstrip(".")
        pipeline.scheduler = eval(call, {"DDIMScheduler": DDIMScheduler, "pipe": pipeline})  # what the message advises
        pipeline(output_type="latent")


def test_a_pipeline_that_was_distilled_to_ancestral_steps_takes_these():
    pipeline = make_pipeline()
    trailing = DDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    parts = (pipeline.vqvae, pipeline.unet, trailing)
    distilled = {"default_num_inference_steps": 4, "num_distilled_steps": 4}
    pipeline = BYOCPipeline(*parts, **distilled, distilled_scheduler="DDPMScheduler")
    pipeline(output_type="latent")
    pipeline.scheduler = DDIMScheduler.from_config(trailing.config)
    with pytest.raises(ValueError, match="Expected DDPMScheduler, whose 4 steps .* got DDIMScheduler"):
        pipeline(output_type="latent")
    with pytest.raises(ValueError, match="Expected a distilled_scheduler among DDIMScheduler, DDPMScheduler .*'PNDM"):
        BYOCPipeline(*parts, **distilled, distilled_scheduler="PNDMScheduler")
