"""From the microscope to a data set: cut every labelled cell out of 3D stacks and write them as Parquet.

byoc-prepare --images "plates/*.ome.tif" --labels "masks/*.tif" --metadata treatments.csv --output_dir cells

Run it again to go on after an interruption. `docs/data.md` tells more.
"""

import argparse
import sys
from pathlib import Path

from ..volumes import voxel_size_triple
from .command_line import make_parser


CHANNELS = ("cell=0", "nucleus=1")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without a look at the files."""
    parser = make_parser(__doc__, "byoc-prepare")
    add = parser.add_argument
    formats = "OME-TIFF, TIFF, OME-Zarr (plates too), CZI, ND2, LIF, Imaris, NIfTI, .npy"
    add("--images", nargs="+", required=True, help=f"stacks: {formats}; paths or patterns")
    add("--labels", nargs="+", help="their 3D label images, found by name (default: those within an OME-Zarr)")
    add("--nucleus_labels", nargs="+", help="label images of the nuclei: cells without one are dropped")
    add("--metadata", help="CSV: column file_name, the label, and columns that are carried on (default: no labels)")
    add("--label_column", default="label", help="column of --metadata that names the class")
    add("--output_dir", required=True, help="the data set goes here")
    add("--push_to_hub", metavar="ORG/NAME", help="and there")
    add("--private", action="store_true", help="make the repository of --push_to_hub a private one")
    # the crops
    add("--channels", nargs="+", default=CHANNELS, metavar="NAME=CHANNEL", help="number from 0, or name in the file")
    add("--scene", help="name or number (from 0) of the image, in files of several")
    add("--time", metavar="N", help="time point of series, from 0; all: each is a source, with its number as a column")
    add("--voxel_size_um", type=float, nargs="+", default=[1.0], help="of the crops: one number, or z y x")
    add("--source_voxel_size_um", type=float, nargs=3, metavar=("Z", "Y", "X"), help="of stacks that do not say")
    add("--margin_um", type=float, default=2.0, help="added around the bounding box of each label")
    mask_out = ["background", "neighbours", "none"]
    add("--mask_out", choices=mask_out, default="background", help="what is replaced by the background's intensity")
    # which cells
    add("--min_volume_um3", type=float, default=100.0, help="smaller labels are dropped")
    add("--min_nucleus_contrast", type=float, default=0.7, help="0 to 1; cells below have no nucleus, and are dropped")
    add("--keep_border", action="store_true", help="keep cells that touch a face of the stack")
    add("--allow_binary_labels", action="store_true", help="a mask of 0 and one other value is one cell, in any parts")
    # the run
    add("--num_proc", type=int, default=1, help="processes")
    add("--dask_scheduler", metavar="ADDRESS", help="run on the workers of this Dask cluster, who see the same files")
    add("--max_memory_gb", type=float, default=4.0, help="per process; larger stacks are read cell by cell, slower")
    add("--strict", action="store_true", help="stop at the first stack that cannot be used")
    args = parser.parse_args(argv)
    pairs = [channel.partition("=")[::2] for channel in args.channels]
    args.channels = dict(pairs)
    if len(args.channels) < len(pairs) or not all(name and channel for name, channel in pairs):
        parser.error(f"--channels: expected NAME=CHANNEL, each name once, as in {' '.join(CHANNELS)}")
    for name in ("voxel_size_um", "source_voxel_size_um"):
        sizes = getattr(args, name)
        try:
            setattr(args, name, sizes and voxel_size_triple(sizes if len(sizes) != 1 else sizes[0]))
        except ValueError as error:
            parser.error(f"--{name}: {error}")
    for name in ("margin_um", "min_volume_um3", "min_nucleus_contrast"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name}: expected a number from 0 on, got {getattr(args, name)}")
    for name in ("num_proc", "max_memory_gb"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name}: expected a positive number, got {getattr(args, name)}")
    if args.time not in (None, "all"):
        if not args.time.isdecimal():
            parser.error(f"--time: expected a number from 0 on, or all, got {args.time}")
        args.time = int(args.time)
    return args


def prepare(args: argparse.Namespace) -> int:
    """Make the data set. Returns the exit status: 0 if every stack was used.

    Raises:
        ValueError, OSError: if the arguments do not fit the files, or no cell is left; the message says what to mend.
        ImportError: if what reads the files is not installed.
    """
    from huggingface_hub import HfApi
    from tqdm.auto import tqdm

    from ..data.microscope import planning, preparation
    from ..whole_files import lock_folder

    output_dir, has_times = Path(args.output_dir), args.time == "all"
    names = preparation.CutSettings.__dataclass_fields__
    settings = preparation.CutSettings(**{name: value for name, value in vars(args).items() if name in names})
    jobs, columns = planning.plan_jobs(
        args.images, args.labels, args.nucleus_labels, args.metadata, args.label_column, args.time, args.scene
    )
    if taken := set(preparation.features_of([], [], has_times)) & set(columns):
        raise ValueError(
            f"Expected other names of columns in {args.metadata} than the data set's own, got {sorted(taken)}. Rename"
            " them."
        )
    preparation.check_output_dir(output_dir)
    class_names = sorted({job.label for job in jobs})
    identity = settings.identity() | {"class_names": class_names, "columns": columns, "time": args.time}
    identity["nucleus_labels"] = args.nucleus_labels is not None
    if args.push_to_hub:  # now, to learn of a wrong name or a missing login before the work
        HfApi().create_repo(args.push_to_hub, repo_type="dataset", private=args.private, exist_ok=True)
    with lock_folder(output_dir):
        records, failed = preparation.records_of(output_dir, jobs, identity), []
        done = {record["source"] for record in records}
        left = [job for job in jobs if job.source not in done]
        features = preparation.features_of(class_names, columns, has_times)
        if left:
            (output_dir / "README.md").unlink(missing_ok=True)  # it tells of the shards that there were
        with tqdm(total=len(jobs), initial=len(done), desc="Cutting", unit="stack") as progress:
            where = (args.num_proc, args.dask_scheduler)
            for record in preparation.prepare_stacks(left, settings, features, output_dir, *where):
                (failed if "error" in record else records).append(record)
                progress.update()
                progress.set_postfix(cells=sum(record["cells"] for record in records), failed=len(failed))
                if failed and args.strict:
                    raise ValueError(f"{failed[0]['error']} (--strict; {len(records)} stacks are done)")
        print("\n" + preparation.write_reports(output_dir, records, failed))
        preparation.write_card(output_dir, records, features, identity)
        if not any(record["cells"] for record in records):
            raise ValueError("Expected at least one cell, got none that was kept. See dropped.csv and report.csv.")
        if args.push_to_hub:
            HfApi().upload_folder(
                repo_id=args.push_to_hub,
                repo_type="dataset",
                folder_path=output_dir,
                allow_patterns=["README.md", "data/*.parquet"],
                delete_patterns=["data/*.parquet"],  # of stacks that are no longer part of it
            )
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """`prepare`, with bad input as one line in place of a traceback."""
    args = parse_args(argv)
    try:
        return prepare(args)
    except (OSError, ValueError, ImportError) as error:
        from ..data.microscope.preparation import is_full_disk

        if is_full_disk(error):
            error = f"{args.output_dir}: the disk is full; make room, and run the same command again to go on"
        raise SystemExit(f"byoc-prepare: error: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
