"""The command line of the baselines' training; nothing heavy."""

import argparse

from .data_arguments import add_loading_arguments, add_source_arguments, add_split_arguments, positive
from .training_arguments import PRESETS, add_optimization_arguments, add_output_arguments, apply_preset


# what a preset overrides the configuration of
NETWORKS = ("model",)


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, after the preset of the baseline; `model` holds the overrides of its configuration."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--baseline")
    baseline = parser.parse_known_args(argv)[0].baseline

    parser = _make_parser(description, baseline)
    if baseline not in BASELINES:
        parser.parse_args(argv)  # ends in its help, or in the message
    config, _ = apply_preset(parser, argv, PRESETS / baseline, NETWORKS)
    args = parser.parse_args(argv)
    for name in NETWORKS:
        setattr(args, name, dict(config.get(name, {})))
    return args


def _make_parser(description: str, baseline: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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


# the baselines, and what adds the arguments of each
BASELINES = {"ha_gan": _add_ha_gan, "w_gan": _add_w_gan, "alpha_gan": _add_alpha_gan}
