"""Train BYOC: the multi-codebook autoencoder, then the joint latent diffusion, then a saved pipeline and a report.

accelerate launch examples/train_byoc.py                                            the demo, on phantom cells
accelerate launch examples/train_byoc.py --preset paper --train_data_dir my_cells   the paper's Tables 2 and 3
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.utils.data import Subset
from tqdm.auto import tqdm

import training_arguments
from data_arguments import batch_loader, indexable, load_cells
from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel, PatchDiscriminator3D
from diffusers_byoc.data import CellDataset, StreamedCells, augment_cells, draw_augmentation
from diffusers_byoc.training import (
    CachedLatents,
    Termination,
    adaptive_weight,
    adversarial_loss,
    adversarial_surrogate,
    cache_latents,
    check_finite,
    diffusion_loss,
    discriminator_loss,
    fair_num_threads,
    fastest_precision,
    follow_launcher,
    is_cpu_training,
    keep_freed_memory,
    latent_statistics,
    load_checkpoint,
    mean_losses,
    process_share,
    reconstruction_loss,
    save_checkpoint,
    step_generator,
    validate_autoencoder,
    validate_diffusion,
)
from diffusers_byoc.visualization import compare_volumes
from diffusers_byoc.whole_files import lock_folder
from publishing import create_repository, push_pipeline
from report import write_report


logger = get_logger(__name__, log_level="INFO")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return training_arguments.parse_args(__doc__, argv)


def make_autoencoder(args: argparse.Namespace) -> MultiCodebookVQModel:
    return MultiCodebookVQModel(sample_size=args.sample_size, **args.vqvae)


def make_unet(args: argparse.Namespace, vqvae: MultiCodebookVQModel, num_classes: int) -> DualChannelUNet3D:
    return DualChannelUNet3D(
        num_channels=vqvae.config.num_channels,
        latent_channels=vqvae.config.latent_channels,
        sample_size=args.sample_size // vqvae.downsampling_factor,
        num_class_embeds=num_classes if args.class_conditional else None,
        **args.unet,
    )


def check_arguments(args: argparse.Namespace, device: torch.device) -> MultiCodebookVQModel:
    """Find what cannot work before any training, not between the stages.

    Returns:
        The trained autoencoder for `--stage diffusion`; otherwise one that has its configuration but no weights.
    """
    if args.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU say bf16, no or auto")
    optimizer_class(args)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError("FSDP is not supported: the moving average needs whole weights; use DeepSpeed's ZeRO-2")
    if uses_deepspeed():
        if is_cpu_training():
            raise ValueError("accelerate runs DeepSpeed on GPUs alone; without one, use torchrun")
        if args.stage != "diffusion":
            raise ValueError("DeepSpeed takes one optimizer, the autoencoder has two; use it with --stage diffusion")
        if arithmetic(args) == "fp16":
            raise ValueError("with DeepSpeed, say --mixed_precision bf16 or no")
    if args.stage == "diffusion":
        path = Path(args.output_dir) / "vqvae"
        if args.vqvae_path is None and not path.is_dir():
            raise ValueError(f"{path}: no trained autoencoder; run --stage autoencoder first, or give --vqvae_path")
        vqvae = MultiCodebookVQModel.from_pretrained(args.vqvae_path or path)
        if args.latent_scaling:
            vqvae.register_to_config(latent_scaling=args.latent_scaling)
    else:
        with torch.device("meta"):  # no memory, no random numbers
            vqvae = make_autoencoder(args)
    if args.stage != "autoencoder":
        with torch.device("meta"):
            make_unet(args, vqvae, num_classes=1)
    return vqvae


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` was told to."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def arithmetic(args: argparse.Namespace) -> str:
    return fastest_precision() if args.mixed_precision == "auto" else args.mixed_precision


def start_stage(args: argparse.Namespace, stage: str) -> Accelerator:
    """An accelerator of its own for each stage, so that its checkpoints hold that stage alone."""
    mixed_precision = arithmetic(args)
    if is_cpu_training():
        keep_freed_memory()
        torch.set_num_threads(args.num_cpu_threads or fair_num_threads())
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    output_dir = Path(args.output_dir)
    trackers = ["tensorboard", "wandb"] if args.report_to == "all" else args.report_to
    accelerator = Accelerator(
        cpu=is_cpu_training(),
        # DeepSpeed would keep the weights themselves in half precision, in which a moving average stands still
        mixed_precision="no" if uses_deepspeed() else mixed_precision,
        # as a plugin, which a launcher's environment variable does not overrule
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.gradient_accumulation_steps),
        log_with=trackers,
        project_config=ProjectConfiguration(str(output_dir / stage), logging_dir=str(output_dir / "logs")),
    )
    if uses_deepspeed():
        deepspeed_config = accelerator.state.deepspeed_plugin.deepspeed_config
        # it wants to know before any data
        deepspeed_config["train_micro_batch_size_per_gpu"] = getattr(args, f"{stage}_train_batch_size")
        if mixed_precision == "bf16":
            deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    config = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool))}
    accelerator.init_trackers(stage, config, {"wandb": {"dir": str(output_dir), "name": f"{output_dir.name}/{stage}"}})
    set_seed(args.seed)
    logger.info(f"{stage}: {accelerator.num_processes} process(es), {accelerator.device}, {mixed_precision=}")
    return accelerator


def end_stage(accelerator: Accelerator) -> None:
    """Close the logs; `Accelerator.end_training` would also end the process group that the next stage needs."""
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()


def optimizer_class(args: argparse.Namespace) -> Callable[..., torch.optim.Optimizer]:
    """The class that `--optimizer` and `--use_8bit_adam` name."""
    if not args.use_8bit_adam:
        return partial({"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer], fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError('--use_8bit_adam needs bitsandbytes: pip install "diffusers_byoc[8bit]"') from error
    return {"adam": bitsandbytes.optim.Adam8bit, "adamw": bitsandbytes.optim.AdamW8bit}[args.optimizer]


def make_optimizer(args: argparse.Namespace, stage: str, parameters, num_steps: int):
    """Optimizer and learning-rate schedule of a stage."""
    optimizer = optimizer_class(args)(
        [parameter for parameter in parameters if parameter.requires_grad],
        lr=getattr(args, f"{stage}_learning_rate"),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
    )
    schedule = getattr(args, f"{stage}_lr_scheduler")
    warmup_steps = args.lr_warmup_steps
    return optimizer, get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)


def remaining_batches(args: argparse.Namespace, stage: str, cells: CellDataset | StreamedCells, first_step: int):
    """A loader of what this process has left to see of a stage."""
    accumulation = args.gradient_accumulation_steps
    num_batches = (getattr(args, f"{stage}_max_train_steps") - first_step) * accumulation
    batch_size = getattr(args, f"{stage}_train_batch_size")
    return batch_loader(args, cells, batch_size, first_step * accumulation, num_batches)


def augment(accelerator: Accelerator, args: argparse.Namespace, volumes: torch.Tensor, micro_step: int):
    """This process's cells, turned and re-stained as drawn for all processes."""
    if args.augmentation == "none" and args.intensity_jitter == 0:
        return volumes
    drawn = draw_augmentation(
        len(volumes) * accelerator.num_processes,
        volumes.shape[1],
        step_generator(args.seed, micro_step, "augmentation"),
        args.augmentation,
        args.intensity_jitter,
    )
    return augment_cells(
        volumes, *(process_share(x, accelerator.process_index, accelerator.num_processes) for x in drawn)
    )


