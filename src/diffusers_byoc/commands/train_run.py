"""A run of training: networks from arguments, and the stages."""

import argparse
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from diffusers import DDPMScheduler
from safetensors import SafetensorError

from ..data import Cells
from ..models import DualChannelUNet3D, MultiCodebookVQModel, TextureUNet3D
from ..models.fingerprint import fingerprint_weights
from ..optional import optional
from ..pipelines import BYOCPipeline
from ..pipelines.conditions import measure_conditions, num_condition_features
from ..pipelines.schedulers import noise_schedule
from ..training import Stage, StageSettings, fastest_precision, is_cpu_training
from ..training.checkpoints import find_checkpoint, read_record
from ..training.optimizers import optimizer_class
from ..training.settings import configuration
from ..training.stage import uses_deepspeed
from ..training.stages.autoencoder import AutoencoderSettings, train_autoencoder
from ..training.stages.diffusion import DiffusionSettings, train_diffusion
from ..training.stages.distillation import DistillationSettings, train_distillation
from ..training.stages.texture import TextureSettings, train_texture
from ..training.starting_weights import take_unet_weights
from ..whole_files import lock_folder
from .train_arguments import NETWORKS, STAGES, set_train_steps
from .training_runs import (
    check_machine,
    check_resumable,
    data_inputs,
    finish_run,
    make_settings,
    one_line_errors,
    prepare_upload,
    read_training_cells,
    start_processes,
    write_record,
)


SETTINGS = {
    "autoencoder": AutoencoderSettings,
    "texture": TextureSettings,
    "diffusion": DiffusionSettings,
    "distillation": DistillationSettings,
}
logger = get_logger(__name__, log_level="INFO")


def train(args: argparse.Namespace) -> None:
    """Train as `train_arguments.parse_args` understood the command line; mistakes end in one line."""
    state = start_processes()
    with one_line_errors(ValueError, OSError, ImportError):
        pretrained = load_pretrained(args) if args.pretrained else None
        vqvae = check_arguments(args, state.device, pretrained)
        check_stages_resumable(args, state.num_processes, dict.fromkeys(stages_of(args), run_inputs(args)))
    with one_line_errors(OSError, SafetensorError):  # a full disk, a folder in use, a checkpoint of another run
        with lock_folder(args.output_dir) if state.is_main_process else nullcontext():
            run(args, state, vqvae, pretrained)
    state.destroy_process_group()


