"""What cannot work in a training, found before it begins."""

import argparse
import math
from pathlib import Path

import torch

from ..models import MultiCodebookVQModel
from ..pipelines import BYOCPipeline
from ..training import fastest_precision, is_cpu_training
from ..training.optimizers import optimizer_class
from ..training.stage import uses_deepspeed
from .train_networks import make_autoencoder, make_texture_unet, make_unet, settings_of, stages_of
from .training_runs import check_machine


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
        matches_moments = args.stage == "distillation" and args.distillation_method == "moment_matching"
        if args.stage in ("all", "autoencoder") or matches_moments:
            name = "moment matching" if matches_moments else "the autoencoder"
            raise ValueError(
                f"Expected one optimizer for DeepSpeed, got the two of {name}. Use it with --stage diffusion."
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
        if args.vqvae_path or not pretrained:  # whose U-Net knows the latents by their statistics
            vqvae.set_latent_statistics(None, None)
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
            texture_step = make_texture_unet(args, vqvae).downsampling_factor
            step = smallest = math.lcm(step, texture_step)
            crop_step = texture_step if args.texture_decode_whole_cells else step
            check_crop_size(args.texture_crop_size, "texture", args.sample_size, crop_step)
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
