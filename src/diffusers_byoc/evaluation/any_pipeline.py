"""What an evaluation asks of a pipeline, beside its call: any of diffusers whose call returns `volumes`."""

from diffusers import DiffusionPipeline

from ..models import MultiCodebookVQModel


def channel_names_of(pipeline: DiffusionPipeline) -> tuple[str, ...] | None:
    """The `channel_names` that the pipeline's configuration, or that of one of its parts, states."""
    names = (getattr(config, "channel_names", None) for config in _configs(pipeline))
    return next((tuple(found) for found in names if found), None)


def has_classes(pipeline: DiffusionPipeline) -> bool:
    """Whether a part of the pipeline is conditioned on classes (`num_class_embeds`, as in diffusers' U-Nets)."""
    return any(getattr(config, "num_class_embeds", None) for config in _configs(pipeline))


def autoencoder_of(pipeline: DiffusionPipeline) -> MultiCodebookVQModel | None:
    """The pipeline's autoencoder, if it has one of ours."""
    return next((part for part in pipeline.components.values() if isinstance(part, MultiCodebookVQModel)), None)


def _configs(pipeline: DiffusionPipeline) -> list:
    owners = (pipeline, *pipeline.components.values())
    return [owner.config for owner in owners if hasattr(owner, "config")]
