"""Arguments about cells in three groups, so that a command offers those it obeys; imports nothing heavy.

`cells.read_cells` obeys the first group, `cells.split_for_training` the second.
"""

import argparse


SPLIT_NAME = "split.json"


def positive(text: str) -> int:
    """Type of an argument: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Where cells come from, and how they become network input."""
    add = parser.add_argument_group("cells").add_argument
    add("--train_data_dir", help="folder of cells (OME-TIFF, TIFF, .npy, .npz; metadata.csv); phantoms if left out")
    add("--dataset_name", help="data set on the Hub, folder or pattern (shards/*.tar) of Parquet or webdataset shards")
    add("--dataset_config_name", help="its configuration")
    add("--image_column", default="volume", help="column of a table that holds the volumes")
    add("--label_column", help="column of the classes (default: label, if there is one)")
    add("--group_column", help="cells of one value are never separated (default: source, if there is one)")
    add("--label", nargs="+", help="the cells of these labels only (phantoms: nocodazole if left out)")
    add("--num_phantoms", type=positive, default=400, help="phantoms to make, without other cells")
    help_text = "doses of the phantoms in µM, in turn, as the column dose_um (default: full effect)"
    add("--phantom_doses", type=float, nargs="+", metavar="DOSE", help=help_text)
    add("--sample_size", type=positive, default=64, help="edge of the cube the cells are centred in, in voxels")
    add("--voxel_size_um", type=float, nargs="+", help="resample the cells to it: one number, or z y x")
    add("--oversize", choices=["error", "rescale", "crop"], default="error", help="what to do with larger cells")
    add("--cache_gb", type=float, default=1.0, help="memory for preprocessed cells; the others are read again")


def add_split_arguments(parser: argparse.ArgumentParser):
    """How cells are parted in folds. Returns the group, for a command's own way to part them."""
    group = parser.add_argument_group("cells to train on, cells held out")
    add = group.add_argument
    add("--num_folds", type=positive, help="part the cells in this many folds, each held out once")
    add("--fold", type=int, help="which fold to hold out, from 0")
    add("--split_seed", type=int, default=0, help="of the choice of held-out cells; not changed by --seed")
    add("--split_file", help=f"the {SPLIT_NAME} of another run, to use the same cells")
    return group


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How a training is fed with its cells."""
    add = parser.add_argument_group("loading").add_argument
    flag = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--dataloader_num_workers", type=int, default=0, help="processes that read cells")
    add("--streaming", **flag, help="read tables in passing")
    add("--shuffle_buffer_size", type=positive, default=1000, help="cells a process draws from when streaming")
    rotations = ["none", "quarter_turns", "axial", "full"]  # data.augmentation.ROTATIONS, without importing torch
    add("--augmentation", choices=rotations, default="none", help="turn and mirror each cell anew; axial: about z")
    add("--intensity_jitter", type=float, default=0.0, help="of the augmentation: gammas from 1 / (1 + j) to 1 + j")
