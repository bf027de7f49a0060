"""BYOC inference (section 3.2, "Final assembly"): noise to latents (eq. 13), latents to codes, codes to cells."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import BaseGuidance, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..data import VolumeProcessor
from ..models import DualChannelUNet3D, MultiCodebookVQModel, TextureUNet3D
from . import schedulers
from .class_labels import prepare_class_labels, read_class_labels, whole_number
from .conditions import prepare_conditions, read_conditions
from .fit import check_fit
from .given_channels import GivenChannels, begin, check_given_channels, read_given_channels, return_given
from .guidance import guide, leave_out, prepare_guidance_scale
from .interpolation import path_batches
from .lora import BYOCLoraLoaderMixin
from .texture import add_texture


@dataclass
class BYOCPipelineOutput(BaseOutput):
    """What a call returns.

    Args:
        volumes: (num_samples, M, D, H, W) in [0, 1]; or latents, for `output_type="latent"`.
        extrapolated: for each name in the call's `conditions`, whether each sample's value lies beyond those that the
            model was trained on; None where the call has no conditions.
    """

    volumes: np.ndarray | torch.Tensor
    extrapolated: dict[str, list[bool]] | None = None


class BYOCPipeline(DiffusionPipeline, BYOCLoraLoaderMixin):
    """Generate multichannel volumes of single cells.

    Args:
        vqvae: autoencoder between volumes and latents.
        unet: denoiser of the latents.
        scheduler: any of `USABLE_SCHEDULERS`, with the prediction type that `unet` was trained for.
        texture_unet: draws what the codes cannot carry into decoded volumes; `None` leaves them as decoded, as in the
            paper.
        texture_scheduler: of flow matching, for `texture_unet`; `make_texture_scheduler` makes the one that draws
            texture in eight steps.
        default_num_inference_steps: denoising steps where a call names none; saved with the pipeline.
        default_num_texture_steps: steps of the texture, likewise.
        prediction_type: what `unet` was trained to predict: "epsilon" (the noise), "v_prediction" or "sample"; `None`
            takes the scheduler's word for it.
        noise_schedule: how much noise `unet` was trained to find at which timestep, the part of a scheduler's
            configuration that says so; `None` takes the scheduler's.
        label2id: names of the classes (drugs), for `class_labels`; `None` for a model without names.
        volume_processor_config: configuration of the `VolumeProcessor` the training volumes went through, with the
            voxel size that they had; see `volume_processor`.
        guider: any of diffusers' guiders (`ClassifierFreeGuidance`, `AdaptiveProjectedGuidance`, `AutoGuidance`, ...),
            in place of `guidance_scale`; `None` for none.
        default_guidance_scale: `guidance_scale` of a call that names none and has conditions.
        conditions: names, scale and range of the numbers that the model was trained on beside classes, as
            `measure_conditions` makes them; `None` for none.
        num_distilled_steps: denoising steps that `unet` was distilled to, the only ones that it is for; `None` for a
            U-Net that takes any.
        distilled_scheduler: diffusers' class whose steps these are: "DDIMScheduler" or "DDPMScheduler".

    Raises:
        ValueError: if the components, or what the configuration says of them, do not fit together.

    Source: BYOC, section 3.2.
    """

    model_cpu_offload_seq = "unet->vqvae->texture_unet"
    _optional_components = ["texture_unet", "texture_scheduler", "guider"]
    _callback_tensor_inputs = ["latents"]
    _guidance_scale = 1.0

    def __init__(
        self,
        vqvae: MultiCodebookVQModel,
        unet: DualChannelUNet3D,
        scheduler: DDPMScheduler,
        texture_unet: TextureUNet3D | None = None,
        texture_scheduler: DPMSolverMultistepScheduler | None = None,
        default_num_inference_steps: int = 1000,
        default_num_texture_steps: int = 8,
        prediction_type: str | None = None,
        noise_schedule: dict | None = None,
        label2id: dict[str, int] | None = None,
        volume_processor_config: dict | None = None,
        guider: BaseGuidance | None = None,
        default_guidance_scale: float = 1.0,
        conditions: list[dict] | None = None,
        num_distilled_steps: int | None = None,
        distilled_scheduler: str = "DDIMScheduler",
    ):
        super().__init__()
        self.register_modules(
            vqvae=vqvae,
            unet=unet,
            scheduler=scheduler,
            texture_unet=texture_unet,
            texture_scheduler=texture_scheduler,
            guider=guider,
        )
        if prediction_type is None:
            prediction_type = scheduler.config.get("prediction_type", "epsilon")
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_num_texture_steps=default_num_texture_steps,
            prediction_type=prediction_type,
            noise_schedule=schedulers.noise_schedule(scheduler) if noise_schedule is None else noise_schedule,
            label2id=label2id,
            # without its private keys: "_use_default_values" makes `from_config` forget what was changed since
            volume_processor_config=volume_processor_config
            and {key: value for key, value in volume_processor_config.items() if not key.startswith("_")},
            default_guidance_scale=default_guidance_scale,
            conditions=conditions,
            num_distilled_steps=num_distilled_steps,
            distilled_scheduler=distilled_scheduler,
        )
        check_fit(self)

    @property
    def volume_processor(self) -> VolumeProcessor:
        """What the training volumes went through, and generated ones come out of.

        `volume_processor.voxel_size_um` is the (z, y, x) edge of a generated voxel in µm, None if it was never known;
        `volume_processor.preprocess` makes real crops comparable with generated cells.
        """
        if self.config.volume_processor_config is not None:
            return VolumeProcessor.from_config(dict(self.config.volume_processor_config))
        config = self.vqvae.config
        return VolumeProcessor(config.sample_size, config.num_channels, tuple(config.channel_names))

    @property
    def components(self) -> dict:
        """The parts that the pipeline has, by name; an optional one that it has not is no part of it."""
        return {name: part for name, part in super().components.items() if part is not None}

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the latest call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Of the latest call; 1 is no guidance."""
        return self._guidance_scale

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
        given_channels: GivenChannels | None = None,
    ) -> torch.Tensor:
        """What the U-Net makes of the latents at one step: the place where conditions and guidance come in.

        Args:
            latents: (B, M*n, d, h, w) float32, in the scheduler's units.
            timestep: scalar, of the scheduler's `timesteps`.
            class_labels: of the U-Net, for a model with classes.
            conditions: of the U-Net, for a model of numbers.
            given_channels: seen clean in place of their latents; what is predicted of them has no meaning.

        Returns:
            (B, M*n, d, h, w) float32, of the pipeline's `prediction_type`.
        """
        model_input = self.scheduler.scale_model_input(latents, timestep)
        given = {"class_labels": class_labels, "conditions": conditions, "given_channels": given_channels}
        given = {name: condition for name, condition in given.items() if condition is not None}
        without = leave_out(given, self.unet)

        def ask(given_channels: GivenChannels | None = None, **given: torch.Tensor | None) -> torch.Tensor:
            sample, time = model_input, timestep
            if given_channels is not None:
                sample, time = given_channels.place(sample, time)
            return self.unet(sample.to(self.unet.dtype), time, **given, return_dict=False)[0].float()

        if self.guider is not None:
            return guide(self.guider, self.unet, ask, given, without)
        prediction = ask(**given)
        if not given or self.guidance_scale == 1:
            return prediction
        return torch.lerp(ask(**without), prediction, self.guidance_scale)  # beyond 1 away from that without them

    @torch.no_grad()
    def __call__(
        self,
        num_samples: int | None = None,
        class_labels: int | str | list[int | str] | None = None,
        num_inference_steps: int | None = None,
        num_texture_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[["BYOCPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
        given_channels: Mapping[str, Any] | None = None,
        keep_given: bool = False,
        strength: float | None = None,
    ) -> BYOCPipelineOutput | tuple:
        """Generate cells, or what is missing of them.

        Args:
            num_samples: how many; `None` makes as many as there are `class_labels`, `latents`, generators,
                `conditions` or volumes in `given_channels`, or one.
            class_labels: the class (drug) of every cell, or a list with one for each: an index, or a name in the
                pipeline's `label2id`; or (num_samples, number of classes) weights, a mixture of drugs. Required of a
                model with classes that was trained without leaving them out.
            num_inference_steps: denoising steps; `None` takes the pipeline's `default_num_inference_steps`.
            num_texture_steps: steps of the texture; `None` takes the pipeline's `default_num_texture_steps`, 0 leaves
                the cells as decoded.
            generator: one random generator, or one per sample.
            latents: (num_samples, M*n, d, h, w) standard normal noise to start from, instead of `generator`.
            output_type: "np", "pt", or "latent" for the denoised, normalised latents.
            return_dict: return `BYOCPipelineOutput`, or a plain tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step; what it
                returns replaces the tensors.
            callback_on_step_end_tensor_inputs: names of the tensors it gets, among `_callback_tensor_inputs`.
            conditions: name -> value of each number that the model was trained on, in its own unit
                (``{"dose_um": 2.5}``), for all cells or for each. Values beyond those of the training are allowed;
                the output says so. Required like `class_labels`.
            guidance_scale: how far the prediction moves away from the one without class and conditions: 1 not at all,
                more makes what is typical of them stronger and cells more alike. Of models trained with a
                `conditioning_dropout_prob`; `None` takes the pipeline's `default_guidance_scale`. In a call with
                neither class nor conditions, away from the prediction without `given_channels`.
            given_channels: name -> volumes (num_samples, D, H, W) in [0, 1], as the pipeline returns them, or one
                (D, H, W) for all cells. The other channels are generated to go with them. Of models trained with a
                `channel_timesteps_prob`; with `strength`, of all.
            keep_given: return the given volumes as they came; otherwise as the autoencoder encodes and decodes them,
                with texture as generated ones have it.
            strength: with all channels given, the share of the denoising steps that change them, in (0, 1]: little
                changes details, 1 leaves nothing of them.

        Returns:
            `volumes` (num_samples, M, D, H, W) in [0, 1], M as in the autoencoder's `channel_names`; `extrapolated`.

        Raises:
            ValueError: for arguments that fit neither each other nor the model.
        """
        # 1. check
        class_labels = read_class_labels(class_labels)
        volumes_given = {} if given_channels is None else read_given_channels(self.vqvae.config, given_channels)
        if num_samples is None:
            lists = [x for x in (class_labels, latents, generator) if isinstance(x, (list, torch.Tensor))]
            if conditions is not None and self.config.conditions:
                lists += read_conditions(self.config.conditions, conditions).values()
            lists += volumes_given.values()
            num_samples = max(map(len, lists), default=1)
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        texture_steps = self.config.default_num_texture_steps if num_texture_steps is None else num_texture_steps
        self.check_inputs(num_samples, steps, output_type, callback_on_step_end_tensor_inputs, texture_steps)
        schedulers.check_scheduler(self.scheduler, self.config.prediction_type, self.config.noise_schedule, steps)
        if self.config.num_distilled_steps is not None:
            distilled = (self.config.distilled_scheduler, self.config.num_distilled_steps)
            schedulers.check_distilled(self.scheduler, *distilled, steps)
        check_given_channels(self, volumes_given, num_samples, steps, strength, keep_given, output_type)
        device = self._execution_device
        given = {"class_labels": prepare_class_labels(self, class_labels, num_samples, device)}
        given["conditions"], extrapolated = prepare_conditions(self, conditions, num_samples, device)
        given = {name: condition for name, condition in given.items() if condition is not None}
        completes = bool(volumes_given) and strength is None
        self._guidance_scale = prepare_guidance_scale(self, guidance_scale, bool(given), completes)

        # 2. noise, what is given, and the scheduler's steps
        self.scheduler.set_timesteps(steps, device=device)
        noise = self.prepare_latents(num_samples, generator, latents, device)
        timesteps, latents, known = begin(self, volumes_given, noise, steps, strength)
        given |= {} if known is None else {"given_channels": known}
        self._num_timesteps = len(timesteps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_arguments = {"generator": generator} if takes_generator else {}

        # 3. denoise; the latents stay in float32, as some schedulers start near 20,000
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.guider is not None:
                    self.guider.set_state(step, len(timesteps), timestep)
                prediction = self.predict(latents, timestep, **given)
                changing = slice(None) if known is None else known.is_denoised
                stepped = self.scheduler.step(
                    prediction[:, changing], timestep, latents[:, changing], **step_arguments, return_dict=False
                )[0]
                latents = stepped if known is None else known.join(stepped)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = callback_on_step_end(self, step, timestep, tensors).pop("latents", latents)
                progress_bar.update()
        if not torch.isfinite(latents).all():  # some ancestral schedulers, at few steps
            raise ValueError(
                f"Expected finite latents, got NaN or infinity from {type(self.scheduler).__name__} in {steps} steps. "
                "Raise num_inference_steps, or make the scheduler with timestep_spacing='leading'."
            )

        # 4. decode: denormalise, quantise, decode
        if output_type == "latent":
            volumes = latents
        else:
            decoded = self.vqvae.decode(self.vqvae.denormalize_latents(latents)).sample
            volumes = self._add_texture(decoded, texture_steps, generator)
            volumes = self.volume_processor.postprocess(volumes, output_type)
            if keep_given:
                return_given(self, volumes_given, volumes)

        self.maybe_free_model_hooks()
        return BYOCPipelineOutput(volumes=volumes, extrapolated=extrapolated) if return_dict else (volumes,)

    @torch.no_grad()
    def reconstruct(
        self,
        volumes: torch.Tensor,
        num_texture_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Encode volumes, decode their codes, and draw texture: the best that generated cells can become.

        Args:
            volumes: (B, M, D, H, W) in [-1, 1], as `volume_processor.preprocess` makes them.
            num_texture_steps: as in a call.
            generator: one random generator, or one per sample.

        Returns:
            (B, M, D, H, W) float32 in [-1, 1].
        """
        decoded = self.vqvae.decode(self.vqvae.encode(volumes.to(self._execution_device)).latents).sample
        if num_texture_steps is None:
            num_texture_steps = self.config.default_num_texture_steps
        volumes = self._add_texture(decoded, num_texture_steps, generator)
        self.maybe_free_model_hooks()
        return volumes

    @torch.no_grad()
    def interpolate(
        self,
        num_frames: int = 16,
        class_labels: int | str | list[int | str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        num_inference_steps: int | None = None,
        num_texture_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        batch_size: int = 8,
    ) -> BYOCPipelineOutput | tuple:
        """Walk from one cell, drug or dose to another: spherical through the noise, linear through the conditions.

        Whatever else is drawn (texture, the noise of ancestral schedulers) is the same for all frames.

        Args:
            num_frames: at least 2, both ends included.
            class_labels: the class of all frames, or those of both ends; or (2, number of classes) weights of them.
            conditions: name -> value for all frames, or ``[start, end]``; `None` for none.
            num_inference_steps, num_texture_steps, output_type, return_dict: as in a call.
            generator: a list of two, one for the noise of each end, between two cells; one, whose noise all frames
                share: one cell under two drugs or doses. `None` draws another noise for each end.
            latents: (2, M*n, d, h, w) noise of both ends, or (1, M*n, d, h, w) of all frames, instead.
            guidance_scale: as in a call.
            batch_size: frames at a time.

        Returns:
            `volumes` (num_frames, M, D, H, W) in [0, 1], in order; `extrapolated`.

        Raises:
            ValueError: for arguments that fit neither each other nor the model, or if both ends are the same.

        Source: BYOC, Figure 1 (a continuous transformation between cells).
        """
        path = path_batches(self, num_frames, batch_size, class_labels, conditions, generator, latents)
        outputs = [
            self(
                **arguments,
                num_inference_steps=num_inference_steps,
                num_texture_steps=num_texture_steps,
                guidance_scale=guidance_scale,
                output_type=output_type,
            )
            for arguments in path
        ]
        volumes = [output.volumes for output in outputs]
        volumes = np.concatenate(volumes) if output_type == "np" else torch.cat(volumes)
        extrapolated = None
        if outputs[0].extrapolated is not None:
            extrapolated = {name: sum((x.extrapolated[name] for x in outputs), []) for name in outputs[0].extrapolated}
        return BYOCPipelineOutput(volumes=volumes, extrapolated=extrapolated) if return_dict else (volumes,)

    def _add_texture(self, decoded, num_texture_steps, generator) -> torch.Tensor:
        """Decoded volumes (B, M, D, H, W) with texture, if there is a network for it, in [-1, 1]."""
        if self.texture_unet is None or num_texture_steps == 0:
            return decoded.float().clamp(-1, 1)
        return add_texture(self.texture_unet, self.texture_scheduler, decoded, num_texture_steps, generator)

    def check_inputs(
        self, num_samples, num_inference_steps, output_type, callback_on_step_end_tensor_inputs, num_texture_steps=0
    ) -> None:
        """Raise `ValueError` for arguments outside their ranges."""
        if whole_number(num_samples) < 1:
            raise ValueError(f"Expected num_samples of at least 1, got {num_samples!r}. Ask for one or more cells.")
        if whole_number(num_inference_steps) < 1:
            raise ValueError(f"Expected num_inference_steps of at least 1, got {num_inference_steps!r}. Raise it.")
        if whole_number(num_texture_steps) < 0:
            raise ValueError(f"Expected num_texture_steps of at least 0, got {num_texture_steps!r}. Raise it.")
        if output_type not in ("np", "pt", "latent"):
            raise ValueError(f"Expected output_type 'np', 'pt' or 'latent', got {output_type!r}. Choose one.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"Expected callback_on_step_end_tensor_inputs among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}. Leave these out."
            )

    def prepare_latents(self, num_samples, generator, latents, device) -> torch.Tensor:
        """Initial noise (num_samples, M*n, d, h, w) in float32, standard normal."""
        config = self.unet.config
        shape = (num_samples, config.num_channels * config.latent_channels, *(config.sample_size,) * 3)
        if isinstance(generator, list) and len(generator) != num_samples:
            raise ValueError(
                f"Expected one generator, or one per sample ({num_samples}), got {len(generator)}. Match their number."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"Expected latents {shape} (num_samples, channels x latent_channels, d, h, w), got "
                f"{tuple(latents.shape)}. Change num_samples or draw latents of that shape."
            )
        return latents.to(device, torch.float32)