def latent_batches(
    accelerator: Accelerator,
    args: argparse.Namespace,
    cells: CellDataset | StreamedCells,
    vqvae: MultiCodebookVQModel,
    latents: CachedLatents,
    first_step: int,
):
    """(normalised latents, class labels) of this process's remaining batches, on its device.

    From `latents`, those of all `cells`; but streamed and augmented cells are encoded batch by batch.
    """
    loader = remaining_batches(args, "diffusion", cells, first_step)
    if isinstance(cells, StreamedCells) or args.augmentation != "none" or args.intensity_jitter:
        for micro_step, batch in enumerate(loader, first_step * args.gradient_accumulation_steps):
            volumes = augment(accelerator, args, batch["volumes"].to(accelerator.device), micro_step)
            with torch.no_grad(), accelerator.autocast():
                clean = vqvae.encode(volumes).latents.float()
            yield vqvae.normalize_latents(clean), batch["class_labels"].to(accelerator.device)
    else:
        labels = torch.tensor(cells.labels)
        for indices in loader.batch_sampler:
            clean = latents[indices].to(accelerator.device)
            yield vqvae.normalize_latents(clean), labels[indices].to(accelerator.device)


def optimizer_step(accelerator: Accelerator, args: argparse.Namespace, model, optimizer, step: int) -> None:
    """Clip, check and apply the gradients; within an accumulation, leave them to grow."""
    if accelerator.sync_gradients:
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
        # fp16's scaler skips such a step, and lowers its scale; DeepSpeed has made its step already
        if accelerator.scaler is None and torch.is_tensor(norm):
            check_finite(accelerator, norm, "gradient", step)
    optimizer.step()
    optimizer.zero_grad()


