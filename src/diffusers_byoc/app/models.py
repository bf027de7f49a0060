"""The pipelines that the page offers: what each can do, and cells from it."""

import importlib.util
import inspect
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import diffusers
import numpy as np
import torch

from ..pipelines import BYOCPipeline
from ..pipelines.generation import cell_generator
from ..pipelines.schedulers import NEEDS_LEADING_SPACING, SCHEDULERS_FOR


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Limits:
    """What one click may ask for.

    Args:
        num_cells: at a time, and frames of a morph.
        num_evaluations: of the U-Net, cells times steps.
    """

    num_cells: int = 16
    num_evaluations: int = 1600


@dataclass(frozen=True)
class Request:
    """What one click asks for; `None` is the pipeline's own.

    Args:
        num_cells: how many.
        label: name of a class; None for none.
        scheduler: name of a class of diffusers.
        steps: denoising steps.
        use_texture: draw texture, if the pipeline can.
        guidance_scale: of the call, if the pipeline can.
        conditions: name -> number.
        seed: of the series: cell i of a seed is the same as `byoc-generate`'s.
    """

    num_cells: int = 1
    label: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    use_texture: bool = True
    guidance_scale: float | None = None
    conditions: dict[str, float] = field(default_factory=dict)
    seed: int = 0


class Model:
    """A pipeline, and what of the page it can serve, read off its configuration and the arguments of its methods.

    Args:
        name: folder or name on the Hub, for people.
        pipeline: with the scheduler that it is saved with.
    """

    def __init__(self, name: str, pipeline: BYOCPipeline):
        self.name, self.pipeline = name, pipeline
        self.own_scheduler = pipeline.scheduler
        self._lock = threading.Lock()  # a pipeline keeps the state of its call, its scheduler's too
        lengths = {condition["name"]: len(condition["mean"]) for condition in self.conditions}
        if any(length > 1 for length in lengths.values()) and not self.can_lack_conditions:
            raise ValueError(
                f"Expected conditions that are numbers, got vectors of {lengths} in {name}. Use it from Python."
            )

    @cached_property
    def _arguments(self) -> set[str]:
        return set(inspect.signature(self.pipeline.__call__).parameters)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """M names."""
        return tuple(self.pipeline.volume_processor.config.channel_names)

    @property
    def voxel_size_um(self) -> tuple[float, float, float]:
        """(z, y, x), 1 µm where the pipeline does not know."""
        return self.pipeline.volume_processor.voxel_size_um or (1.0, 1.0, 1.0)

    @property
    def labels(self) -> list[str]:
        """Names of the classes; numbers, if they have no names."""
        count = self.pipeline.unet.config.num_class_embeds or 0
        return list(self.pipeline.config.label2id or map(str, range(count)))

    @property
    def can_lack_conditions(self) -> bool:
        """Whether it makes cells of no class and no condition, too."""
        return self.pipeline.unet.config.get("conditioning_dropout_prob", 0) > 0

    @property
    def conditions(self) -> list[dict]:
        """Name and range of each condition (`mean`, `min`, `max`: lists)."""
        return list(self.pipeline.config.get("conditions") or []) if "conditions" in self._arguments else []

    @property
    def can_guide(self) -> bool:
        """Whether `guidance_scale` means anything to it."""
        guided = "guidance_scale" in self._arguments and getattr(self.pipeline, "guider", None) is None
        return guided and self.can_lack_conditions

    @property
    def can_morph(self) -> bool:
        """Whether it walks from one cell to another."""
        return hasattr(self.pipeline, "interpolate")

    @property
    def can_complete(self) -> bool:
        """Whether it makes a cell for a nucleus that is given."""
        is_trained = self.pipeline.unet.config.get("channel_timesteps_prob", 0) > 0
        return is_trained and "given_channels" in self._arguments and "nucleus" in self.channel_names

    @property
    def schedulers(self) -> list[str]:
        """Names of those that sample correctly from it, its own first."""
        own = type(self.own_scheduler).__name__
        if self.pipeline.config.get("num_distilled_steps"):
            return [own]
        names = [name for name in SCHEDULERS_FOR[self.pipeline.config.prediction_type] if name != own]
        if importlib.util.find_spec("torchsde") is None:
            names.remove("DPMSolverSDEScheduler")
        return [own, *names]

    def generate(self, request: Request) -> np.ndarray:
        """Cells.

        Returns:
            (num_cells, M, D, H, W) float32 in [0, 1].

        Raises:
            ValueError: for a request that does not fit the pipeline.
        """
        generators = [cell_generator(request.seed, index) for index in range(request.num_cells)]
        with self._lock:
            self._prepare(request)
            return self.pipeline(request.num_cells, generator=generators, **self._call(request)).volumes

    def morph(self, request: Request, start: int, end: int, end_label: str | None, num_frames: int) -> np.ndarray:
        """The way from one cell of a request to another, or to the same one under another class.

        Args:
            request: of the cells.
            start: number of the first cell in the request.
            end: number of the last.
            end_label: class of the last; None for that of the request.
            num_frames: both ends included.

        Returns:
            (num_frames, M, D, H, W) float32 in [0, 1].

        Raises:
            ValueError: if both ends are the same.
        """
        call = self._call(request)
        if end_label is not None and request.label is not None:
            call["class_labels"] = [self._class_label(request.label), self._class_label(end_label)]
        generators = [cell_generator(request.seed, index) for index in (start, end)]
        with self._lock:
            self._prepare(request)
            return self.pipeline.interpolate(
                num_frames, generator=generators[0] if start == end else generators, **call
            ).volumes

    def complete(self, request: Request, nucleus: np.ndarray) -> np.ndarray:
        """Cells for one nucleus.

        Args:
            request: as for `generate`.
            nucleus: (D, H, W) in [0, 1].

        Returns:
            (num_cells, M, D, H, W) float32 in [0, 1].
        """
        generators = [cell_generator(request.seed, index) for index in range(request.num_cells)]
        given = {"nucleus": nucleus}
        with self._lock:
            self._prepare(request)
            return self.pipeline(
                request.num_cells, generator=generators, given_channels=given, **self._call(request)
            ).volumes

    def python(self, request: Request) -> str:
        """The program that makes the cells of a request."""
        name = request.scheduler
        lines = [
            *([f"from diffusers import {name}"] if name else []),
            "from diffusers_byoc import BYOCPipeline",
            "from diffusers_byoc.pipelines.generation import cell_generator",
            "",
            f"pipe = BYOCPipeline.from_pretrained({self.name!r})",
        ]
        if name:
            options = "".join(f", {key}={value!r}" for key, value in _spacing(name).items())
            lines.append(f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{options})")
        arguments = "".join(f", {key}={value!r}" for key, value in self._call(request).items())
        lines += [
            f"generators = [cell_generator({request.seed}, index) for index in range({request.num_cells})]",
            f"cells = pipe({request.num_cells}, generator=generators{arguments}).volumes",
        ]
        return "\n".join(lines)

    def _prepare(self, request: Request) -> None:
        """A scheduler without the traces of another call."""
        scheduler = getattr(diffusers, request.scheduler) if request.scheduler else type(self.own_scheduler)
        self.pipeline.scheduler = scheduler.from_config(self.own_scheduler.config, **_spacing(request.scheduler))

    def _call(self, request: Request) -> dict:
        """What a request says beyond number and seed, as arguments that this pipeline has."""
        arguments = {}
        if request.label is not None:
            arguments["class_labels"] = self._class_label(request.label)
        if request.steps is not None:
            arguments["num_inference_steps"] = request.steps
        if not request.use_texture:
            arguments["num_texture_steps"] = 0
        if request.guidance_scale is not None and self.can_guide:
            arguments["guidance_scale"] = request.guidance_scale
        if request.conditions:
            arguments["conditions"] = request.conditions
        return arguments

    def _class_label(self, label: str) -> str | int:
        return label if label in (self.pipeline.config.label2id or {}) else self.labels.index(label)


