"""The cells that a command line names: `data_arguments` says how."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ..data import (
    CellFolder,
    Cells,
    CellTable,
    PhantomCells,
    StreamedCells,
    VolumeProcessor,
    read_split,
    split_cells,
    write_split,
)
from ..data.formats.shards import holds_table
from ..data.sets.folder import METADATA_NAME
from .data_arguments import SPLIT_NAME


def read_cells(
    args: argparse.Namespace,
    channel_names: tuple[str, ...],
    streaming: bool = False,
    condition_columns: Sequence[str] = (),
    num_workers: int = 0,
) -> Cells:
    """All cells that `args` name, not split, as volumes of these channels.

    Args:
        args: of `add_source_arguments`, and `seed`, of the phantoms.
        channel_names: of the model.
        streaming: read a table in passing.
        condition_columns: of the numbers that each cell has beside its label.
        num_workers: processes that read them once, of a folder and of phantoms.

    Raises:
        ValueError, OSError: if there are no such cells.
        ImportError: if they need a package that is not installed.
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
        raise ValueError("Expected one source of cells, got --dataset_name and --train_data_dir. Leave one out.")
    if streaming and not table:
        raise ValueError(
            "Expected a table of cells for --streaming, got none. Give --dataset_name, or shards in --train_data_dir."
        )
    columns = {"label_column": args.label_column, "group_column": args.group_column}
    columns["condition_columns"] = condition_columns
    if args.phantom_doses and (table or args.train_data_dir):
        raise ValueError("Expected phantoms for --phantom_doses, got other cells. Leave one out.")
    if table:
        table_class = StreamedCells if streaming else CellTable
        return table_class(table, processor, args.label, args.dataset_config_name, args.image_column, **columns)
    if args.train_data_dir:
        columns["num_workers"] = num_workers
        return CellFolder(args.train_data_dir, processor, args.label, args.cache_gb, **columns)
    known = ["dose_um"] if args.phantom_doses else []
    if set(condition_columns) - set(known):
        raise ValueError(
            f"Expected --condition_columns among those of the phantoms, {known}, got {list(condition_columns)}. Give"
            " --phantom_doses with dose_um."
        )
    phenotypes = args.label or ["nocodazole"]
    return PhantomCells(
        args.num_phantoms, processor, phenotypes, args.seed, args.cache_gb, args.phantom_doses, num_workers
    )


def split_for_training(
    args: argparse.Namespace,
    cells: Cells,
    run_dir: str | Path | None = None,
    resumes: bool = False,
) -> tuple[Cells, Cells | None]:
    """The cells to train on, and those held out, if any.

    The split is made of all cells of the source, whatever their label, so that models of one label and of several
    hold out the same ones.

    Args:
        args: of `add_split_arguments`, and `held_out`, a share.
        cells: of `read_cells`.
        run_dir: where a run keeps its split, as ``split.json``; None to keep none.
        resumes: the run in `run_dir` is older than this process, and must find its split unchanged.

    Raises:
        ValueError, OSError: if nothing is left to train on, or the split is not that of the run that resumes.
    """
    if args.split_file:
        split = read_split(args.split_file, cells.population)
    else:
        split = split_cells(cells.population, args.held_out, args.num_folds, args.fold, args.split_seed)
    if run_dir is not None:
        path = Path(run_dir) / SPLIT_NAME
        if resumes and path.is_file():
            if read_split(path, cells.population) != split:
                raise ValueError(
                    f"Expected the held-out cells of {path}, got others. Give --split_file {path} to resume this run."
                )
        elif PartialState().is_main_process:
            write_split(path, split)
    train, held_out = cells.subset(split.train), cells.subset(split.held_out)
    if not len(train):
        raise ValueError("Expected cells to train on, got none: all of these labels are held out. Hold out fewer.")
    return train, held_out if len(held_out) else None


def _holds_shards(folder: str | None) -> bool:
    return folder is not None and not (Path(folder) / METADATA_NAME).is_file() and holds_table(folder)