def run(
    args: argparse.Namespace, state: PartialState, vqvae: MultiCodebookVQModel, pretrained: BYOCPipeline | None = None
) -> None:
    """The stages, the report and the upload."""
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    resumes = args.stage in ("texture", "diffusion") or args.resume_from_checkpoint is not None
    cells, held_out_cells, data = read_training_cells(args, state, vqvae.config.channel_names, resumes)
    if args.train_lora or args.stage == "distillation":
        with one_line_errors(ValueError):
            cells, held_out_cells = (
                part and in_known_classes(args, pretrained, part) for part in (cells, held_out_cells)
            )
    set_train_steps(args, len(cells), state.num_processes)
    with one_line_errors(ValueError):
        conditions = measure_or_take_conditions(args, cells, pretrained)
        sizes = (len(cells.class_names), num_condition_features(conditions or ()))
        inputs = {stage: stage_inputs(args, stage, vqvae, *sizes) | {"data": data} for stage in stages_of(args)}
    check_stages_resumable(args, state.num_processes, inputs)
    prepare_upload(args, state)
    if state.is_main_process:
        write_record(args, stages_of(args), NETWORKS, data, state.num_processes)

    if "autoencoder" in stages_of(args):
        with Stage(output_dir, "autoencoder", settings_of(args, "autoencoder"), inputs["autoencoder"]) as stage:
            vqvae = pretrained.vqvae if pretrained else make_autoencoder(args)
            vqvae = train_autoencoder(stage, vqvae, cells, held_out_cells)
    if "texture" in stages_of(args):
        settings = settings_for_autoencoder(args, "texture", vqvae)
        with Stage(output_dir, "texture", settings, inputs["texture"]) as stage:
            texture_unet = (pretrained and pretrained.texture_unet) or make_texture_unet(args, vqvae)
            train_texture(stage, texture_unet, vqvae, cells, held_out_cells)
    if "diffusion" in stages_of(args):
        texture_unet = None
        if args.with_texture:
            trained_here = (output_dir / "texture_unet").is_dir()
            texture_unet = (
                TextureUNet3D.from_pretrained(output_dir / "texture_unet") if trained_here else pretrained.texture_unet
            )
        settings = settings_for_autoencoder(args, "diffusion", vqvae)
        with Stage(output_dir, "diffusion", settings, inputs["diffusion"]) as stage:
            if args.train_lora:
                unet = pretrained.unet
            else:
                unet = make_unet(args, vqvae, *sizes)
            if pretrained and not args.train_lora:
                take_unet_weights(unet, pretrained.unet, pretrained.config.label2id, cells.class_names)
            noise_scheduler = make_noise_scheduler(args)
            train_diffusion(stage, unet, noise_scheduler, vqvae, cells, held_out_cells, texture_unet, conditions)
        if state.is_main_process:
            pipeline = BYOCPipeline.from_pretrained(args.pretrained if args.train_lora else output_dir)
            if args.train_lora:
                pipeline.load_lora_weights(output_dir)
            pipeline.to(state.device)  # what a user will load
            finish_run(args, pipeline, cells, held_out_cells, describe_training(args), started)
    if "distillation" in stages_of(args):
        settings = settings_of(args, "distillation")
        with Stage(output_dir, "distillation", settings, inputs["distillation"]) as stage:
            train_distillation(stage, pretrained, make_noise_scheduler(args), cells)
        if state.is_main_process:
            pipeline = BYOCPipeline.from_pretrained(output_dir).to(state.device)
            finish_run(args, pipeline, cells, held_out_cells, describe_training(args), started)


# ---------------------------------------------------------------------- networks and settings from arguments


def stages_of(args: argparse.Namespace) -> list[str]:
    """The stages to run, in their order."""
    stages = [stage for stage in STAGES if args.stage == stage or (args.stage == "all" and stage != "distillation")]
    return [stage for stage in stages if stage != "texture" or args.with_texture]


def settings_of(args: argparse.Namespace, stage: str) -> StageSettings:
    """Each field from the argument of its name; `STAGE_NAME` wins."""
    return make_settings(SETTINGS[stage], args, stage)


def settings_for_autoencoder(args: argparse.Namespace, stage: str, vqvae: MultiCodebookVQModel) -> StageSettings:
    """`settings_of`; after another autoencoder was trained in the same run, the stage begins anew."""
    settings = settings_of(args, stage)
    if args.stage == "all" and is_of_another_autoencoder(settings, Path(args.output_dir) / stage, vqvae):
        logger.info(f"The autoencoder is not the one that the {stage} was trained on: the {stage} begins anew.")
        settings = replace(settings, resume_from_checkpoint=None)
    return settings


def load_pretrained(args: argparse.Namespace) -> BYOCPipeline:
    """The pipeline that the run begins with; its networks' configurations take the place of the preset's.

    Raises:
        ValueError: if its U-Net was trained to predict something else, or from other noise, or if it has a codebook
            for each channel where one is asked for.
    """
    pipeline = BYOCPipeline.from_pretrained(args.pretrained)
    scheduler = make_noise_scheduler(args)
    ours = {"prediction_type": scheduler.config.prediction_type} | noise_schedule(scheduler)
    theirs = {"prediction_type": pipeline.config.prediction_type} | pipeline.config.noise_schedule
    if ours != theirs:
        raise ValueError(
            f"Expected a scheduler with {theirs}, as {args.pretrained} was trained with, got {ours}. Say so in the"
            " preset's `scheduler`, or with --prediction_type."
        )
    made_here = {"num_channels", "latent_channels", "sample_size", "num_class_embeds"}
    made_here |= {"class_embed_type", "projection_class_embeddings_input_dim", "conditioning_dropout_prob"}
    for name, not_taken in (("vqvae", {"sample_size"}), ("texture_unet", {"num_channels"}), ("unet", made_here)):
        network = getattr(pipeline, name)
        if network is not None:
            config = {key: value for key, value in network.config.items() if key[0] != "_" and key not in not_taken}
            setattr(args, name, config)
    if args.share_codebook and not args.vqvae["share_codebook"]:
        raise ValueError(
            f"Expected a pipeline with one codebook for --share_codebook, got {args.pretrained} with one for each "
            "channel. Leave one of the two out."
        )
    for name in ("latent_scaling", "latent_range"):
        args.vqvae[name] = getattr(args, name) or args.vqvae[name]
        pipeline.vqvae.register_to_config(**{name: args.vqvae[name]})
    pipeline.vqvae.register_to_config(sample_size=args.sample_size)
    args.with_texture |= pipeline.texture_unet is not None
    if args.train_lora:
        check_lora(args, pipeline)
    if args.stage == "distillation":
        check_distillation(args, pipeline)
    return pipeline