def log_volumes(accelerator: Accelerator, rows: dict[str, torch.Tensor], channel_names, step: int) -> None:
    """Orthogonal slices of up to four cells a row, to every tracker."""
    rows = {name: (volumes[:4].float() / 2 + 0.5).clamp(0, 1).cpu() for name, volumes in rows.items()}
    figure = compare_volumes(rows, channel_names)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.tracker.add_figure("samples", figure, step)
        elif tracker.name == "wandb":
            from wandb import Image

            tracker.log({"samples": Image(figure)}, step=step)


def end_of_step(accelerator: Accelerator, args, directory: Path, step: int, max_steps: int, termination) -> None:
    """Save a checkpoint when it is time, or when the run is told to end; then end it."""
    is_told_to_end = termination.requested(accelerator)
    if is_told_to_end or step % args.checkpointing_steps == 0 or step == max_steps:
        path = save_checkpoint(accelerator, directory, step, args.checkpoints_total_limit)
    if is_told_to_end:
        termination.close()
        end_stage(accelerator)
        accelerator.print(
            f"train_byoc.py: SIGTERM: saved {path}; go on with --resume_from_checkpoint latest", file=sys.stderr
        )
        raise SystemExit(143)


def train_autoencoder(
    args: argparse.Namespace,
    cells: CellDataset | StreamedCells,
    held_out_cells: CellDataset | StreamedCells | None = None,
) -> MultiCodebookVQModel:
    """Stage one (section 3.1, eq. 6-8). Returns the trained autoencoder, also saved to OUTPUT_DIR/vqvae."""
    accelerator = start_stage(args, "autoencoder")
    directory = Path(args.output_dir) / "autoencoder"
    max_steps, accumulation = args.autoencoder_max_train_steps, args.gradient_accumulation_steps

    # 1. models and optimizers
    vqvae = make_autoencoder(args)
    discriminator = PatchDiscriminator3D(vqvae.config.num_channels)
    if args.gradient_checkpointing:
        vqvae.enable_gradient_checkpointing()
    if args.compile:  # in place: the names of the weights stay as they are
        torch._functorch.config.donated_buffer = False  # the adaptive weight goes through the graph a second time
        vqvae.compile()
        discriminator.compile()
    optimizer, lr_scheduler = make_optimizer(args, "autoencoder", vqvae.parameters(), max_steps)
    discriminator_optimizer, discriminator_lr_scheduler = make_optimizer(
        args, "autoencoder", discriminator.parameters(), max_steps - args.discriminator_start
    )
    vqvae, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        vqvae, discriminator, optimizer, discriminator_optimizer
    )
    accelerator.register_for_checkpointing(lr_scheduler, discriminator_lr_scheduler)
    bare_vqvae = accelerator.unwrap_model(vqvae)
    first_step = load_checkpoint(accelerator, directory, args.resume_from_checkpoint)

    # 2. data: the batches that this process has left
    loader = remaining_batches(args, "autoencoder", cells, first_step)
    if held_out_cells is not None:
        validation_cells = indexable(held_out_cells, args.num_validation_cells, args.seed)

    # 3. train
    hidden = not accelerator.is_local_main_process
    progress = tqdm(total=max_steps, initial=first_step, desc="Autoencoder", disable=hidden)
    vqvae.train()
    termination = Termination()  # a SIGTERM now waits for the end of its step
    for micro_step, batch in enumerate(loader, first_step * accumulation):
        step = micro_step // accumulation + 1
        volumes = augment(accelerator, args, batch["volumes"].to(accelerator.device), micro_step)
        if micro_step == 0:
            with torch.no_grad(), accelerator.autocast():
                latents = bare_vqvae.encode(volumes).latents
            bare_vqvae.initialize_codebooks(latents, step_generator(args.seed, 0, "codes"))

        # autoencoder: reconstruction, commitment, and from some step on the adversary
        with accelerator.accumulate(vqvae, discriminator):
            reconstruction, commit_loss, latents, indices = vqvae(volumes, return_dict=False)
            loss_reconstruction = reconstruction_loss(reconstruction, volumes)
            loss = loss_reconstruction + commit_loss
            losses = {"loss/reconstruction": loss_reconstruction, "loss/commitment": commit_loss}
            if step > args.discriminator_start:
                adversarial, fake_logits = adversarial_surrogate(reconstruction, discriminator)
                weight = adaptive_weight(loss_reconstruction, adversarial, bare_vqvae.decoder.conv_out.weight)
                loss = loss + args.discriminator_weight * weight * adversarial
                losses["loss/adversarial"] = adversarial_loss(fake_logits)
            check_finite(accelerator, loss, "loss", step)
            accelerator.backward(loss)
            optimizer_step(accelerator, args, vqvae, optimizer, step)

            # discriminator
            if step > args.discriminator_start:
                loss_discriminator = discriminator_loss(discriminator(volumes), fake_logits)
                check_finite(accelerator, loss_discriminator, "discriminator's loss", step)
                accelerator.backward(loss_discriminator)
                optimizer_step(accelerator, args, discriminator, discriminator_optimizer, step)
                losses["loss/discriminator"] = loss_discriminator

        # codebooks: moving averages and revival
        codebook_logs = bare_vqvae.update_codebooks(latents, indices, step_generator(args.seed, micro_step, "revival"))
        if (micro_step + 1) % accumulation:
            continue

        # end of a step
        lr_scheduler.step()
        if step > args.discriminator_start:
            discriminator_lr_scheduler.step()
        logs = mean_losses(accelerator, losses) | codebook_logs
        accelerator.log(logs | {"lr": lr_scheduler.get_last_lr()[0]}, step=step)
        progress.update()
        usages = "/".join(f"{value:.0%}" for name, value in logs.items() if name.startswith("usage"))
        progress.set_postfix(mse=f"{logs['loss/reconstruction']:.4f}", codes=usages)
        if step % args.validation_steps == 0 or step == max_steps:
            rows = {"cells": volumes, "reconstructed": reconstruction.detach()}
            if held_out_cells is not None:
                losses = validate_autoencoder(accelerator, bare_vqvae, validation_cells, args.num_validation_cells)
                accelerator.log(losses, step=step)
            if accelerator.is_main_process:
                log_volumes(accelerator, rows, bare_vqvae.config.channel_names, step)
        end_of_step(accelerator, args, directory, step, max_steps, termination)

    # 4. save
    termination.close()
    accelerator.wait_for_everyone()
    vqvae = accelerator.unwrap_model(vqvae, keep_fp32_wrapper=False).eval()
    if accelerator.is_main_process:
        vqvae.save_pretrained(Path(args.output_dir) / "vqvae")
    end_stage(accelerator)
    return vqvae


