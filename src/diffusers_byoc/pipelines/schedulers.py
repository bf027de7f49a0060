"""Which of diffusers' schedulers sample correctly from what a U-Net was trained for."""

from diffusers import DPMSolverMultistepScheduler


# Trained by DDPM with a cosine schedule. Each was run on the trained demo, 30 steps with "leading" spacing: mean size
# within 6 % of the phantoms'.
USABLE_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)

_CANNOT_TAKE_SAMPLES = (
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
)

# What a U-Net can be trained to predict -> the schedulers for it
SCHEDULERS_FOR = {
    "epsilon": USABLE_SCHEDULERS,
    "v_prediction": USABLE_SCHEDULERS,
    "sample": tuple(name for name in USABLE_SCHEDULERS if name not in _CANNOT_TAKE_SAMPLES),
}

# Whose steps a U-Net can be distilled to -> what these must have
DISTILLED_SCHEDULERS = {
    "DDIMScheduler": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    "DDPMScheduler": {"timestep_spacing": "trailing", "variance_type": "fixed_small"},
}

# For a texture network, which is trained by flow matching
_FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_FLOW_MATCHING_IF_CONFIGURED = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
_FOR_FLOW_MATCHING = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

# With any other spacing these give wrong samples (Heun) or diverge (PNDM), without a word.
NEEDS_LEADING_SPACING = ("HeunDiscreteScheduler", "PNDMScheduler")

# DDIM moves a cell by a whole number of timesteps, however far apart its own are. By so much of a step it may
# fall short.
_DDIM_MAY_FALL_SHORT = 0.05


def make_texture_scheduler() -> DPMSolverMultistepScheduler:
    """The scheduler for a texture network: of second order, the steps closer together where little noise is left.

    Ten of Euler's steps lose a quarter of the variance of a texture that is Gaussian, ten of these nothing, eight a
    tenth at most.
    """
    return DPMSolverMultistepScheduler(**_FOR_FLOW_MATCHING, flow_shift=0.5)