def check_lora(args: argparse.Namespace, pipeline: BYOCPipeline) -> None:
    """Refuse what an adapter of `pipeline` cannot be trained with; `class_conditional` becomes the pipeline's."""
    optional("peft", "lora")
    if (Path(args.output_dir) / "vqvae").is_dir():
        raise ValueError(
            f"Expected an --output_dir of its own for the adapter, got {args.output_dir}, which holds a pipeline or"
            " its autoencoder. Choose another."
        )
    check_same_size(args, pipeline)
    if pipeline.config.num_distilled_steps is not None:
        raise ValueError(
            f"Expected a pipeline that takes any number of steps for --train_lora, got {args.pretrained}, distilled to"
            f" {pipeline.config.num_distilled_steps}. Adapt the one it was distilled from."
        )
    args.class_conditional = pipeline.unet.config.num_class_embeds is not None
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
    """Refuse what `pipeline` cannot be the teacher of; `num_teacher_steps` becomes a number."""
    check_same_size(args, pipeline)
    num_steps, distilled = args.num_distilled_steps, pipeline.config.num_distilled_steps
    args.num_teacher_steps = args.num_teacher_steps or distilled or 32
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


def check_same_size(args: argparse.Namespace, pipeline: BYOCPipeline) -> None:
    sample_size = pipeline.unet.config.sample_size * pipeline.vqvae.downsampling_factor
    if args.sample_size != sample_size:
        raise ValueError(
            f"Expected --sample_size {sample_size}, as {args.pretrained} has, got {args.sample_size}. Give the same."
        )


def class_names(pipeline: BYOCPipeline) -> list[str]:
    """Names of a pipeline's classes in the order of their indices; the index where there is no name."""
    names = {index: name for name, index in (pipeline.config.label2id or {}).items()}
    return [names.get(index, str(index)) for index in range(pipeline.unet.config.num_class_embeds)]


def make_autoencoder(args: argparse.Namespace) -> MultiCodebookVQModel:
    return MultiCodebookVQModel(sample_size=args.sample_size, **args.vqvae)


def make_texture_unet(args: argparse.Namespace, vqvae: MultiCodebookVQModel) -> TextureUNet3D:
    return TextureUNet3D(num_channels=vqvae.config.num_channels, **args.texture_unet)


def make_unet(
    args: argparse.Namespace, vqvae: MultiCodebookVQModel, num_classes: int, num_features: int = 0
) -> DualChannelUNet3D:
    return DualChannelUNet3D(
        num_channels=vqvae.config.num_channels,
        latent_channels=vqvae.config.latent_channels,
        sample_size=args.sample_size // vqvae.downsampling_factor,
        num_class_embeds=num_classes if args.class_conditional else None,
        class_embed_type="projection" if num_features else None,
        projection_class_embeddings_input_dim=num_features or None,
        conditioning_dropout_prob=args.conditioning_dropout_prob if args.class_conditional or num_features else 0.0,
        **args.unet,
    )


