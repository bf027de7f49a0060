"""Which of diffusers' schedulers sample correctly from a model trained by DDPM with a cosine schedule."""

# Each was run on the trained demo, 30 steps with "leading" spacing: mean size within 6 % of the phantoms'.
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

# With any other spacing these give wrong samples (Heun) or diverge (PNDM), without a word.
_NEEDS_LEADING_SPACING = ("HeunDiscreteScheduler", "PNDMScheduler")


def check_scheduler(scheduler, prediction_type: str, num_inference_steps: int) -> None:
    """Refuse a scheduler that would sample wrongly from a model trained to predict `prediction_type`, or not at all.

    Raises:
        ValueError: naming the scheduler, what is wrong, and what works.
    """
    name = type(scheduler).__name__
    if name not in USABLE_SCHEDULERS:
        raise ValueError(
            f"Expected a scheduler that can sample from a DDPM-trained model, got {name}. "
            f"Use one of: {', '.join(USABLE_SCHEDULERS)}."
        )
    if scheduler.config.prediction_type != prediction_type:
        raise ValueError(
            f"Expected a scheduler with prediction_type={prediction_type!r} (what the unet was trained to predict), "
            f"got {name} with prediction_type={scheduler.config.prediction_type!r}. "
            f"Make it with {name}.from_config(pipe.scheduler.config)."
        )
    spacing = scheduler.config.get("timestep_spacing")
    if name in _NEEDS_LEADING_SPACING and spacing != "leading":
        raise ValueError(
            f"Expected {name} with timestep_spacing='leading', got {spacing!r}, with which it samples wrongly. "
            f"Make it with {name}.from_config(pipe.scheduler.config, timestep_spacing='leading')."
        )
    if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps and num_inference_steps < 4:
        raise ValueError(
            f"Expected at least 4 num_inference_steps for the Runge-Kutta start of {name}, got {num_inference_steps}. "
            f"Raise it, or use {name}.from_config(pipe.scheduler.config, skip_prk_steps=True)."
        )