def check_texture_scheduler(scheduler) -> None:
    """Refuse a scheduler that would sample wrongly from a texture network.

    Raises:
        ValueError: naming the scheduler, and what works.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    wanted = {} if name in _FLOW_MATCHING else _FOR_FLOW_MATCHING
    if name not in _FLOW_MATCHING + _FLOW_MATCHING_IF_CONFIGURED:
        raise ValueError(
            "Expected a texture_scheduler for flow matching "
            f"({', '.join(_FLOW_MATCHING + _FLOW_MATCHING_IF_CONFIGURED)}), got {name}. "
            "Make it with diffusers_byoc.pipelines.schedulers.make_texture_scheduler()."
        )
    if any(config.get(key) != value for key, value in wanted.items()):
        raise ValueError(
            f"Expected a texture_scheduler with {_listed(wanted)} (the texture_unet was trained by flow matching), "
            f"got {name} with {_listed({key: config.get(key) for key in wanted})}. Make it with "
            f"{name}({_listed(wanted)})."
        )


def noise_schedule(scheduler) -> dict:
    """How much noise `scheduler` has at which timestep: what of its configuration a U-Net is trained for."""
    config = scheduler.config
    names = ["num_train_timesteps", "beta_schedule"]
    if config.get("beta_schedule") != "squaredcos_cap_v2":  # which alone takes no bounds
        names += ["beta_start", "beta_end", "trained_betas"]
    return {name: config.get(name) for name in names}


def check_scheduler(scheduler, prediction_type: str, trained_noise_schedule: dict, num_inference_steps: int) -> None:
    """Refuse a scheduler that would sample wrongly from a U-Net, or not at all.

    Args:
        scheduler: the scheduler.
        prediction_type: what the U-Net was trained to predict, a key of `SCHEDULERS_FOR`.
        trained_noise_schedule: `noise_schedule` of the scheduler that it was trained with.
        num_inference_steps: of the call.

    Raises:
        ValueError: naming the scheduler, what is wrong, and what works.
    """
    name = type(scheduler).__name__
    usable = SCHEDULERS_FOR[prediction_type]
    if name not in usable:
        raise ValueError(
            f"Expected a scheduler that can sample from a DDPM-trained model with prediction_type="
            f"{prediction_type!r}, got {name}. Use one of: {', '.join(usable)}."
        )
    if scheduler.config.prediction_type != prediction_type:
        raise ValueError(
            f"Expected a scheduler with prediction_type={prediction_type!r} (what the unet was trained to predict), "
            f"got {name} with prediction_type={scheduler.config.prediction_type!r}. "
            f"Make it with {name}.from_config(pipe.scheduler.config, prediction_type={prediction_type!r})."
        )
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"Expected a scheduler with use_flow_sigmas=False (the unet was trained by DDPM), got {name} with "
            f"use_flow_sigmas=True. Make it with {name}.from_config(pipe.scheduler.config, use_flow_sigmas=False)."
        )
    if noise_schedule(scheduler) != trained_noise_schedule:
        raise ValueError(
            f"Expected a scheduler with {_listed(trained_noise_schedule)} (the noise that the unet was trained for), "
            f"got {name} with {_listed(noise_schedule(scheduler))}. Make it with "
            f"{name}.from_config(pipe.scheduler.config, {_listed(trained_noise_schedule)})."
        )
    for setting in ("clip_sample", "thresholding"):
        if scheduler.config.get(setting):
            raise ValueError(
                f"Expected a scheduler with {setting}=False (latents have no bounds), got {name} with {setting}=True,"
                f" which cuts them off. Make it with {name}.from_config(pipe.scheduler.config, {setting}=False)."
            )
    spacing = scheduler.config.get("timestep_spacing")
    if name in NEEDS_LEADING_SPACING and spacing != "leading":
        raise ValueError(
            f"Expected {name} with timestep_spacing='leading', got {spacing!r}, with which it samples wrongly. "
            f"Make it with {name}.from_config(pipe.scheduler.config, timestep_spacing='leading')."
        )
    num_timesteps = scheduler.config.num_train_timesteps
    if name == "DDIMScheduler" and spacing != "leading" and num_inference_steps <= num_timesteps:
        moved, apart = num_timesteps // num_inference_steps, num_timesteps / num_inference_steps
        if apart - moved > _DDIM_MAY_FALL_SHORT * apart:
            divisors = [steps for steps in range(1, num_timesteps + 1) if num_timesteps % steps == 0]
            below = max(steps for steps in divisors if steps < num_inference_steps)
            above = min(steps for steps in divisors if steps > num_inference_steps)
            raise ValueError(
                f"Expected num_inference_steps that divide the {num_timesteps} timesteps, or fewer, got"
                f" {num_inference_steps}: timesteps {apart:.3g} apart, by which {name} moves cells only {moved}."
                f" Take {below} or {above}, or another scheduler."
            )
    if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps and num_inference_steps < 4:
        raise ValueError(
            f"Expected at least 4 num_inference_steps for the Runge-Kutta start of {name}, got {num_inference_steps}. "
            f"Raise it, or use {name}.from_config(pipe.scheduler.config, skip_prk_steps=True)."
        )


def check_distilled(scheduler, distilled_scheduler: str, num_distilled_steps: int, num_inference_steps: int) -> None:
    """Refuse what a U-Net that was distilled to few steps was not distilled for.

    Args:
        scheduler: that `check_scheduler` has accepted.
        distilled_scheduler: a key of `DISTILLED_SCHEDULERS`.
        num_distilled_steps: of the U-Net, a divisor of the scheduler's timesteps.
        num_inference_steps: of the call.

    Raises:
        ValueError: naming what was asked for, and what works.
    """
    name, wanted = type(scheduler).__name__, DISTILLED_SCHEDULERS[distilled_scheduler]
    if name != distilled_scheduler:
        raise ValueError(
            f"Expected {distilled_scheduler}, whose {num_distilled_steps} steps the unet was distilled to, got {name}."
            f" Make it with {distilled_scheduler}.from_config(pipe.scheduler.config, {_listed(wanted)})."
        )
    if any(scheduler.config[key] != value for key, value in wanted.items()):
        raise ValueError(
            f"Expected a scheduler with {_listed(wanted)} (whose steps the unet was distilled to), got {name} with "
            f"{_listed({key: scheduler.config[key] for key in wanted})}. Make it with "
            f"{name}.from_config(pipe.scheduler.config, {_listed(wanted)})."
        )
    if num_inference_steps != num_distilled_steps:
        raise ValueError(
            f"Expected {num_distilled_steps} num_inference_steps, as the unet was distilled to, got"
            f" {num_inference_steps}. Leave them out, or load a pipeline of that many steps."
        )


def _listed(settings: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))
