"""The arguments that say which cells a script works on; the same in training, evaluation and baselines."""

import argparse

from diffusers_byoc import VolumeProcessor
from diffusers_byoc.data import CellDataset, CellFolder, PhantomCells


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="folder of cells (OME-TIFF, TIFF, .npy, .npz; metadata.csv); phantoms if left out")
    add("--label", nargs="+", help="train on the cells of these labels only (phantoms: nocodazole if left out)")
    add("--num_phantoms", type=positive, default=400, help="phantoms to train on, without --train_data_dir")
    add("--sample_size", type=positive, default=64, help="edge of the cube the cells are centred in, in voxels")
    add("--oversize", choices=["error", "rescale", "crop"], default="error", help="what to do with larger cells")
    add("--cache_gb", type=float, default=4.0, help="memory for preprocessed cells; the others are read again")
    add("--dataloader_num_workers", type=int, default=0)


def load_cells(args: argparse.Namespace, channel_names: tuple[str, ...]) -> CellDataset:
    """The cells that `args` name, as volumes of these channels: files, or phantoms."""
    processor = VolumeProcessor(
        sample_size=args.sample_size,
        num_channels=len(channel_names),
        channel_names=channel_names,
        oversize=args.oversize,
    )
    if args.train_data_dir:
        return CellFolder(args.train_data_dir, processor, label=args.label, cache_gb=args.cache_gb)
    return PhantomCells(args.num_phantoms, processor, args.label or ["nocodazole"], args.seed, args.cache_gb)