def measure_or_take_conditions(
    args: argparse.Namespace, cells: Cells, pretrained: BYOCPipeline | None
) -> list[dict] | None:
    """The numbers that the U-Net is told: by the scale that `pretrained` knows them, if it does; None for none."""
    if not args.condition_columns:
        return None
    known = (pretrained and pretrained.config.conditions) or []
    sizes = {condition["name"]: len(condition["mean"]) for condition in known}
    if sizes == {name: values.shape[1] for name, values in cells.conditions.items()}:
        return known
    return measure_conditions(cells.conditions)


def make_noise_scheduler(args: argparse.Namespace) -> DDPMScheduler:
    # Nothing keeps the latents inside the codebook's range (the log says how many leave it): no clipping to it.
    schedule = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "leading"}
    return DDPMScheduler(**(schedule | args.scheduler))


def check_arguments(
    args: argparse.Namespace, device: torch.device, pretrained: BYOCPipeline | None = None
) -> MultiCodebookVQModel:
    """Find what cannot work before any training, not between the stages.

    Returns:
        The trained autoencoder for a later stage alone; otherwise one that has its configuration but no weights.
    """
    check_machine(args, device)
    optimizer_class(settings_of(args, stages_of(args)[0]))
    if uses_deepspeed():
        if is_cpu_training():
            raise ValueError("Expected GPUs for DeepSpeed, as accelerate does, got none. Use torchrun.")
        if args.stage in ("all", "autoencoder"):
            raise ValueError(
                "Expected one optimizer for DeepSpeed, got the autoencoder's two. Use it with --stage diffusion."
            )
        if (fastest_precision() if args.mixed_precision == "auto" else args.mixed_precision) == "fp16":
            raise ValueError("Expected bf16 or float32 with DeepSpeed, got fp16. Say --mixed_precision bf16 or no.")
    if args.stage == "distillation":
        return pretrained.vqvae
    trained_here = (Path(args.output_dir) / "texture_unet").is_dir()
    trained = trained_here or (pretrained is not None and pretrained.texture_unet is not None)
    if args.stage == "diffusion" and args.with_texture and not trained:
        raise ValueError(
            f"Expected a trained texture_unet in {args.output_dir}, got none. Run --stage texture first, give a "
            "--pretrained pipeline that has one, or take a preset without texture_unet."
        )
    if args.stage in ("texture", "diffusion"):
        path = Path(args.output_dir) / "vqvae"
        if args.vqvae_path is None and not path.is_dir() and not pretrained:
            raise ValueError(
                f"Expected a trained autoencoder in {path}, got none. Run --stage autoencoder first, or give"
                " --vqvae_path or --pretrained."
            )
        from_pipeline = pretrained and args.vqvae_path is None and not path.is_dir()
        vqvae = pretrained.vqvae if from_pipeline else MultiCodebookVQModel.from_pretrained(args.vqvae_path or path)
        check_sample_size(args, vqvae)
        vqvae.register_to_config(sample_size=args.sample_size)
        for name in ("latent_scaling", "latent_range"):
            if getattr(args, name):
                vqvae.register_to_config(**{name: getattr(args, name)})
        vqvae.check_latent_range()
        return vqvae
    check_sample_size(args)
    with torch.device("meta"):  # no memory, no random numbers
        return make_autoencoder(args)


def check_sample_size(args: argparse.Namespace, vqvae: MultiCodebookVQModel | None = None) -> None:
    """Refuse a size that the networks cannot halve as often as they do, and name those next to it that they can.

    Args:
        args: `sample_size`, `stage` and the networks' overrides.
        vqvae: the autoencoder, if it is trained already.
    """
    any_size = argparse.Namespace(**vars(args) | {"sample_size": 2**12})
    with torch.device("meta"):
        vqvae = vqvae or make_autoencoder(any_size)
        step = smallest = vqvae.downsampling_factor
        if args.with_texture:
            step = smallest = math.lcm(step, make_texture_unet(args, vqvae).downsampling_factor)
            check_crop_size(args.texture_crop_size, "texture", args.sample_size, step)
        if args.autoencoder_crop_size is not None:
            check_crop_size(args.autoencoder_crop_size, "autoencoder", args.sample_size, vqvae.downsampling_factor)
        if args.stage not in ("autoencoder", "texture"):
            unet = make_unet(any_size, vqvae, num_classes=1)
            step = math.lcm(step, vqvae.downsampling_factor * unet.downsampling_factor)
            smallest = step if unet.config.norm_num_groups else 2 * step  # instance norm of one voxel is nothing
    if args.sample_size % step or args.sample_size < smallest:
        below = args.sample_size // step * step
        fitting = " or ".join(str(size) for size in (below, below + step) if size >= smallest) or smallest
        raise ValueError(
            f"Expected a --sample_size that is a multiple of {step} and at least {smallest}, as the networks halve it,"
            f" got {args.sample_size}. Give {fitting}, or networks of fewer block_out_channels."
        )