class Models:
    """The pipelines by name, loaded when they are first used; the last two stay in memory.

    Args:
        names: folders and names on the Hub.
        is_open: accept other names on the Hub, too.
        dtype: of the networks.
    """

    def __init__(self, names: Sequence[str], is_open: bool = False, dtype: torch.dtype = torch.float32):
        self.names, self.is_open, self.dtype = list(names), is_open, dtype
        self._loaded: dict[str, Model] = {}
        self._lock = threading.Lock()

    def load(self, name: str) -> Model:
        """The model of that name.

        Raises:
            ValueError: if it is not offered.
            OSError: if there is none, or it cannot be read.
        """
        is_hub_name = _HUB_NAME.fullmatch(str(name)) and not Path(name).exists()
        if name not in self.names and not (self.is_open and is_hub_name):
            other = ", or the name of another one on the Hub (owner/name)" if self.is_open else ""
            known = ", ".join(self.names)
            raise ValueError(f"Expected one of the pipelines {known}{other}, got {name!r}. Choose one.")
        with self._lock:
            if name not in self._loaded:
                pipeline = BYOCPipeline.from_pretrained(name, dtype=self.dtype)
                pipeline.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
                pipeline.set_progress_bar_config(desc="Denoising")
                self._loaded[name] = Model(name, pipeline)
            model = self._loaded.pop(name)
            self._loaded = {**dict(list(self._loaded.items())[-1:]), name: model}
            return model


def check_request(request: Request, limits: Limits) -> None:
    """Refuse what is too much for a page, or no request at all.

    Raises:
        ValueError: saying what may be asked for.
    """
    if not 1 <= request.num_cells <= limits.num_cells:
        raise ValueError(
            f"Expected 1 to {limits.num_cells} cells, got {request.num_cells}. Use byoc-generate for more."
        )
    if request.steps is None or not request.steps >= 1:
        raise ValueError(f"Expected at least 1 step, got {request.steps}. Raise it.")
    if request.num_cells * request.steps > limits.num_evaluations:
        raise ValueError(
            f"Expected at most {limits.num_evaluations} cells x steps, got {request.num_cells} x {request.steps}. Take"
            " fewer cells or steps, or use byoc-generate."
        )
    if not 0 <= request.seed <= _MAX_SEED:
        raise ValueError(f"Expected a seed from 0 to {_MAX_SEED}, got {request.seed}. Choose another.")


def _spacing(scheduler: str | None) -> dict:
    return {"timestep_spacing": "leading"} if scheduler in NEEDS_LEADING_SPACING else {}
