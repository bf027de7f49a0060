"""The arguments that say which cells a script works on; the same in training, evaluation and baselines."""

import argparse
from pathlib import Path

from accelerate import PartialState

from diffusers_byoc import VolumeProcessor
from diffusers_byoc.data import CellDataset, CellFolder, PhantomCells, read_split, split_cells, write_split


SPLIT_NAME = "split.json"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="folder of cells (OME-TIFF, TIFF, .npy, .npz; metadata.csv); phantoms if left out")
    add("--label_column", help="column of the classes (default: label, if there is one)")
    add("--label", nargs="+", help="train on the cells of these labels only (phantoms: nocodazole if left out)")
    add("--num_phantoms", type=positive, default=400, help="phantoms to train on, without other cells")
    add("--sample_size", type=positive, default=64, help="edge of the cube the cells are centred in, in voxels")
    add("--voxel_size_um", type=float, nargs="+", help="resample the cells to it: one number, or z y x")
    add("--oversize", choices=["error", "rescale", "crop"], default="error", help="what to do with larger cells")
    add("--cache_gb", type=float, default=1.0, help="memory for preprocessed cells; the others are read again")
    add("--dataloader_num_workers", type=int, default=0)
    add = parser.add_argument_group("cells to train on, cells held out").add_argument
    add("--held_out", type=float, default=0.2, help="share of the cells that is not trained on; 0 trains on all")
    add("--num_folds", type=positive, help="hold out one of this many folds instead")
    add("--fold", type=int, help="which fold to hold out, from 0")
    add("--group_column", help="cells of one value are never separated (default: source, if there is one)")
    add("--split_seed", type=int, default=0, help="of the choice of held-out cells; not changed by --seed")
    add("--split_file", help=f"the {SPLIT_NAME} of another run, to use the same cells")


def load_cells(
    args: argparse.Namespace, channel_names: tuple[str, ...], run_dir: str | None = None, goes_on: bool = False
) -> tuple[CellDataset, CellDataset | None]:
    """The cells that `args` name, as volumes of these channels: those to train on, and those held out, if any.

    The split is made of all cells of the source, whatever their label, so that models of one label and of several
    hold out the same ones.

    Args:
        args: of `add_data_arguments`, and `seed`.
        channel_names: of the model.
        run_dir: where a run keeps its split, as ``split.json``; None to keep none.
        goes_on: the run in `run_dir` is older than this process, and must find its split unchanged.

    Raises:
        ValueError, OSError: if there are no such cells, or their split is not that of the run that goes on.
    """
    size = args.voxel_size_um
    processor = VolumeProcessor(
        sample_size=args.sample_size,
        num_channels=len(channel_names),
        channel_names=channel_names,
        voxel_size_um=size[0] if size and len(size) == 1 else size,
        oversize=args.oversize,
    )
    if args.train_data_dir:
        cells = CellFolder(
            args.train_data_dir, processor, args.label, args.cache_gb, args.label_column, args.group_column
        )
    else:
        cells = PhantomCells(args.num_phantoms, processor, args.label or ["nocodazole"], args.seed, args.cache_gb)

    if args.split_file:
        split = read_split(args.split_file, cells.population)
    else:
        split = split_cells(cells.population, args.held_out, args.num_folds, args.fold, args.split_seed)
    if run_dir is not None:
        path = Path(run_dir) / SPLIT_NAME
        if goes_on and path.is_file():
            if read_split(path, cells.population) != split:
                raise ValueError(f"{path}: the run that goes on holds out other cells; give --split_file {path}")
        elif PartialState().is_main_process:
            write_split(path, split)

    train, held_out = cells.subset(split.train), cells.subset(split.held_out)
    if not len(train):
        raise ValueError("no cells to train on: all cells of these labels are held out; hold out fewer")
    return train, held_out if len(held_out) else None