def train_diffusion(
    args: argparse.Namespace,
    cells: CellDataset | StreamedCells,
    vqvae: MultiCodebookVQModel,
    held_out_cells: CellDataset | StreamedCells | None = None,
) -> BYOCPipeline:
    """Stage two (section 3.2, eq. 9-13), on the frozen autoencoder's unquantised latents. Returns the pipeline."""
    accelerator = start_stage(args, "diffusion")
    directory = Path(args.output_dir) / "diffusion"
    max_steps, accumulation = args.diffusion_max_train_steps, args.gradient_accumulation_steps

    # 1. model, noise schedule, optimizer, moving average
    unet = make_unet(args, vqvae, num_classes=len(cells.class_names))
    # Nothing keeps the latents inside the codebook's range (the log says how many leave it): no clipping to it.
    schedule = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "leading"}
    noise_scheduler = DDPMScheduler(**(schedule | args.scheduler))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        unet.compile()
    optimizer, lr_scheduler = make_optimizer(args, "diffusion", unet.parameters(), max_steps)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)
    ema = None
    if args.use_ema:
        warmup = {"use_ema_warmup": args.use_ema_warmup, "inv_gamma": args.ema_inv_gamma, "power": args.ema_power}
        ema = EMAModel(unet.parameters(), decay=args.ema_decay, **warmup)
        accelerator.register_for_checkpointing(ema)
    first_step = load_checkpoint(accelerator, directory, args.resume_from_checkpoint)
    if ema:
        ema.to(accelerator.device)  # a restored one lies on the CPU

    # 2. data: every cell encoded once, and read from the disk; streamed and augmented ones encoded batch by batch
    vqvae.to(accelerator.device).requires_grad_(False).eval()
    folder, workers = Path(args.output_dir) / "latents", args.dataloader_num_workers
    latents = cache_latents(
        vqvae, indexable(cells, 256, args.seed), folder / "train", accelerator, num_workers=workers
    )
    if vqvae.config.latent_scaling == "standardize":
        vqvae.set_latent_statistics(*latents.mean_and_std())
    statistics = latent_statistics(vqvae, latents.chunks())
    accelerator.log(statistics, step=0)
    logger.info(f"latents, normalised: {', '.join(f'{name} {value:.3f}' for name, value in statistics.items())}")
    if held_out_cells is not None:
        validation_cells = indexable(held_out_cells, args.num_validation_cells, args.seed)
        rows = range(min(len(validation_cells), args.num_validation_cells))
        held_out_latents = cache_latents(vqvae, Subset(validation_cells, rows), folder / "held_out", accelerator)
        held_out_labels = None
        if args.class_conditional:
            held_out_labels = [int(validation_cells[row]["class_labels"]) for row in rows]
    batches = latent_batches(accelerator, args, cells, vqvae, latents, first_step)

    # 3. train
    hidden = not accelerator.is_local_main_process
    progress = tqdm(total=max_steps, initial=first_step, desc="Diffusion", disable=hidden)
    unet.train()
    termination = Termination()
    global_batch_size = args.diffusion_train_batch_size * accelerator.num_processes
    for micro_step, (clean, class_labels) in enumerate(batches, first_step * accumulation):
        step = micro_step // accumulation + 1
        class_labels = class_labels if args.class_conditional else None
        # drawn for all processes, then shared out, so that their number does not change the run
        generator = step_generator(args.seed, micro_step, "diffusion")
        noise = torch.randn(global_batch_size, *clean.shape[1:], generator=generator)
        timesteps = torch.randint(len(noise_scheduler), (global_batch_size,), generator=generator)
        noise, timesteps = (
            process_share(x, accelerator.process_index, accelerator.num_processes).to(accelerator.device)
            for x in (noise, timesteps)
        )

        with accelerator.accumulate(unet):
            loss = diffusion_loss(
                unet, noise_scheduler, clean, noise, timesteps, class_labels, args.loss_type, args.snr_gamma
            )
            check_finite(accelerator, loss, "loss", step)
            accelerator.backward(loss)
            optimizer_step(accelerator, args, unet, optimizer, step)
        if (micro_step + 1) % accumulation:
            continue

        # end of a step
        lr_scheduler.step()
        if ema:
            ema.step(unet.parameters())
        logs = mean_losses(accelerator, {"loss/diffusion": loss})
        accelerator.log(logs | {"lr": lr_scheduler.get_last_lr()[0]}, step=step)
        progress.update()
        progress.set_postfix(loss=f"{logs['loss/diffusion']:.4f}")
        if step % args.validation_steps == 0 or step == max_steps:
            bare_unet = accelerator.unwrap_model(unet)
            if ema:
                ema.store(unet.parameters())
                ema.copy_to(unet.parameters())
            if held_out_cells is not None:
                options = (held_out_latents, held_out_labels, args.seed, args.loss_type, args.snr_gamma)
                losses = validate_diffusion(accelerator, bare_unet, noise_scheduler, vqvae, *options)
                accelerator.log(losses, step=step)
            if accelerator.is_main_process:
                pipeline = make_pipeline(args, cells, vqvae, bare_unet, noise_scheduler)
                pipeline.set_progress_bar_config(disable=True)
                with accelerator.autocast():
                    samples = pipeline(
                        4,
                        class_labels=0 if args.class_conditional else None,
                        output_type="pt",
                        num_inference_steps=min(20, len(noise_scheduler)),
                        generator=torch.Generator().manual_seed(args.seed),
                    ).volumes
                log_volumes(accelerator, {"generated": samples * 2 - 1}, vqvae.config.channel_names, step)
            if ema:
                ema.restore(unet.parameters())
            unet.train()
        end_of_step(accelerator, args, directory, step, max_steps, termination)

    # 4. the moving average is the model
    termination.close()
    accelerator.wait_for_everyone()
    if ema:
        ema.copy_to(unet.parameters())
    unet = accelerator.unwrap_model(unet, keep_fp32_wrapper=False).eval()
    pipeline = make_pipeline(args, cells, vqvae, unet, noise_scheduler)
    if accelerator.is_main_process:
        pipeline.save_pretrained(args.output_dir)
    end_stage(accelerator)
    return pipeline


