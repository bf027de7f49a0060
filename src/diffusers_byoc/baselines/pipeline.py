"""Volumes from a trained baseline, by the interface of `BYOCPipeline`."""

import inspect

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor

from ..data import VolumeProcessor
from ..pipelines import BYOCPipelineOutput


class BaselinePipeline(DiffusionPipeline):
    """Generate multichannel volumes of single cells with one of the models that BYOC is compared with.

    A model that makes volumes in one pass (`WGAN`, `AlphaGAN`, `HAGAN`) is `model` alone: `model.latent_shape` is the
    shape of its noise, and `model(latents).sample` the volumes in [-1, 1]. A diffusion model (MedicalDiffusion) has
    a `unet` too, with `unet.latent_shape` and `unet(latents, timestep).sample`, and a `scheduler`; the volumes are
    `model.decode(model.denormalize_latents(latents)).sample` of denoised latents.

    Args:
        model: makes volumes; its configuration has `sample_size`, `num_channels` and `channel_names`.
        unet: denoiser of the model's latents, or `None`.
        scheduler: of the denoising, with `unet` and only with it.
        default_num_inference_steps: denoising steps where a call names none; saved with the pipeline.
        volume_processor_config: configuration of the `VolumeProcessor` the training volumes went through, with the
            voxel size that they had; see `volume_processor`.

    Raises:
        ValueError: for a `unet` without `scheduler`, or the reverse, or for other latents than the model's.
    """

    model_cpu_offload_seq = "unet->model"
    _optional_components = ["unet", "scheduler"]

    def __init__(
        self,
        model: ModelMixin,
        unet: ModelMixin | None = None,
        scheduler: DDPMScheduler | None = None,
        default_num_inference_steps: int | None = None,
        volume_processor_config: dict | None = None,
    ):
        super().__init__()
        if (unet is None) != (scheduler is None):
            given, missing = ("scheduler", "unet") if unet is None else ("unet", "scheduler")
            raise ValueError(f"Expected unet and scheduler, or neither, got a {given} alone. Give the {missing} too.")
        if unet is not None and model is not None and tuple(unet.latent_shape) != tuple(model.latent_shape):
            raise ValueError(
                f"Expected a unet for the model's latents {tuple(model.latent_shape)}, got one for"
                f" {tuple(unet.latent_shape)}. Use the files that were saved together."
            )
        self.register_modules(model=model, unet=unet, scheduler=scheduler)
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            # without its private keys: "_use_default_values" makes `from_config` forget what was changed since
            volume_processor_config=volume_processor_config
            and {key: value for key, value in volume_processor_config.items() if not key.startswith("_")},
        )

    @property
    def volume_processor(self) -> VolumeProcessor:
        """What the training volumes went through, and generated ones come out of; as in `BYOCPipeline`."""
        if self.config.volume_processor_config is not None:
            return VolumeProcessor.from_config(dict(self.config.volume_processor_config))
        config = self.model.config
        return VolumeProcessor(config.sample_size, config.num_channels, tuple(config.channel_names))

    @property
    def components(self) -> dict:
        """The parts that the pipeline has, by name; an optional one that it has not is no part of it."""
        return {name: part for name, part in super().components.items() if part is not None}

    @torch.no_grad()
    def __call__(
        self,
        num_samples: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> BYOCPipelineOutput | tuple:
        """Generate cells.

        Args:
            num_samples: how many.
            num_inference_steps: denoising steps of a diffusion model; `None` takes the pipeline's
                `default_num_inference_steps`.
            generator: one random generator, or one per sample.
            latents: (num_samples, *latent_shape) standard normal noise to start from, instead of `generator`.
            output_type: "np" or "pt".
            return_dict: return `BYOCPipelineOutput`, or a plain tuple.

        Returns:
            `volumes` (num_samples, M, D, H, W) float32 in [0, 1], M as in the model's `channel_names`.

        Raises:
            ValueError: for arguments that fit neither each other nor the model.
        """
        # 1. check
        if isinstance(num_samples, bool) or not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
            raise ValueError(f"Expected num_samples of at least 1, got {num_samples!r}. Ask for one or more cells.")
        if self.unet is None and num_inference_steps is not None:
            raise ValueError(
                f"Expected no num_inference_steps, as {type(self.model).__name__} makes cells in one pass, got"
                f" {num_inference_steps}. Leave it out."
            )
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        if self.unet is not None and not (steps and steps >= 1):
            raise ValueError(f"Expected num_inference_steps of at least 1, got {steps}. Raise it.")
        device = self._execution_device

        # 2. noise
        latents = self.prepare_latents(num_samples, generator, latents, device)

        # 3. denoise, where there is a denoiser
        if self.unet is None:
            volumes = self.model(latents.to(self.model.dtype)).sample
        else:
            self.scheduler.set_timesteps(steps, device=device)
            latents = latents * self.scheduler.init_noise_sigma
            takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
            arguments = {"generator": generator} if takes_generator else {}
            for timestep in self.progress_bar(self.scheduler.timesteps):
                model_input = self.scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
                prediction = self.unet(model_input, timestep).sample.float()
                latents = self.scheduler.step(prediction, timestep, latents, **arguments).prev_sample
            volumes = self.model.decode(self.model.denormalize_latents(latents)).sample

        # 4. volumes in [0, 1]
        volumes = self.volume_processor.postprocess(volumes, output_type)
        self.maybe_free_model_hooks()
        return BYOCPipelineOutput(volumes=volumes) if return_dict else (volumes,)

    def prepare_latents(self, num_samples, generator, latents, device) -> torch.Tensor:
        """Noise (num_samples, *latent_shape), float32."""
        shape = (num_samples, *(self.model if self.unet is None else self.unet).latent_shape)
        if isinstance(generator, list) and len(generator) != num_samples:
            raise ValueError(
                f"Expected one generator, or one per sample ({num_samples}), got {len(generator)}. Match their number."
            )
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"Expected latents {shape}, got {tuple(latents.shape)}. Change num_samples or draw latents of that"
                " shape."
            )
        return latents.to(device, torch.float32)
