"""The command line of the baselines' training; nothing heavy."""

import argparse

from .command_line import make_parser
from .data_arguments import add_loading_arguments, add_source_arguments, add_split_arguments, positive
from .training_arguments import (
    PRESETS,
    add_optimization_arguments,
    add_output_arguments,
    apply_preset,
    given_arguments,
    spread_over_stages,
)


# what a preset of MedicalDiffusion overrides the configuration of; one of the others, the model's alone
NETWORKS = ("model", "discriminator", "unet", "scheduler")
# what each of its stages has its own of, `--STAGE_NAME`, which wins: name, type, and the default of either
STAGES = ("autoencoder", "diffusion")
OF_STAGES = (
    ("max_train_steps", positive, 100_000, 100_000),
    ("max_train_minutes", float, None, None),
    ("train_batch_size", positive, 2, 2),
    ("learning_rate", float, 3e-4 / 16, 1e-4),
    ("lr_scheduler", str, "constant", "constant"),
    ("adam_beta1", float, 0.5, 0.9),
    ("adam_beta2", float, 0.9, 0.999),
    ("max_grad_norm", float, 1.0, 0.0),
    ("gradient_accumulation_steps", positive, 1, 2),
)


def networks_of(baseline: str) -> tuple[str, ...]:
    """The arguments that are overrides of models' configurations."""
    return NETWORKS if baseline == "medical_diffusion" else NETWORKS[:1]


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, after the preset of the baseline; `model` and so on hold the overrides of configurations."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--baseline")
    baseline = parser.parse_known_args(argv)[0].baseline

    parser = _make_parser(description, baseline)
    if baseline not in BASELINES:
        parser.parse_args(argv)  # ends in its help, or in the message
    config, _ = apply_preset(parser, argv, PRESETS / baseline, networks_of(baseline))
    args = parser.parse_args(argv)
    if baseline == "medical_diffusion":
        for given in (config.get("arguments", {}), given_arguments(parser, argv)):
            spread_over_stages(args, given, STAGES, [name for name, *_ in OF_STAGES])
        if args.resume_from_checkpoint not in (None, "latest"):
            parser.error(
                f"Expected --resume_from_checkpoint latest for two stages, got {args.resume_from_checkpoint}, which is"
                " of one. Say latest."
            )
    for name in networks_of(baseline):
        setattr(args, name, dict(config.get(name, {})))
    return args


def _make_parser(description: str, baseline: str | None) -> argparse.ArgumentParser:
    parser = make_parser(description)
    add = parser.add_argument
    add("--baseline", choices=BASELINES, required=True, help="with it, --help shows its own arguments too")
    add("--preset", default="paper", help="paper, cpu, or the path of a JSON file of such overrides")
    add("--output_dir", default=f"outputs/{baseline}", help="pipeline, checkpoints, logs and report go here")
    add("--seed", type=int, default=0)
    add_source_arguments(parser)
    held_out = "share of the cells that is not trained on, without --num_folds; 0 trains on all"
    add_split_arguments(parser).add_argument("--held_out", type=float, default=0.2, help=held_out)
    add_loading_arguments(parser)

    add = add_optimization_arguments(parser, "training").add_argument
    add("--max_train_steps", type=positive, default=100_000, help="optimizer steps")
    add("--train_batch_size", type=positive, default=4, help="per process")
    add("--learning_rate", type=float, default=1e-4)
    add("--lr_scheduler", default="constant", help="any of diffusers' schedules")
    if baseline in BASELINES:
        BASELINES[baseline](parser.add_argument_group(baseline).add_argument)
    add_output_arguments(parser)
    return parser


def _add_w_gan(add) -> None:
    add("--num_critic_steps", type=positive, default=5, help="for each step of the generator; a step is the critic's")
    choices = ["gradient_penalty", "clipping"]
    add("--lipschitz", choices=choices, default="gradient_penalty", help="what keeps the critic from growing steep")
    add("--gradient_penalty_weight", type=float, default=10.0)
    add("--clip_limit", type=float, default=0.01, help="of the critic's weights, with --lipschitz clipping")


def _add_alpha_gan(add) -> None:
    add("--adversarial_loss", choices=["original", "wgan_gp"], default="wgan_gp", help="of both discriminators")
    add("--reconstruction_weight", type=float, default=10.0)
    add("--gradient_penalty_weight", type=float, default=10.0, help="with --adversarial_loss wgan_gp")


def _add_ha_gan(add) -> None:
    add("--discriminator_learning_rate", type=float, default=4e-4)


def _add_medical_diffusion(add) -> None:
    for name, kind, *defaults in OF_STAGES:
        for stage, default in zip(STAGES, defaults, strict=True):
            add(f"--{stage}_{name}", type=kind, default=default, help=f"wins over --{name}")
    add("--discriminator_start", type=int, default=10_000, help="step at which the discriminators join")
    add("--l1_weight", type=float, default=4.0, help="of the autoencoder's error")
    add("--slice_weight", type=float, default=1.0, help="of the adversary that sees slices")
    add("--volume_weight", type=float, default=1.0, help="of the adversary that sees volumes")
    add("--feature_matching_weight", type=float, default=4.0)
    help_text = "of LPIPS on slices, 4 in the authors' command; off by default: its VGG-16 must be downloaded"
    add("--perceptual_weight", type=float, default=0.0, help=help_text)
    add("--ema_decay", type=float, default=0.995)
    add("--ema_update_every", type=positive, default=10, help="steps")
    add("--ema_start", type=int, default=2000, help="step before which the average is a copy")
    help_text = "poses of each cell, encoded once; by default every batch is encoded anew if cells are augmented"
    add("--num_augmented_copies", type=positive, help=help_text)
    add("--num_inference_steps", type=positive, default=1000, help="the saved pipeline's default")


# the baselines, and what adds the arguments of each
BASELINES = {
    "ha_gan": _add_ha_gan,
    "w_gan": _add_w_gan,
    "alpha_gan": _add_alpha_gan,
    "medical_diffusion": _add_medical_diffusion,
}