def make_pipeline(args, cells: CellDataset | StreamedCells, vqvae, unet, noise_scheduler) -> BYOCPipeline:
    scheduler_class = getattr(diffusers, args.inference_scheduler)
    return BYOCPipeline(
        vqvae,
        unet,
        scheduler_class.from_config(noise_scheduler.config),
        default_num_inference_steps=args.num_inference_steps,
        label2id={name: index for index, name in enumerate(cells.class_names)} if args.class_conditional else None,
        volume_processor_config=dict(cells.processor.config) | {"voxel_size_um": cells.voxel_size_um},
    )


@contextmanager
def one_line_errors(*errors: type[Exception]):
    """Where the message says what to mend, and a traceback would hide it."""
    try:
        yield
    except errors as error:
        raise SystemExit(f"train_byoc.py: error: {' '.join(str(error).split())}") from error


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    follow_launcher()
    state = PartialState(cpu=is_cpu_training())
    with one_line_errors(ValueError, OSError):
        vqvae = check_arguments(args, state.device)
    with one_line_errors(OSError, SafetensorError):  # a full disk, a folder in use
        with lock_folder(args.output_dir) if state.is_main_process else nullcontext():
            run(args, state, vqvae)
    state.destroy_process_group()


def run(args: argparse.Namespace, state: PartialState, vqvae: MultiCodebookVQModel) -> None:
    """The stages, the report and the upload."""
    started = time.perf_counter()
    goes_on = args.stage == "diffusion" or args.resume_from_checkpoint is not None
    with one_line_errors(ValueError):
        cells, held_out_cells = load_cells(args, vqvae.config.channel_names, args.output_dir, goes_on)
    training_arguments.set_train_steps(args, len(cells), state.num_processes)
    num_held_out = len(held_out_cells) if held_out_cells else 0
    logger.info(f"{len(cells)} cells, {num_held_out} more held out: {', '.join(cells.class_names)}")
    if args.push_to_hub and state.is_main_process:  # a wrong token is better found now than after days
        args.hub_model_id = create_repository(args)
    if args.stage != "diffusion":
        vqvae = train_autoencoder(args, cells, held_out_cells)
    if args.stage != "autoencoder":
        train_diffusion(args, cells, vqvae, held_out_cells)
        if state.is_main_process:
            pipeline = BYOCPipeline.from_pretrained(args.output_dir).to(state.device)  # what a user will load
            write_report(pipeline, cells, args, minutes=(time.perf_counter() - started) / 60)
            if args.push_to_hub:
                push_pipeline(args, pipeline, cells, held_out_cells)


if __name__ == "__main__":
    main(parse_args())
