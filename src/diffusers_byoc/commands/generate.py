"""Generate cells from a trained pipeline: the same ones on any number of processes, after any interruption.

byoc-generate --pretrained outputs/demo --num_samples 100 --output_dir cells
byoc-generate --pretrained org/name --conditions dose_um=2.5 --num_samples 100 --output_dir cells
byoc-generate --pretrained org/name --given_channels nucleus=nuclei --num_samples 100 --output_dir cells_of_nuclei
byoc-generate --pretrained org/name --class_labels nocodazole blebbistatin --num_samples 200 --output_dir cells
byoc-generate --pretrained org/name --class_labels nocodazole blebbistatin --only 17 --output_dir one_of_them
torchrun --nproc_per_node 4 -m diffusers_byoc.commands.generate --pretrained org/name --num_samples 5000 ...
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import make_parser, one_line_errors
from .data_arguments import positive


if TYPE_CHECKING:
    import torch


# -> the package that writes them
FORMATS = {"ome.tif": "tifffile", "ome.zarr": "ome_zarr", "npz": "numpy", "parquet": "datasets"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "byoc-generate")
    add = parser.add_argument
    add("--pretrained", required=True, help="folder of a saved pipeline, or its name on the Hub")
    add("--output_dir", required=True, help="the cells go here; what is there already is not made again")
    add("--num_samples", type=positive, default=8, help="how many cells there shall be (default: 8)")
    add("--class_labels", nargs="+", metavar="CLASS", help="names or numbers, which the cells have in turn")
    help_text = "of the numbers that the model was trained on, in their own units: dose_um=2.5"
    add("--conditions", nargs="+", default=[], metavar="NAME=VALUE", help=help_text)
    help_text = "how much more typical of their class and conditions the cells are (default: the pipeline's)"
    add("--guidance_scale", type=float, help=help_text)
    help_text = "files, or a folder of them, whose channel NAME the cells have in turn: nucleus=nuclei/"
    add("--given_channels", nargs="+", default=[], metavar="NAME=PATH", help=help_text)
    add("--num_inference_steps", type=positive, help="denoising steps (default: the pipeline's)")
    add("--num_texture_steps", type=int, help="steps of the texture, 0 for none (default: the pipeline's)")
    add("--seed", type=int, default=0, help="of all cells; each depends on it and its own number alone (default: 0)")
    add("--format", choices=FORMATS, default="ome.tif", help="of the files (default: ome.tif)")
    help_text = "cells at a time; changes them by rounding, at most (default: as many as memory holds)"
    add("--batch_size", type=positive, help=help_text)
    add("--only", type=int, nargs="+", metavar="CELL", help="the cells of these numbers, in place of --num_samples")
    add("--device", help="cpu, cuda, ... (default: the accelerator, if there is one)")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="float32", help="of the networks' arithmetic (default: float32)")
    args = parser.parse_args(argv)
    args.conditions = dict(_condition(parser, text) for text in args.conditions)
    args.given_channels = [text.partition("=")[::2] for text in args.given_channels]
    if args.seed < 0:
        parser.error(f"argument --seed: expected at least 0, got {args.seed}")
    if args.only and (min(args.only) < 0 or args.format == "parquet"):
        parser.error(f"argument --only: expected numbers from 0 on, and files of a cell each, got {args.only}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(name="byoc-generate"):
        generate(args)


def generate(args: argparse.Namespace) -> None:
    """What the command does, as `parse_args` understood it."""
    import torch  # after `--help` and mistakes, which need not wait for it
    from diffusers import DiffusionPipeline

    from ..optional import optional
    from ..pipelines import BYOCPipeline
    from ..pipelines.class_labels import prepare_class_labels
    from ..pipelines.generation import generate_cells
    from ..pipelines.loading import hub_errors
    from ..whole_files import lock_folder, remove_left_overs

    optional(FORMATS[args.format], "zarr" if args.format == "ome.zarr" else "data")  # before hours of generating
    with hub_errors(args.pretrained):
        options = {"dtype": getattr(torch, args.dtype), "use_safetensors": True}
        pipeline = DiffusionPipeline.from_pretrained(args.pretrained, **options)
    pipeline.to(args.device or own_device())
    pipeline.set_progress_bar_config(desc="Denoising", leave=False)
    labels = args.class_labels
    given_channels = files_of_channels(args.given_channels)
    for_all = {"conditions": args.conditions or None, "guidance_scale": args.guidance_scale}
    for_all["given_channels"] = given_channels or None
    given = [f"--{name}" for name, value in for_all.items() if value is not None]
    is_ours = isinstance(pipeline, BYOCPipeline)
    if given and not is_ours:
        raise ValueError(
            f"Expected no {' '.join(given)} for {type(pipeline).__name__}, whose model takes none. Leave them out."
        )
    if is_ours:
        label2id = pipeline.config.label2id or {}
        labels = labels and [name if name in label2id else _number(name) for name in labels]
        indices = prepare_class_labels(pipeline, labels, len(labels or [None]), "cpu")
        labels = labels and indices.tolist()
        if args.num_texture_steps and pipeline.texture_unet is None:
            raise ValueError(
                f"Expected a pipeline with a texture_unet for --num_texture_steps {args.num_texture_steps}, got"
                f" {args.pretrained} without. Leave them out."
            )
    elif args.num_texture_steps is not None:
        raise ValueError(
            f"Expected no --num_texture_steps for {type(pipeline).__name__}, which draws no texture of its own, got"
            f" {args.num_texture_steps}. Leave them out."
        )
    elif labels:
        raise ValueError(
            f"Expected no --class_labels for {type(pipeline).__name__}, whose model has no classes, got"
            f" {' '.join(labels)}. Leave them out."
        )

    folder, share = Path(args.output_dir), share_of_launcher()
    is_first, num_cells = share[0] == 0, len(set(args.only)) if args.only else args.num_samples
    with lock_folder(folder) if is_first else nullcontext():
        if is_first:
            remove_left_overs(folder)
        wait_for_others(share)
        steps = (args.num_inference_steps, args.num_texture_steps)
        settings = (labels, *steps, args.seed, args.batch_size, f".{args.format}")
        generate_cells(pipeline, folder, args.num_samples, *settings, share=share, only=args.only, **for_all)
        wait_for_others(share)
    if is_first:
        print(f"{num_cells} cells in {folder}.")


def files_of_channels(given: Sequence[tuple[str, str]]) -> dict[str, list[Path]]:
    """Name -> files, of the paths that a command line gives to channels.

    Raises:
        FileNotFoundError: if there are none.
    """
    from ..data.formats.reading import ending_of
    from ..data.sets.folder import find_volumes

    files: dict[str, list[Path]] = {}
    for name, text in given:
        path = Path(text)
        found = find_volumes(path) if path.is_dir() and not ending_of(path) else [path]
        if not text or not found or not found[0].exists():
            raise FileNotFoundError(
                f"Expected files of the channel {name} in {text or 'a path'}, got none. Say --given_channels"
                " NAME=PATH."
            )
        files.setdefault(name, []).extend(found)
    return files


def share_of_launcher() -> tuple[int, int]:
    """(process, number of processes), as torchrun or accelerate say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device() -> "torch.device":
    """The accelerator, if there is one, of this process among those of the machine; or else the CPU."""
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count())


def wait_for_others(share: tuple[int, int]) -> None:
    """Meet the other processes, if there are any; some may have much more to do."""
    if share[1] > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()


def _condition(parser: argparse.ArgumentParser, text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        parser.error(f"argument --conditions: expected NAME=NUMBER, got {text}")


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


if __name__ == "__main__":
    main()
