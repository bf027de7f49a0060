"""The arguments that say which cells a script works on; the same in training, evaluation and baselines."""

import argparse
from pathlib import Path

from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from diffusers_byoc import VolumeProcessor
from diffusers_byoc.data import (
    CellDataset,
    CellFolder,
    CellTable,
    PhantomCells,
    StepBatches,
    StreamBatches,
    StreamedCells,
    read_split,
    split_cells,
    write_split,
)
from diffusers_byoc.data.augmentation import ROTATIONS
from diffusers_byoc.data.folder import METADATA_NAME
from diffusers_byoc.training import ignore_termination


SPLIT_NAME = "split.json"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="folder of cells (OME-TIFF, TIFF, .npy, .npz; metadata.csv); phantoms if left out")
    add("--dataset_name", help="data set on the Hub, folder or pattern (shards/*.tar) of Parquet or webdataset shards")
    add("--dataset_config_name", help="its configuration")
    add("--image_column", default="volume", help="column of a table that holds the volumes")
    add("--label_column", help="column of the classes (default: label, if there is one)")
    add("--label", nargs="+", help="train on the cells of these labels only (phantoms: nocodazole if left out)")
    add("--num_phantoms", type=positive, default=400, help="phantoms to train on, without other cells")
    add("--sample_size", type=positive, default=64, help="edge of the cube the cells are centred in, in voxels")
    add("--voxel_size_um", type=float, nargs="+", help="resample the cells to it: one number, or z y x")
    add("--oversize", choices=["error", "rescale", "crop"], default="error", help="what to do with larger cells")
    add("--cache_gb", type=float, default=1.0, help="memory for preprocessed cells; the others are read again")
    add("--dataloader_num_workers", type=int, default=0)
    add(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read tables in passing",
    )
    add("--shuffle_buffer_size", type=positive, default=1000, help="cells a process draws from when streaming")
    add("--augmentation", choices=ROTATIONS, default="none", help="turn and mirror each cell anew; axial: about z")
    add("--intensity_jitter", type=float, default=0.0, help="of the augmentation: gammas from 1 / (1 + j) to 1 + j")
    add = parser.add_argument_group("cells to train on, cells held out").add_argument
    add("--held_out", type=float, default=0.2, help="share of the cells that is not trained on; 0 trains on all")
    add("--num_folds", type=positive, help="hold out one of this many folds instead")
    add("--fold", type=int, help="which fold to hold out, from 0")
    add("--group_column", help="cells of one value are never separated (default: source, if there is one)")
    add("--split_seed", type=int, default=0, help="of the choice of held-out cells; not changed by --seed")
    add("--split_file", help=f"the {SPLIT_NAME} of another run, to use the same cells")


def load_cells(
    args: argparse.Namespace, channel_names: tuple[str, ...], run_dir: str | None = None, goes_on: bool = False
) -> tuple[CellDataset | StreamedCells, CellDataset | StreamedCells | None]:
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
    table = args.dataset_name or (args.train_data_dir if _holds_shards(args.train_data_dir) else None)
    if args.dataset_name and args.train_data_dir:
        raise ValueError("--dataset_name and --train_data_dir are two sources of cells; give one")
    if args.streaming and not table:
        raise ValueError("--streaming needs a table of cells: --dataset_name, or shards in --train_data_dir")
    columns = {"label_column": args.label_column, "group_column": args.group_column}
    if table:
        table_class = StreamedCells if args.streaming else CellTable
        cells = table_class(table, processor, args.label, args.dataset_config_name, args.image_column, **columns)
    elif args.train_data_dir:
        cells = CellFolder(args.train_data_dir, processor, args.label, args.cache_gb, **columns)
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


def batch_loader(
    args: argparse.Namespace, cells: CellDataset | StreamedCells, batch_size: int, first_batch: int, num_batches: int
) -> DataLoader:
    """This process's batches `first_batch` to `first_batch + num_batches` of an endless run of shuffled epochs."""
    state, num_workers = PartialState(), args.dataloader_num_workers
    place = (state.process_index, state.num_processes)
    if isinstance(cells, StreamedCells):
        batches = StreamBatches(
            cells, batch_size, first_batch, num_batches, args.seed, args.shuffle_buffer_size, *place
        )
        return DataLoader(batches, batch_size=None, num_workers=num_workers, worker_init_fn=ignore_termination)
    batches = StepBatches(len(cells), batch_size, first_batch, num_batches, args.seed, *place)
    return DataLoader(cells, batch_sampler=batches, num_workers=num_workers, worker_init_fn=ignore_termination)


def indexable(cells: CellDataset | StreamedCells, num_cells: int, seed: int) -> Dataset:
    """`cells` as they are; of a stream, up to `num_cells` random ones, in memory."""
    if not isinstance(cells, StreamedCells):
        return cells
    batches = StreamBatches(cells, 1, 0, min(num_cells, len(cells)), seed)
    return [{name: value[0] for name, value in batch.items()} for batch in batches]


def _holds_shards(folder: str | None) -> bool:
    if folder is None or (Path(folder) / METADATA_NAME).is_file():
        return False
    return any(path.suffix in (".parquet", ".tar") for path in [Path(folder), *Path(folder).rglob("*")])