def check_crop_size(size: int, stage: str, sample_size: int, step: int) -> None:
    if size % step or size > sample_size:
        raise ValueError(
            f"Expected a --{stage}_crop_size that is a multiple of {step}, as the networks halve it, and at most "
            f"--sample_size {sample_size}, got {size}. Give {min(max(size // step, 1) * step, sample_size)}."
        )


# ---------------------------------------------------------------------- what a run resumes with, and its record


def run_inputs(args: argparse.Namespace) -> dict:
    """What decides every stage: the cells, and the pipeline that the run begins with."""
    given = {name: getattr(args, name) for name in ("pretrained", "lora_class") if getattr(args, name)}
    return data_inputs(args) | given


def stage_inputs(
    args: argparse.Namespace, stage: str, vqvae: MultiCodebookVQModel, num_classes: int, num_features: int
) -> dict:
    """What decides a stage beside its settings: how cells are prepared, how its networks are configured."""
    if stage == "autoencoder":
        return run_inputs(args) | configuration("vqvae", vqvae.config)
    if stage == "distillation":  # its checkpoints know the teacher's weights
        return run_inputs(args)
    if stage == "texture":
        with torch.device("meta"):
            texture_unet = make_texture_unet(args, vqvae)
        return run_inputs(args) | configuration("texture_unet", texture_unet.config)
    with torch.device("meta"):
        unet = make_unet(args, vqvae, num_classes, num_features)
    networks = configuration("unet", unet.config) | configuration("scheduler", make_noise_scheduler(args).config)
    scaling = {f"vqvae.{name}": vqvae.config[name] for name in ("latent_scaling", "latent_range")}
    return run_inputs(args) | networks | scaling


def check_stages_resumable(args: argparse.Namespace, num_processes: int, inputs: dict[str, dict]) -> None:
    """`check_resumable` for every stage of this run, with its `inputs`."""
    for stage in stages_of(args):
        check_resumable(Path(args.output_dir) / stage, settings_of(args, stage), num_processes, inputs[stage])


def is_of_another_autoencoder(settings: StageSettings, directory: Path, vqvae: MultiCodebookVQModel) -> bool:
    """Whether the checkpoint to resume was trained on the latents of other weights than `vqvae` has."""
    path = find_checkpoint(directory, settings.resume_from_checkpoint)
    fingerprint = fingerprint_weights(vqvae)
    return path is not None and read_record(path).get("autoencoder", fingerprint) != fingerprint


def describe_training(args: argparse.Namespace) -> str:
    """For the report and the card: what was done in this run."""
    parts = []
    for stage in stages_of(args):
        settings = settings_of(args, stage)
        time_limit = f" or {settings.max_train_minutes:g} minutes" if settings.max_train_minutes else ""
        steps = f"{settings.max_train_steps} steps{time_limit}"
        parts.append(f"{steps} of the {stage} (learning rate {settings.learning_rate})")
    if args.stage == "distillation":
        parts.append(f"from {args.num_teacher_steps} steps of {args.pretrained} to {args.num_distilled_steps}")
    adapter = f"as an adapter of {args.pretrained}" if args.train_lora else ""
    adapter += f" from its class {args.lora_class}" if args.lora_class else ""
    return ", ".join(filter(None, [*parts, adapter, f"seed {args.seed}"]))
