"""Train BYOC: the multi-codebook autoencoder, then the joint latent diffusion, then a saved pipeline and a report.

accelerate launch examples/train_byoc.py                                            the demo, on phantom cells
accelerate launch examples/train_byoc.py --preset paper --train_data_dir my_cells   the paper's Tables 2 and 3
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from data_arguments import add_data_arguments, load_cells, positive
from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel, PatchDiscriminator3D
from diffusers_byoc.data import CellDataset
from diffusers_byoc.training import (
    StepBatches,
    adaptive_weight,
    adversarial_loss,
    check_finite,
    diffusion_loss,
    discriminator_loss,
    encode_batches,
    fair_num_threads,
    fastest_precision,
    is_cpu_training,
    latent_statistics,
    load_checkpoint,
    mean_losses,
    process_share,
    reconstruction_loss,
    save_checkpoint,
    step_generator,
)
from diffusers_byoc.visualization import compare_volumes
from report import write_report


logger = get_logger(__name__, log_level="INFO")
CONFIGS = Path(__file__).parent / "configs"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    flag = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--preset", default="demo", help="demo, paper, or the path of a JSON file like those in examples/configs")
    add("--output_dir", default="outputs/demo", help="pipeline, checkpoints, logs and report go here")
    add("--stage", choices=["all", "autoencoder", "diffusion"], default="all")
    add("--seed", type=int, default=0)
    add_data_arguments(parser)
    # both stages
    add("--mixed_precision", choices=["auto", "no", "fp16", "bf16"], default="auto", help="auto: the fastest here")
    add("--num_cpu_threads", type=positive, help="per process, without a GPU (default: a fair share of all cores)")
    add("--optimizer", choices=["adam", "adamw"], default="adam")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.99)
    add("--adam_weight_decay", type=float, default=0.0)
    add("--lr_warmup_steps", type=int, default=0)
    add("--max_grad_norm", type=float, default=1.0, help="0 clips nothing")
    add("--gradient_accumulation_steps", type=positive, default=1)
    add("--gradient_checkpointing", **flag, help="less memory for more time")
    for stage in ("autoencoder", "diffusion"):
        add(f"--{stage}_max_train_steps", type=positive, default=100_000)
        add(f"--{stage}_train_batch_size", type=positive, default=2, help="per process")
        add(f"--{stage}_learning_rate", type=float, default=3e-4 if stage == "autoencoder" else 1e-4)
        add(f"--{stage}_lr_scheduler", default="constant", help="any of diffusers' schedules")
    # autoencoder
    add("--discriminator_start", type=int, default=10_000, help="step at which the discriminator joins")
    add("--discriminator_weight", type=float, default=0.1, help="of the adversarial gradient against reconstruction's")
    # diffusion
    add("--vqvae_path", help="trained autoencoder for --stage diffusion (default: OUTPUT_DIR/vqvae)")
    add("--class_conditional", **flag, help="give the labels to the U-Net")
    add("--loss_type", choices=["l1", "l2"], default="l1")
    add("--ema_decay", type=float, default=0.995)
    add("--use_ema_warmup", **flag, help="diffusers' warm-up of the moving average, up to --ema_decay")
    add("--num_inference_steps", type=positive, default=1000, help="the saved pipeline's default")
    # checkpoints, logs, samples
    add("--checkpointing_steps", type=positive, default=5000)
    add("--checkpoints_total_limit", type=positive, default=2)
    add("--resume_from_checkpoint", help='"latest", or the name of a checkpoint')
    add("--validation_steps", type=positive, default=200, help="steps between sample pictures in the log")
    add("--num_samples", type=positive, default=8, help="cells to generate for the report")
    add(
        "--cell_threshold",
        type=float,
        help="the report's cell is brighter than this (default: Otsu's; membrane: 0.05)",
    )

    preset = parser.parse_known_args(argv)[0].preset
    path = CONFIGS / f"{preset}.json" if (CONFIGS / f"{preset}.json").is_file() else Path(preset)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.json")))
        parser.error(f"--preset {preset}: neither one of {known} nor a file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        parser.error(f"{path}: not a JSON file ({error})")
    unknown = set(config.get("arguments", {})) - set(vars(parser.parse_args([])))
    if unknown:
        parser.error(f"{path}: unknown arguments {sorted(unknown)}")
    parser.set_defaults(**config.get("arguments", {}))
    args = parser.parse_args(argv)
    if args.stage == "all" and args.resume_from_checkpoint not in (None, "latest"):
        parser.error(f"checkpoint {args.resume_from_checkpoint} belongs to one stage: say --stage, or 'latest'")
    args.vqvae, args.unet, args.scheduler = (config.get(name, {}) for name in ("vqvae", "unet", "scheduler"))
    return args


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
    if args.stage == "diffusion":
        path = Path(args.output_dir) / "vqvae"
        if args.vqvae_path is None and not path.is_dir():
            raise ValueError(f"{path}: no trained autoencoder; run --stage autoencoder first, or give --vqvae_path")
        vqvae = MultiCodebookVQModel.from_pretrained(args.vqvae_path or path)
    else:
        with torch.device("meta"):  # no memory, no random numbers
            vqvae = make_autoencoder(args)
    if args.stage != "autoencoder":
        with torch.device("meta"):
            make_unet(args, vqvae, num_classes=1)
    return vqvae


def start_stage(args: argparse.Namespace, stage: str) -> Accelerator:
    """An accelerator of its own for each stage, so that its checkpoints hold that stage alone."""
    mixed_precision = fastest_precision() if args.mixed_precision == "auto" else args.mixed_precision
    if is_cpu_training():
        torch.set_num_threads(args.num_cpu_threads or fair_num_threads())
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        cpu=is_cpu_training(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="tensorboard",
        project_config=ProjectConfiguration(str(output_dir / stage), logging_dir=str(output_dir / "logs")),
    )
    accelerator.init_trackers(stage, {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool))})
    set_seed(args.seed)
    logger.info(f"{stage}: {accelerator.num_processes} process(es), {accelerator.device}, {mixed_precision=}")
    return accelerator


def end_stage(accelerator: Accelerator) -> None:
    """Close the logs; `Accelerator.end_training` would also end the process group that the next stage needs."""
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()


def make_optimizer(args: argparse.Namespace, stage: str, parameters, num_steps: int):
    """Optimizer and learning-rate schedule of a stage."""
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = optimizer_class(
        [parameter for parameter in parameters if parameter.requires_grad],
        lr=getattr(args, f"{stage}_learning_rate"),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
    )
    schedule = getattr(args, f"{stage}_lr_scheduler")
    warmup_steps = args.lr_warmup_steps
    return optimizer, get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)


def remaining_batches(accelerator: Accelerator, args: argparse.Namespace, stage: str, num_cells: int, first_step: int):
    """What this process has left to see of a stage."""
    accumulation = args.gradient_accumulation_steps
    return StepBatches(
        num_cells,
        getattr(args, f"{stage}_train_batch_size"),
        first_step * accumulation,
        (getattr(args, f"{stage}_max_train_steps") - first_step) * accumulation,
        args.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )


def optimizer_step(accelerator: Accelerator, args: argparse.Namespace, model, optimizer, step: int) -> None:
    """Clip, check and apply the gradients; within an accumulation, leave them to grow."""
    if accelerator.sync_gradients:
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
        if accelerator.scaler is None:  # fp16's scaler skips such a step, and lowers its scale
            check_finite(accelerator, norm, "gradient", step)
    optimizer.step()
    optimizer.zero_grad()


def log_volumes(accelerator: Accelerator, rows: dict[str, torch.Tensor], channel_names, step: int) -> None:
    """Orthogonal slices of up to four cells a row, to TensorBoard."""
    rows = {name: (volumes[:4].float() / 2 + 0.5).clamp(0, 1).cpu() for name, volumes in rows.items()}
    figure = compare_volumes(rows, channel_names)
    accelerator.get_tracker("tensorboard", unwrap=True).add_figure("samples", figure, step)


def train_autoencoder(args: argparse.Namespace, cells: CellDataset) -> MultiCodebookVQModel:
    """Stage one (section 3.1, eq. 6-8). Returns the trained autoencoder, also saved to OUTPUT_DIR/vqvae."""
    accelerator = start_stage(args, "autoencoder")
    directory = Path(args.output_dir) / "autoencoder"
    max_steps, accumulation = args.autoencoder_max_train_steps, args.gradient_accumulation_steps

    # 1. models and optimizers
    vqvae = make_autoencoder(args)
    discriminator = PatchDiscriminator3D(vqvae.config.num_channels)
    if args.gradient_checkpointing:
        vqvae.enable_gradient_checkpointing()
    optimizer, lr_scheduler = make_optimizer(args, "autoencoder", vqvae.parameters(), max_steps)
    discriminator_optimizer, discriminator_lr_scheduler = make_optimizer(
        args, "autoencoder", discriminator.parameters(), max_steps - args.discriminator_start
    )
    vqvae, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        vqvae, discriminator, optimizer, discriminator_optimizer
    )
    accelerator.register_for_checkpointing(lr_scheduler, discriminator_lr_scheduler)
    bare_vqvae, bare_discriminator = accelerator.unwrap_model(vqvae), accelerator.unwrap_model(discriminator)
    first_step = load_checkpoint(accelerator, directory, args.resume_from_checkpoint)

    # 2. data: the batches that this process has left
    batches = remaining_batches(accelerator, args, "autoencoder", len(cells), first_step)
    loader = DataLoader(cells, batch_sampler=batches, num_workers=args.dataloader_num_workers)

    # 3. train
    hidden = not accelerator.is_local_main_process
    progress = tqdm(total=max_steps, initial=first_step, desc="Autoencoder", disable=hidden)
    vqvae.train()
    for micro_step, batch in enumerate(loader, first_step * accumulation):
        step = micro_step // accumulation + 1
        volumes = batch["volumes"].to(accelerator.device)
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
                bare_discriminator.requires_grad_(False)
                with accelerator.autocast():
                    adversarial = adversarial_loss(bare_discriminator(reconstruction))
                bare_discriminator.requires_grad_(True)
                weight = adaptive_weight(loss_reconstruction, adversarial, bare_vqvae.decoder.conv_out.weight)
                loss = loss + args.discriminator_weight * weight * adversarial
                losses["loss/adversarial"] = adversarial
            check_finite(accelerator, loss, "loss", step)
            accelerator.backward(loss)
            optimizer_step(accelerator, args, vqvae, optimizer, step)

            # discriminator
            if step > args.discriminator_start:
                loss_discriminator = discriminator_loss(discriminator(volumes), discriminator(reconstruction.detach()))
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
        if accelerator.is_main_process and (step % args.validation_steps == 0 or step == max_steps):
            rows = {"cells": volumes, "reconstructed": reconstruction.detach()}
            log_volumes(accelerator, rows, bare_vqvae.config.channel_names, step)
        if step % args.checkpointing_steps == 0 or step == max_steps:
            save_checkpoint(accelerator, directory, step, args.checkpoints_total_limit)

    # 4. save
    accelerator.wait_for_everyone()
    vqvae = accelerator.unwrap_model(vqvae, keep_fp32_wrapper=False).eval()
    if vqvae.config.latent_scaling == "standardize":
        latents = encode_batches(vqvae, (batch["volumes"] for batch in DataLoader(cells, batch_size=8)))
        vqvae.set_latent_statistics(latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
    if accelerator.is_main_process:
        vqvae.save_pretrained(Path(args.output_dir) / "vqvae")
    end_stage(accelerator)
    return vqvae


def train_diffusion(args: argparse.Namespace, cells: CellDataset, vqvae: MultiCodebookVQModel) -> BYOCPipeline:
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
    optimizer, lr_scheduler = make_optimizer(args, "diffusion", unet.parameters(), max_steps)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema = EMAModel(unet.parameters(), decay=args.ema_decay, use_ema_warmup=args.use_ema_warmup)
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    first_step = load_checkpoint(accelerator, directory, args.resume_from_checkpoint)
    ema.to(accelerator.device)  # a restored one lies on the CPU

    # 2. data: every cell encoded once
    vqvae.to(accelerator.device).requires_grad_(False)
    loader = DataLoader(cells, batch_size=8, num_workers=args.dataloader_num_workers)
    hidden = not accelerator.is_local_main_process
    with accelerator.autocast():
        latents = encode_batches(vqvae, (batch["volumes"] for batch in tqdm(loader, desc="Encoding", disable=hidden)))
    statistics = latent_statistics(vqvae, latents)
    accelerator.log(statistics, step=0)
    logger.info(f"latents, normalised: {', '.join(f'{name} {value:.3f}' for name, value in statistics.items())}")
    latents, labels = vqvae.normalize_latents(latents), torch.tensor(cells.labels)
    batches = remaining_batches(accelerator, args, "diffusion", len(cells), first_step)

    # 3. train
    progress = tqdm(total=max_steps, initial=first_step, desc="Diffusion", disable=hidden)
    unet.train()
    global_batch_size = args.diffusion_train_batch_size * accelerator.num_processes
    for micro_step, indices in enumerate(batches, first_step * accumulation):
        step = micro_step // accumulation + 1
        clean = latents[indices].to(accelerator.device)
        class_labels = labels[indices].to(accelerator.device) if args.class_conditional else None
        # drawn for all processes, then shared out, so that their number does not change the run
        generator = step_generator(args.seed, micro_step, "diffusion")
        noise = torch.randn(global_batch_size, *clean.shape[1:], generator=generator)
        timesteps = torch.randint(len(noise_scheduler), (global_batch_size,), generator=generator)
        noise, timesteps = (
            process_share(x, accelerator.process_index, accelerator.num_processes).to(accelerator.device)
            for x in (noise, timesteps)
        )

        with accelerator.accumulate(unet):
            loss = diffusion_loss(unet, noise_scheduler, clean, noise, timesteps, class_labels, args.loss_type)
            check_finite(accelerator, loss, "loss", step)
            accelerator.backward(loss)
            optimizer_step(accelerator, args, unet, optimizer, step)
        if (micro_step + 1) % accumulation:
            continue

        # end of a step
        lr_scheduler.step()
        ema.step(unet.parameters())
        logs = mean_losses(accelerator, {"loss/diffusion": loss})
        accelerator.log(logs | {"lr": lr_scheduler.get_last_lr()[0]}, step=step)
        progress.update()
        progress.set_postfix(loss=f"{logs['loss/diffusion']:.4f}")
        if accelerator.is_main_process and (step % args.validation_steps == 0 or step == max_steps):
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            pipeline = make_pipeline(args, cells, vqvae, accelerator.unwrap_model(unet), noise_scheduler)
            pipeline.set_progress_bar_config(disable=True)
            with accelerator.autocast():
                samples = pipeline(
                    4,
                    class_labels=0 if args.class_conditional else None,
                    output_type="pt",
                    num_inference_steps=min(20, len(noise_scheduler)),
                    generator=torch.Generator().manual_seed(args.seed),
                ).volumes
            ema.restore(unet.parameters())
            unet.train()
            log_volumes(accelerator, {"generated": samples * 2 - 1}, vqvae.config.channel_names, step)
        if step % args.checkpointing_steps == 0 or step == max_steps:
            save_checkpoint(accelerator, directory, step, args.checkpoints_total_limit)

    # 4. the moving average is the model
    accelerator.wait_for_everyone()
    ema.copy_to(unet.parameters())
    unet = accelerator.unwrap_model(unet, keep_fp32_wrapper=False).eval()
    pipeline = make_pipeline(args, cells, vqvae, unet, noise_scheduler)
    if accelerator.is_main_process:
        pipeline.save_pretrained(args.output_dir)
    end_stage(accelerator)
    return pipeline


def make_pipeline(args, cells: CellDataset, vqvae, unet, noise_scheduler) -> BYOCPipeline:
    return BYOCPipeline(
        vqvae,
        unet,
        noise_scheduler,
        default_num_inference_steps=args.num_inference_steps,
        label2id={name: index for index, name in enumerate(cells.class_names)} if args.class_conditional else None,
        volume_processor_config=dict(cells.processor.config) | {"voxel_size_um": cells.voxel_size_um},
    )


def main(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    state = PartialState(cpu=is_cpu_training())
    try:
        vqvae = check_arguments(args, state.device)
        goes_on = args.stage == "diffusion" or args.resume_from_checkpoint is not None
        cells, held_out_cells = load_cells(args, vqvae.config.channel_names, args.output_dir, goes_on)
    except (OSError, ValueError) as error:  # bad input: the message says what to mend, a traceback would hide it
        raise SystemExit(f"train_byoc.py: error: {error}") from error
    num_held_out = len(held_out_cells) if held_out_cells else 0
    logger.info(f"{len(cells)} cells, {num_held_out} more held out: {', '.join(cells.class_names)}")
    if args.stage != "diffusion":
        vqvae = train_autoencoder(args, cells)
    if args.stage != "autoencoder":
        train_diffusion(args, cells, vqvae)
        if state.is_main_process:
            pipeline = BYOCPipeline.from_pretrained(args.output_dir)  # what a user will load
            write_report(pipeline, cells, args, minutes=(time.perf_counter() - started) / 60)
    state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
