"""The pipeline that a training begins with: what of it a run takes, and what it cannot be used for."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import Cells
from ..models import DualChannelUNet3D, MultiCodebookVQModel
from ..models.fingerprint import fingerprint_weights
from ..optional import optional
from ..pipelines import BYOCPipeline
from ..pipelines.conditions import measure_conditions, num_condition_features
from ..pipelines.loading import hub_errors
from ..pipelines.schedulers import noise_schedule
from .train_networks import make_noise_scheduler, make_unet


# of the U-Net's configuration, what the run itself decides
MADE_HERE = {
    *("num_channels", "latent_channels", "sample_size", "num_class_embeds"),
    *("class_embed_type", "projection_class_embeddings_input_dim"),
    *("conditioning_dropout_prob", "channel_timesteps_prob"),
}


def load_pretrained(args: argparse.Namespace) -> BYOCPipeline:
    """The pipeline that the run begins with; its networks' configurations take the place of the preset's.

    Raises:
        ValueError: if its U-Net was trained to predict something else, or from other noise, if it has other channels
            than the preset names, or a codebook for each channel where one is asked for.
    """
    with hub_errors(args.pretrained):
        pipeline = BYOCPipeline.from_pretrained(args.pretrained)
    ours, theirs = diffusion_of_run(args), diffusion_of(pipeline)
    if ours != theirs and not args.reset_unet:
        raise ValueError(
            f"Expected a scheduler with {theirs}, as {args.pretrained} was trained with, got {ours}. Say so in the"
            " preset's `scheduler`, or with --prediction_type."
        )
    channel_names = list(pipeline.vqvae.config.channel_names)
    if list(args.vqvae.get("channel_names") or channel_names) != channel_names:
        raise ValueError(
            f"Expected a pipeline of the preset's channels ({', '.join(args.vqvae['channel_names'])}), got"
            f" {args.pretrained} with {', '.join(channel_names)}. Take another one, or a preset without channel_names."
        )
    for name, not_taken in (("vqvae", {"sample_size"}), ("texture_unet", {"num_channels"}), ("unet", MADE_HERE)):
        network = getattr(pipeline, name)
        if network is not None:
            config = {key: value for key, value in network.config.items() if key[0] != "_" and key not in not_taken}
            setattr(args, name, config)
    if args.share_codebook and not args.vqvae["share_codebook"]:
        raise ValueError(
            f"Expected a pipeline with one codebook for --share_codebook, got {args.pretrained} with one for each "
            "channel. Leave one of the two out."
        )
    if args.latent_scaling not in (None, pipeline.vqvae.config.latent_scaling):
        pipeline.vqvae.set_latent_statistics(None, None)
    for name in ("latent_scaling", "latent_range"):
        args.vqvae[name] = getattr(args, name) or args.vqvae[name]
        pipeline.vqvae.register_to_config(**{name: args.vqvae[name]})
    pipeline.vqvae.register_to_config(sample_size=args.sample_size)
    args.with_texture |= pipeline.texture_unet is not None
    if keeps_unet(args):
        check_same_size(args, pipeline)
        keep_conditions(args, pipeline)
    if args.train_lora:
        check_lora(args, pipeline)
    if args.stage == "distillation":
        check_distillation(args, pipeline)
    return pipeline


def diffusion_of_run(args: argparse.Namespace) -> dict[str, Any]:
    """What its U-Net predicts, and from which noise."""
    scheduler = make_noise_scheduler(args)
    return {"prediction_type": scheduler.config.prediction_type} | noise_schedule(scheduler)


def diffusion_of(pipeline: BYOCPipeline) -> dict[str, Any]:
    return {"prediction_type": pipeline.config.prediction_type} | pipeline.config.noise_schedule


def load_weak_unet(
    args: argparse.Namespace, vqvae: MultiCodebookVQModel, names: Sequence[str], conditions: list[dict] | None
) -> DualChannelUNet3D:
    """The U-Net of the pipeline `args.weak_unet`, away from which that of the run is to move.

    Args:
        args: of the run.
        vqvae: of the run.
        names: of its classes.
        conditions: that its U-Net is told, as the pipeline knows them.

    Raises:
        ValueError: if it was trained on other latents, noise, classes or conditions than the run is.
    """
    with hub_errors(args.weak_unet):
        weak = BYOCPipeline.from_pretrained(args.weak_unet)
    with torch.device("meta"):
        unet = make_unet(args, vqvae, len(names), num_condition_features(conditions or ()))
    statistics = ("latent_scaling", "latents_mean", "latents_std")
    differing = {
        "an autoencoder": fingerprint_weights(weak.vqvae) != fingerprint_weights(vqvae),
        "statistics of the latents": any(weak.vqvae.config[name] != vqvae.config[name] for name in statistics),
        "inputs": any(
            weak.unet.config[name] != unet.config[name] for name in MADE_HERE - {"conditioning_dropout_prob"}
        ),
        "conditions": (weak.config.conditions or None) != (conditions or None),
        "a scheduler": diffusion_of(weak) != diffusion_of_run(args),
        "classes": args.class_conditional and class_names(weak) != list(names),
    }
    for name, differs in differing.items():
        if differs:
            raise ValueError(
                f"Expected a --weak_unet with {name} as this run has, got others in {args.weak_unet}. Train it with"
                f" --pretrained {args.pretrained} --reset_unet on the same cells."
            )
    return weak.unet


def keeps_unet(args: argparse.Namespace) -> bool:
    """Whether the U-Net of the pipeline is trained as it is, with the classes and conditions that it knows."""
    return args.train_lora or args.stage == "distillation"


def keep_conditions(args: argparse.Namespace, pipeline: BYOCPipeline) -> None:
    """Make `class_conditional` and `condition_columns` those of the pipeline, or refuse other columns."""
    args.class_conditional = pipeline.unet.config.num_class_embeds is not None
    names = [condition["name"] for condition in pipeline.config.conditions or ()]
    if args.condition_columns and sorted(args.condition_columns) != sorted(names):
        raise ValueError(
            f"Expected --condition_columns {names}, as {args.pretrained} was trained on, got {args.condition_columns}."
            " Leave them out."
        )
    args.condition_columns = names


def what_is_dropped(args: argparse.Namespace, pipeline: BYOCPipeline) -> dict[str, str]:
    """What the U-Net of `pipeline` is told and that of the run is not, by the argument that would keep it."""
    config, names = pipeline.unet.config, [condition["name"] for condition in pipeline.config.conditions or ()]
    dropped = {}
    if config.num_class_embeds is not None and not args.class_conditional:
        dropped["--class_conditional"] = "its class"
    if names and not args.condition_columns:
        dropped[f"--condition_columns {' '.join(names)}"] = f"its {', '.join(names)}"
    if config.channel_timesteps_prob > 0 and not args.channel_timesteps_prob:
        dropped[f"--channel_timesteps_prob {config.channel_timesteps_prob:g}"] = "a timestep for each channel"
    return dropped


def check_lora(args: argparse.Namespace, pipeline: BYOCPipeline) -> None:
    """Refuse what an adapter of `pipeline` cannot be trained with."""
    optional("peft", "lora")
    if (Path(args.output_dir) / "vqvae").is_dir():
        raise ValueError(
            f"Expected an --output_dir of its own for the adapter, got {args.output_dir}, which holds a pipeline or"
            " its autoencoder. Choose another."
        )
    if pipeline.config.num_distilled_steps is not None:
        raise ValueError(
            f"Expected a pipeline that takes any number of steps for --train_lora, got {args.pretrained}, distilled to"
            f" {pipeline.config.num_distilled_steps}. Adapt the one it was distilled from."
        )
    if args.class_conditional != (args.lora_class is not None):
        wanted = f"among {', '.join(class_names(pipeline))}" if args.class_conditional else "left out"
        raise ValueError(
            f"Expected --lora_class {wanted} for the classes of {args.pretrained}, got {args.lora_class}. The adapter"
            " begins as that class, which is the one to ask for with it."
        )
    if args.class_conditional and args.lora_class not in class_names(pipeline):
        raise ValueError(
            f"Expected --lora_class among {', '.join(class_names(pipeline))}, got {args.lora_class}. Choose the most"
            " similar one."
        )


def check_distillation(args: argparse.Namespace, pipeline: BYOCPipeline) -> None:
    """Refuse what `pipeline` cannot be the teacher of; `num_teacher_steps` of a progressive one becomes a number."""
    num_steps, distilled = args.num_distilled_steps, pipeline.config.num_distilled_steps
    is_progressive = args.distillation_method == "progressive"
    if pipeline.config.prediction_type == "epsilon":
        raise ValueError(
            f"Expected a U-Net that predicts v or the sample for few steps, got {args.pretrained}, which predicts the"
            " noise: of pure noise it says nothing. Train the diffusion with --prediction_type v_prediction."
        )
    num_timesteps = pipeline.config.noise_schedule["num_train_timesteps"]
    if num_timesteps % num_steps:
        raise ValueError(
            f"Expected --num_distilled_steps that divide the {num_timesteps} timesteps, got {num_steps}. Give 1, 2, 4"
            " or 8."
        )
    if distilled is not None and not (is_progressive and pipeline.config.distilled_scheduler == "DDIMScheduler"):
        raise ValueError(
            f"Expected a teacher that takes any number of steps for --distillation_method {args.distillation_method},"
            f" got {args.pretrained}, distilled to {distilled} of {pipeline.config.distilled_scheduler}. Name the one"
            " that it was distilled from."
        )
    if not is_progressive:
        return
    args.num_teacher_steps = args.num_teacher_steps or distilled or 32
    if distilled not in (None, args.num_teacher_steps):
        raise ValueError(
            f"Expected --num_teacher_steps {distilled}, which {args.pretrained} was distilled to, got"
            f" {args.num_teacher_steps}. Leave them out."
        )
    if args.num_teacher_steps <= num_steps or (distilled is not None and distilled % num_steps):
        raise ValueError(
            f"Expected a teacher of a multiple of --num_distilled_steps {num_steps}, got one of"
            f" {args.num_teacher_steps}. Give fewer steps, or another teacher."
        )


def check_same_size(args: argparse.Namespace, pipeline: BYOCPipeline) -> None:
    sample_size = pipeline.unet.config.sample_size * pipeline.vqvae.downsampling_factor
    if args.sample_size != sample_size:
        raise ValueError(
            f"Expected --sample_size {sample_size}, as {args.pretrained} has, got {args.sample_size}. Give the same."
        )


def in_known_classes(args: argparse.Namespace, pipeline: BYOCPipeline, cells: Cells) -> Cells:
    """`cells` in the classes of `pipeline`; for an adapter in the one that it changes, which is then called like them.

    Raises:
        ValueError: if `pipeline` does not know the class of a cell.
    """
    if pipeline.unet.config.num_class_embeds is None:
        return cells
    names = class_names(pipeline)
    if args.train_lora:
        label = names.index(args.lora_class)
        names[label] = ", ".join(sorted({cells.class_names[label] for label in cells.labels}))
        return cells.with_classes(names, [label] * len(cells.class_names))
    if unknown := sorted(set(cells.class_names) - set(names)):
        raise ValueError(
            f"Expected cells of {', '.join(names)}, which {args.pretrained} knows, got {', '.join(unknown)}. Choose"
            " among the cells with --label."
        )
    return cells.with_classes(names, [names.index(name) for name in cells.class_names])


def measure_or_take_conditions(
    args: argparse.Namespace, cells: Cells, pretrained: BYOCPipeline | None
) -> list[dict] | None:
    """The numbers that the U-Net is told: by the scale that `pretrained` knows them, if it does; None for none.

    Raises:
        ValueError: if they teach nothing, or are not those of a U-Net that is kept.
    """
    if not args.condition_columns:
        return None
    known = (pretrained and pretrained.config.conditions) or []
    theirs = {condition["name"]: len(condition["mean"]) for condition in known}
    ours = {name: values.shape[1] for name, values in cells.conditions.items()}
    if ours == theirs:
        return known
    if keeps_unet(args):
        raise ValueError(
            f"Expected conditions of as many numbers as {args.pretrained} takes, {theirs}, got {ours}. Correct the"
            " columns."
        )
    return measure_conditions(cells.conditions)


def class_names(pipeline: BYOCPipeline) -> list[str]:
    """Names of a pipeline's classes in the order of their indices; the index where there is no name."""
    names = {index: name for name, index in (pipeline.config.label2id or {}).items()}
    return [names.get(index, str(index)) for index in range(pipeline.unet.config.num_class_embeds)]
