"""Whether a pipeline's components belong together: asked when it is made or loaded, not after the last step."""

import inspect
from pathlib import Path

from ..data import VolumeProcessor
from .conditions import num_condition_features
from .schedulers import DISTILLED_SCHEDULERS, SCHEDULERS_FOR, check_texture_scheduler


def check_fit(pipeline) -> None:
    """Refuse a pipeline whose parts contradict each other; parts that are None are not asked.

    Args:
        pipeline: a `BYOCPipeline`.

    Raises:
        ValueError: naming the files, or the parts, and what in them does not fit.
    """
    vqvae, unet, config = pipeline.vqvae, pipeline.unet, pipeline.config
    index = _file(vqvae, "model_index.json", parent=True)
    if config.prediction_type not in SCHEDULERS_FOR:
        raise ValueError(
            f"Expected a prediction_type among {', '.join(SCHEDULERS_FOR)} in {index}, got "
            f"{config.prediction_type!r}. Say what the "
            "unet was trained to predict, or load the pipeline with a newer version."
        )
    if config.distilled_scheduler not in DISTILLED_SCHEDULERS:
        raise ValueError(
            f"Expected a distilled_scheduler among {', '.join(DISTILLED_SCHEDULERS)} in {index}, got "
            f"{config.distilled_scheduler!r}. Say whose steps the unet was distilled to."
        )
    processor = _volume_processor(config.volume_processor_config, index)
    if vqvae is None:
        return

    sample_size = vqvae.config.sample_size
    if processor is not None:
        for name in ("sample_size", "num_channels", "channel_names"):
            theirs, ours = getattr(vqvae.config, name), getattr(processor.config, name)
            theirs, ours = (tuple(x) if isinstance(x, (list, tuple)) else x for x in (theirs, ours))
            if theirs != ours:
                raise ValueError(
                    f"Expected a volume_processor_config with the autoencoder's {name} {theirs} in {index}, got "
                    f"{ours}. Use the files that were saved together."
                )
    _check_texture(pipeline, vqvae)
    if unet is None:
        return
    unet_file, vqvae_file = _file(unet, "unet"), _file(vqvae, "vqvae")
    for name in ("num_channels", "latent_channels"):
        theirs, ours = getattr(vqvae.config, name), getattr(unet.config, name)
        if theirs != ours:
            raise ValueError(
                f"Expected a U-Net for the autoencoder's latents, {name} {theirs} ({vqvae_file}), got {ours} "
                f"({unet_file}). Use the files that were saved together."
            )
    grid = sample_size // vqvae.downsampling_factor
    if unet.config.sample_size != grid:
        raise ValueError(
            f"Expected a U-Net with sample_size {grid}, as an autoencoder for {sample_size} voxels that halves them "
            f"to 1/{vqvae.downsampling_factor} has latents of that size ({vqvae_file}), got {unet.config.sample_size} "
            f"({unet_file}). Use the files that were saved together."
        )
    ours, theirs = num_condition_features(config.conditions or ()), unet.config.projection_class_embeddings_input_dim
    if ours != (theirs or 0):
        raise ValueError(
            f"Expected conditions of {theirs or 0} numbers in {index}, as the U-Net takes ({unet_file}), got {ours}. "
            "Use the files that were saved together."
        )
    num_classes, indices = unet.config.num_class_embeds, sorted((config.label2id or {}).values())
    if num_classes is not None and indices and not (indices[0] >= 0 and indices[-1] < num_classes):
        raise ValueError(
            f"Expected a label2id with indices in [0, {num_classes}), the U-Net's classes ({unet_file}), got "
            f"{indices} in {index}. Use the files that were saved together."
        )


def _check_texture(pipeline, vqvae) -> None:
    texture_unet = pipeline.texture_unet
    if texture_unet is None:
        return
    files = f"({_file(vqvae, 'vqvae')}, {_file(texture_unet, 'texture_unet')})"
    theirs, ours = vqvae.config.num_channels, texture_unet.config.num_channels
    if theirs != ours:
        raise ValueError(
            f"Expected a texture_unet for the autoencoder's num_channels {theirs}, got {ours} {files}. Use the files "
            "that were saved together."
        )
    if vqvae.config.sample_size % texture_unet.downsampling_factor:
        raise ValueError(
            f"Expected a sample_size that is a multiple of the texture_unet's {texture_unet.downsampling_factor}, got "
            f"{vqvae.config.sample_size} {files}. Use the files that were saved together."
        )
    check_texture_scheduler(pipeline.texture_scheduler)


def _volume_processor(config: dict | None, index: str) -> VolumeProcessor | None:
    if config is None:
        return None
    try:
        unknown = sorted(set(config) - set(inspect.signature(VolumeProcessor.__init__).parameters))
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}")
        return VolumeProcessor.from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected a volume_processor_config in {index} that a VolumeProcessor can be made from, got one that it "
            f"refuses ({error}). Correct it, or save the pipeline again."
        ) from error


def _file(model, name: str, parent: bool = False) -> str:
    """Where the configuration of a model lies, or of the pipeline above it; by its `name` if it was not loaded."""
    folder = model and model.config.get("_name_or_path")
    if not folder:
        return name
    return str(Path(folder).parent / name if parent else Path(folder) / "config.json")
