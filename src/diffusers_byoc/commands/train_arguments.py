"""The command line of training: presets, arguments of the stages, and what cannot go together; nothing heavy."""

import argparse

from .command_line import make_parser
from .data_arguments import add_loading_arguments, add_source_arguments, add_split_arguments, positive
from .training_arguments import (
    FLAG,
    PRESETS,
    add_optimization_arguments,
    add_output_arguments,
    apply_preset,
    given_arguments,
    spread_over_stages,
)


# the stages in their order, with the learning rate of each
STAGES = {"autoencoder": 3e-4, "texture": 1e-3, "diffusion": 1e-4, "distillation": 1e-4}
# whose configuration a preset overrides; there is a texture stage where it has a `texture_unet`
NETWORKS = ("vqvae", "texture_unet", "unet", "scheduler")
# one name for all stages; `--STAGE_NAME` wins over it
COMMON = {
    "max_train_steps": (positive, "optimizer steps"),
    "train_batch_size": (positive, "per process"),
    "learning_rate": (float, None),
    "lr_scheduler": (str, "any of diffusers' schedules"),
}


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, after the preset; `vqvae`, `unet` and so on hold the models' overrides.

    A number of steps is None where `--num_train_epochs` says it; `set_train_steps` fills it in.
    """
    parser = _make_parser(description)
    config, path = apply_preset(parser, argv, PRESETS, NETWORKS)
    args = parser.parse_args(argv)
    for given in (config.get("arguments", {}), given_arguments(parser, argv)):
        for stage in STAGES:
            if "num_train_epochs" in given and not {f"{stage}_max_train_steps", "max_train_steps"} & set(given):
                setattr(args, f"{stage}_max_train_steps", None)
        spread_over_stages(args, given, STAGES, [*COMMON, "max_train_minutes"])
    if args.stage == "all" and args.resume_from_checkpoint not in (None, "latest"):
        parser.error(
            f"Expected --resume_from_checkpoint latest for all stages, got {args.resume_from_checkpoint}, which is of"
            " one. Say its --stage too."
        )
    _check_lora(parser, args, given_arguments(parser, argv))
    _check_distillation(parser, args, given_arguments(parser, argv))
    _check_autoguidance(parser, args, given_arguments(parser, argv))
    if args.push_to_hub and args.stage not in ("all", "diffusion", "distillation"):
        parser.error(
            f"Expected a run that ends with a pipeline for --push_to_hub, got --stage {args.stage}. Push with the"
            " diffusion."
        )
    if args.autoencoder_latent_noise < 0:
        parser.error(
            f"Expected an --autoencoder_latent_noise of at least 0, got {args.autoencoder_latent_noise}. Correct it."
        )
    if (args.num_augmented_copies or 1) > 1 and args.augmentation == "none" and not args.intensity_jitter:
        parser.error(
            f"Expected an --augmentation or --intensity_jitter for --num_augmented_copies {args.num_augmented_copies},"
            " got none: the copies would be equal. Say one, or 1 copy."
        )
    for name in NETWORKS:
        setattr(args, name, dict(config.get(name, {})))
    args.with_texture = "texture_unet" in config
    if args.stage == "texture" and not args.with_texture:
        parser.error(f"Expected a texture_unet in {path} for --stage texture, got none. Add one; {{}} is the default.")
    for name in ("latent_scaling", "latent_range", "share_codebook"):
        if getattr(args, name):
            args.vqvae[name] = getattr(args, name)
    if args.prediction_type:
        args.scheduler["prediction_type"] = args.prediction_type
    return args


def _check_lora(parser: argparse.ArgumentParser, args: argparse.Namespace, given: dict) -> None:
    if not args.train_lora:
        for name in ("rank", "lora_class"):
            if getattr(args, name) is not None:
                parser.error(f"Expected --train_lora for --{name}, got none. Say both, or leave --{name} out.")
        return
    if args.pretrained is None:
        parser.error("Expected a pipeline to adapt in --pretrained for --train_lora, got none. Name one.")
    if args.stage != "diffusion":
        parser.error(
            f"Expected --stage diffusion for --train_lora, got --stage {args.stage}: the adapter is the U-Net's, all"
            " else stays as it is. Say it."
        )
    names = ("vqvae_path", "share_codebook", "latent_scaling", "latent_range", "class_conditional", "push_to_hub")
    of_unet = ("conditioning_dropout_prob", "channel_timesteps_prob")
    for name in (*names, *of_unet, "num_inference_steps", "num_texture_steps", "inference_scheduler"):
        if name in given:
            parser.error(
                f"Expected no --{name} with --train_lora, which saves an adapter alone, got one. Leave it out."
            )
    args.rank = args.rank or 8


def _check_distillation(parser: argparse.ArgumentParser, args: argparse.Namespace, given: dict) -> None:
    if args.stage != "distillation":
        for name in ("distillation_method", "num_distilled_steps", "num_teacher_steps"):
            if name in given:
                parser.error(f"Expected --stage distillation for --{name}, got --stage {args.stage}. Say it.")
        return
    if args.pretrained is None:
        parser.error("Expected a teacher in --pretrained for --stage distillation, got none. Name a pipeline.")
    if "num_teacher_steps" in given and args.distillation_method != "progressive":
        parser.error(
            f"Expected --distillation_method progressive for --num_teacher_steps, got {args.distillation_method},"
            " which asks the teacher at any timestep. Leave one of the two out."
        )
    names = ("vqvae_path", "share_codebook", "latent_scaling", "latent_range", "class_conditional", "loss_type")
    names += ("conditioning_dropout_prob", "channel_timesteps_prob")
    for name in (*names, "snr_gamma", "num_inference_steps", "num_texture_steps", "inference_scheduler", "ema_decay"):
        if name in given:
            parser.error(
                f"Expected no --{name} with --stage distillation, which has its own or the teacher's, got one. Leave"
                " it out."
            )


def _check_autoguidance(parser: argparse.ArgumentParser, args: argparse.Namespace, given: dict) -> None:
    names = [name for name in ("reset_unet", "weak_unet") if getattr(args, name)]
    for name in names:
        if args.pretrained is None or args.stage != "diffusion" or args.train_lora or args.vqvae_path:
            parser.error(
                f"Expected a --pretrained pipeline and --stage diffusion for --{name}, without --train_lora and"
                " --vqvae_path: the autoencoder stays as it is, and with it the latents. Correct them."
            )
    if len(names) > 1:
        parser.error("Expected --reset_unet, which makes a weak U-Net, or --weak_unet, which names it, got both.")
    of_weak = [name for name in given if name.startswith("autoguidance_")]
    if of_weak and not args.weak_unet:
        parser.error(f"Expected a --weak_unet for --{of_weak[0]}, got none. Train one with --reset_unet.")
    if not 0 <= args.autoguidance_start < args.autoguidance_stop <= 1:
        parser.error(
            "Expected 0 <= --autoguidance_start < --autoguidance_stop <= 1, got"
            f" {args.autoguidance_start:g} and {args.autoguidance_stop:g}. Correct them."
        )


def set_train_steps(args: argparse.Namespace, num_cells: int, num_processes: int) -> None:
    """Replace `--num_train_epochs` by each stage's number of steps."""
    for stage in STAGES:
        if getattr(args, f"{stage}_max_train_steps") is None:
            step_size = getattr(args, f"{stage}_train_batch_size") * args.gradient_accumulation_steps * num_processes
            setattr(args, f"{stage}_max_train_steps", -(-args.num_train_epochs * num_cells // step_size))


def _make_parser(description: str) -> argparse.ArgumentParser:
    parser = make_parser(description)
    add = parser.add_argument
    presets = "cells, coarse, demo, phantom, phantom_channels, phantom_drug, phantom_lora, phantom_few_steps, paper"
    add("--preset", default="demo", help=f"{presets}, or the path of a JSON file of such overrides")
    add("--output_dir", default="outputs/demo", help="pipeline, checkpoints, logs and report go here")
    add("--stage", choices=["all", *STAGES], default="all")
    help_text = "begin with the networks of this pipeline, a folder or a Hub repository, in place of the preset's"
    add("--pretrained", help=help_text)
    add("--seed", type=int, default=0)
    add_source_arguments(parser)
    held_out = "share of the cells that is not trained on, without --num_folds; 0 trains on all"
    add_split_arguments(parser).add_argument("--held_out", type=float, default=0.2, help=held_out)
    add_loading_arguments(parser)

    add = add_optimization_arguments(parser, "all stages").add_argument
    for name, (kind, text) in COMMON.items():
        add(f"--{name}", type=kind, help="; ".join(filter(None, [text, "a stage's own argument wins"])))
    add("--num_train_epochs", type=positive, help="passes over the cells, in place of --max_train_steps")
    add("--compile", **FLAG, help="torch.compile the networks; the first steps take minutes")
    add("--gradient_checkpointing", **FLAG, help="less memory for more time")
    defaults = {"max_train_steps": 100_000, "train_batch_size": 2, "lr_scheduler": "constant"}
    for stage, learning_rate in STAGES.items():
        for name, (kind, _) in COMMON.items():
            add(f"--{stage}_{name}", type=kind, default=(defaults | {"learning_rate": learning_rate})[name])
        add(f"--{stage}_max_train_minutes", type=float, help="wins over --max_train_minutes")

    add = parser.add_argument_group("autoencoder").add_argument
    add("--discriminator_start", type=int, default=10_000, help="step at which the discriminator joins")
    add("--discriminator_weight", type=float, default=0.1, help="of the adversarial gradient against reconstruction's")

    add("--share_codebook", **FLAG, help="one codebook for all channels, the ablation 'unimodal'")
    add("--autoencoder_crop_size", type=positive, help="train on crops around the cell, voxels (default: all)")
    help_text = "decode latents with noise of up to so many of their deviations, which the decoder learns to bear"
    add("--autoencoder_latent_noise", type=float, default=0.0, help=help_text)

    add = parser.add_argument_group("texture").add_argument
    add("--texture_crop_size", type=positive, default=40, help="crops around the cell, voxels")
    add("--texture_decode_whole_cells", **FLAG, help="and crop then: nearer to what a pipeline decodes, but slower")
    add("--texture_ema_decay", type=float, default=0.999, help="the model is a moving average")
    add("--num_texture_steps", type=positive, default=8, help="the saved pipeline's default")

    add = parser.add_argument_group("diffusion").add_argument
    help_text = "trained autoencoder for the later stages alone (default: OUTPUT_DIR/vqvae)"
    add("--vqvae_path", help=help_text)
    scalings = ["codebook_range", "standardize", "cell"]
    add("--latent_scaling", choices=scalings, help="how latents come to the noise's scale")
    add("--latent_range", help="whose codebook's: per_channel (default), absolute or a channel's name; for ablations")
    add("--class_conditional", **FLAG, help="give the labels to the U-Net")
    help_text = "columns of numbers that the U-Net is told: a dose, a time, an embedding"
    add("--condition_columns", nargs="+", default=[], metavar="COLUMN", help=help_text)
    help_text = "share of the cells that is trained on without class and conditions, for guidance; 0: none"
    add("--conditioning_dropout_prob", type=float, default=0.1, help=help_text)
    help_text = "share of the cells whose channels are trained on at timesteps of their own, to give some; 0: none"
    add("--channel_timesteps_prob", type=float, default=0.0, help=help_text)
    help_text = "train an adapter of --pretrained's U-Net in its place: a new drug from few cells"
    add("--train_lora", **FLAG, help=help_text)
    add("--rank", type=positive, help="of the adapter (default: 8)")
    add("--lora_class", help="the class, of a --pretrained that has classes, that the adapter makes the new drug of")
    help_text = "begin without what --pretrained's U-Net has learnt: for a weak one"
    add("--reset_unet", **FLAG, help=help_text)
    help_text = "pipeline of a less trained U-Net, away from which --pretrained's is moved (autoguidance)"
    add("--weak_unet", help=help_text)
    add("--autoguidance_scale", type=float, default=1.3, help="how far; 1: not at all")
    help_text = "from which share of the denoising steps on"
    add("--autoguidance_start", type=float, default=0.0, help=help_text)
    add("--autoguidance_stop", type=float, default=1.0, help="up to which")
    help_text = "augmentations of a cell whose latents are kept (default: encode others in every epoch)"
    add("--num_augmented_copies", type=positive, help=help_text)
    add("--prediction_type", choices=["epsilon", "v_prediction", "sample"], help="what the U-Net predicts")
    add("--loss_type", choices=["l1", "l2"], default="l1")
    add("--snr_gamma", type=float, help="min-SNR weighting of the timesteps (Hang et al. 2023 advise 5)")
    add("--use_ema", **(FLAG | {"default": True}), help="the model is a moving average of the trained weights")
    add("--ema_decay", type=float, default=0.995)
    add("--use_ema_warmup", **FLAG, help="the average's decay rises by a power law, up to --ema_decay")
    add("--ema_inv_gamma", type=float, default=1.0, help="of the warm-up, 1 - (1 + step / inv_gamma) ** -power")
    add("--ema_power", type=float, default=2 / 3)
    add("--num_inference_steps", type=positive, default=1000, help="the saved pipeline's default")
    # from the configuration of others (DEIS) not every scheduler can be made by `from_config`
    schedulers = ["DDPMScheduler", "DDIMScheduler"]
    add("--inference_scheduler", choices=schedulers, default="DDPMScheduler", help="the saved pipeline's")

    add = parser.add_argument_group("distillation").add_argument
    help_text = "to ancestral steps after which the teacher corrects nothing, or to DDIM's from more of them"
    methods = ["moment_matching", "progressive"]
    add("--distillation_method", choices=methods, default="moment_matching", help=help_text)
    add("--num_distilled_steps", type=positive, default=4, help="that the distilled U-Net takes, and no others")
    help_text = "of its teacher in progressive distillation (default: those it was distilled to itself, otherwise 32)"
    add("--num_teacher_steps", type=positive, help=help_text)
    add("--distillation_ema_decay", type=float, default=0.999, help="the model is a moving average")

    add = add_output_arguments(parser).add_argument
    add("--num_validation_cells", type=positive, default=16, help="held-out cells in the validation losses")
    return parser
