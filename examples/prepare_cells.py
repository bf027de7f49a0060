"""From the microscope to a data set: cut every labelled cell out of 3D stacks and write them as Parquet.

python examples/prepare_cells.py --images "plates/*.ome.tif" --labels "masks/*.tif" --metadata treatments.csv \
    --output_dir cells

Run it again to go on after an interruption. `docs/data.md` tells more.
"""

import argparse
import csv
import errno
import glob
import hashlib
import json
import logging
import multiprocessing
import os
import re
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, DatasetInfo, Features, Sequence, SplitDict, SplitInfo, Value
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from tqdm.auto import tqdm

from diffusers_byoc.data import encode_volume
from diffusers_byoc.data.metadata import read_metadata
from diffusers_byoc.data.pairing import find_files, pair_labels, pair_rows
from diffusers_byoc.data.stacks import MASK_OUT, channel_indices, cut_cells, open_stack, read_channels
from diffusers_byoc.volumes import voxel_size_triple
from diffusers_byoc.whole_files import LOCK_NAME, lock_folder, remove_left_overs, whole_or_absent


REASONS = ("touches the border", "too small", "no nucleus", "not finite")
CUT_OPTIONS = ("voxel_size_um", "margin_um", "mask_out", "min_volume_um3", "keep_border", "min_nucleus_contrast")
IDENTITY = ("source", "label", "columns", "state")  # of a stack: what its record must agree with
ROWS_PER_GROUP = 32  # cells in memory before they are written, and what a reader unpacks at once
CARD = """# {title}

{num_cells} single cells, cut out of {num_stacks} stacks by `examples/prepare_cells.py` of diffusers_byoc.

| label | cells |
| --- | --- |
{counts}

`volume` holds the bytes of a (C, Z, Y, X) array of `dtype` and `shape`, compressed by zlib
(`diffusers_byoc.data.decode_volume` unpacks a row); `source` and `label_id` say which label of which stack it was.

```json
{settings}
```
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--images", nargs="+", required=True, help="stacks: OME-TIFF, TIFF, OME-Zarr, CZI, ND2, LIF; paths or patterns"
    )
    add("--labels", nargs="+", required=True, help="their 3D label images, found by name; paths or patterns")
    add("--nucleus_labels", nargs="+", help="label images of the nuclei: cells without one are dropped")
    add("--metadata", help="CSV: column file_name, the label, and columns that are carried on (default: no labels)")
    add("--label_column", default="label", help="column of --metadata that names the class")
    add("--output_dir", required=True, help="the data set goes here")
    add("--push_to_hub", metavar="ORG/NAME", help="and there")
    add("--private", action="store_true", help="make the repository of --push_to_hub a private one")
    # the crops
    channels = ["cell=0", "nucleus=1"]
    add("--channels", nargs="+", default=channels, metavar="NAME=CHANNEL", help="number from 0, or name in the file")
    add("--scene", help="name or number of the image, in files of several")
    add("--voxel_size_um", type=float, nargs="+", default=[1.0], help="of the crops: one number, or z y x")
    add("--source_voxel_size_um", type=float, nargs=3, metavar=("Z", "Y", "X"), help="of stacks that do not say")
    add("--margin_um", type=float, default=2.0, help="added around the bounding box of each label")
    add("--mask_out", choices=MASK_OUT, default="background", help="what is replaced by the background's intensity")
    # which cells
    add("--min_volume_um3", type=float, default=100.0, help="smaller labels are dropped")
    add("--min_nucleus_contrast", type=float, default=0.7, help="0 to 1; cells below have no nucleus, and are dropped")
    add("--keep_border", action="store_true", help="keep cells that touch a face of the stack")
    # the run
    add("--num_proc", type=int, default=1, help="processes")
    add("--max_memory_gb", type=float, default=4.0, help="per process; larger stacks are read cell by cell, slower")
    add("--strict", action="store_true", help="stop at the first stack that cannot be used")
    args = parser.parse_args(argv)
    pairs = [channel.partition("=")[::2] for channel in args.channels]
    args.channels = dict(pairs)
    if len(args.channels) < len(pairs) or not all(name and channel for name, channel in pairs):
        parser.error(f"--channels: expected NAME=CHANNEL, each name once, as in {' '.join(channels)}")
    for name in ("voxel_size_um", "source_voxel_size_um"):
        sizes = getattr(args, name)
        try:
            setattr(args, name, sizes and voxel_size_triple(sizes if len(sizes) != 1 else sizes[0]))
        except ValueError as error:
            parser.error(f"--{name}: {error}")
    for name in ("margin_um", "min_volume_um3", "min_nucleus_contrast"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name}: expected a number from 0 on, got {getattr(args, name)}")
    if args.num_proc < 1 or not args.max_memory_gb > 0:
        parser.error("--num_proc and --max_memory_gb must be positive")
    return args


def plan(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """The stacks, each with its label image, class and metadata, and the names of the metadata columns."""
    labels = find_files(args.labels)
    nuclei = find_files(args.nucleus_labels) if args.nucleus_labels else []
    images = [path for path in find_files(args.images) if path not in {*labels, *nuclei}]
    label_of, nuclei_of = pair_labels(images, labels), pair_labels(images, nuclei) if nuclei else {}
    root = Path(os.path.commonpath([image.absolute().parent for image in images]))
    sources = {image: image.absolute().relative_to(root) for image in images}
    if args.metadata:
        rows = pair_rows(images, read_metadata(Path(args.metadata), args.label_column), args.metadata)
    else:  # as for folders of single cells: sub-folders are classes
        in_folders = all(len(source.parts) > 1 for source in sources.values())
        rows = {image: {args.label_column: sources[image].parts[0] if in_folders else "cell"} for image in images}
    columns = [name for name in next(iter(rows.values())) if name not in ("file_name", args.label_column)]
    if taken := {"", *features_of([], [])} & set(columns):
        raise ValueError(f"{args.metadata}: the names {sorted(taken)} are taken by the data set; rename the columns")
    jobs = []
    for image, source in sources.items():
        label, inputs = rows[image][args.label_column].strip(), [image, label_of[image], nuclei_of.get(image)]
        if not label:
            raise ValueError(f"{args.metadata}: {args.label_column} of {source} is empty; fill it in")
        source = source.as_posix()
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", source)[:80]
        job = {"name": f"{stem}-{hashlib.sha256(source.encode()).hexdigest()[:8]}", "source": source, "label": label}
        job["columns"] = {name: rows[image][name] for name in columns}
        job["state"] = [[path.stat().st_size, path.stat().st_mtime_ns] for path in inputs if path]  # to see changes by
        jobs.append(job | {"paths": [path and str(path) for path in inputs]})
    return jobs, columns


def features_of(class_names: list[str], columns: list[str]) -> Features:
    """Columns of the data set: those of `encode_volume`, then what is known of the cell."""
    return Features(
        {
            "volume": Value("binary"),
            "shape": Sequence(Value("int64")),
            "dtype": Value("string"),
            "voxel_size_um": Sequence(Value("float64")),
            "channel_names": Sequence(Value("string")),
            "label": ClassLabel(names=class_names),
            "source": Value("string"),
            "label_id": Value("int64"),
            **{name: Value("string") for name in columns},
        }
    )


def is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def prepare_stack(job: dict, args: argparse.Namespace, features: Features) -> dict:
    """Cut one stack, write its shard, and then its record, which says that it is done.

    Returns:
        The record, or the job with an "error".
    """
    output_dir = Path(args.output_dir)
    shard, record_path = output_dir / "data" / f"{job['name']}.parquet", output_dir / "stacks" / f"{job['name']}.json"
    record = {key: job[key] for key in IDENTITY}
    record |= {"cells": 0, "num_bytes": 0, "dropped": [], "oversize": 0, "in_parts": 0}
    try:
        image, labels, nuclei = (
            path and open_stack(path, args.scene if index == 0 else None, args.max_memory_gb)
            for index, path in enumerate(job["paths"])
        )
        image = read_channels(image, channel_indices(image, args.channels), args.max_memory_gb)
        labels, nuclei = (other and read_channels(other, None, args.max_memory_gb) for other in (labels, nuclei))
        given = args.source_voxel_size_um
        if image.voxel_size_um is None and given is None:
            raise ValueError(
                f"{image.path}: does not say how large its voxels are in µm; give --source_voxel_size_um z y x"
            )
        image.voxel_size_um = image.voxel_size_um or given
        if given and any(abs(a - b) > 1e-3 * b for a, b in zip(given, image.voxel_size_um, strict=True)):
            raise ValueError(
                f"{image.path}: says that its voxels are {image.voxel_size_um} µm, --source_voxel_size_um {given};"
                " correct the file, or leave the argument out"
            )
        with whole_or_absent(shard) as temporary:
            with pyarrow.parquet.ParquetWriter(temporary, features.arrow_schema, compression="none") as writer:
                rows = []
                options = {name: getattr(args, name) for name in CUT_OPTIONS}
                for cell in cut_cells(image, labels, tuple(args.channels), nucleus_labels=nuclei, **options):
                    if cell.reason:
                        record["dropped"].append([cell.label_id, cell.reason])
                        continue
                    row = {"label": features["label"].str2int(job["label"]), "source": job["source"]}
                    rows.append(encode_volume(cell.volume) | row | {"label_id": cell.label_id} | job["columns"])
                    record["cells"] += 1
                    record["oversize"] += max(cell.extent) > 64
                    record["in_parts"] += cell.num_parts > 1
                    if len(rows) == ROWS_PER_GROUP:
                        writer.write_table(pyarrow.Table.from_pylist(rows, features.arrow_schema))
                        rows = []
                if rows:
                    writer.write_table(pyarrow.Table.from_pylist(rows, features.arrow_schema))
        if record["cells"]:
            record["num_bytes"] = shard.stat().st_size
        else:
            shard.unlink()
    except Exception as error:  # of whatever kind: one bad stack shall not stop the others, but a full disk does
        if is_full_disk(error):
            raise
        message = str(error) if isinstance(error, (ValueError, OSError, ImportError)) else repr(error)
        return job | {"error": message if job["source"] in message else f"{job['paths'][0]}: {message}"}
    with whole_or_absent(record_path) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")
    return record


def start_worker() -> None:
    """Readers log and warn of what is reported at the end; and no worker shall outlive a killed run."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL - 1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def prepare_stacks(jobs: list[dict], args: argparse.Namespace, features: Features):
    """Records of the stacks as they are done, in processes that a reader may crash without harm to the others."""
    num_proc = args.num_proc
    while jobs:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of readers
        pool = ProcessPoolExecutor(min(num_proc, len(jobs)), context, initializer=start_worker)
        try:
            futures = {pool.submit(prepare_stack, job, args, features): job for job in jobs}
            jobs = []
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    jobs.append(futures[future])
        finally:
            pool.shutdown(cancel_futures=True)
        # One process does its stacks in their order: of those left, the first is the one that ended it. Several
        # processes do not tell.
        jobs = [job for job in futures.values() if job in jobs]
        if num_proc == 1 and jobs:
            crashed = jobs.pop(0)
            yield crashed | {"error": f"{crashed['paths'][0]}: its reader crashed, or memory ran out"}
            num_proc = args.num_proc
        else:
            num_proc = 1


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except ValueError as error:
        raise ValueError(f"{path}: expected what this script writes, got {error}; give a new --output_dir") from error
    return content


def records_of(output_dir: Path, jobs: list[dict], settings: dict) -> list[dict]:
    """What earlier runs finished of the same data set; what they did not finish is removed."""
    settings_path = output_dir / "prepare_cells.json"
    if settings_path.is_file():
        earlier = read_json(settings_path)
        for name in sorted(settings.keys() | earlier.keys()):
            if settings.get(name) != earlier.get(name):
                raise ValueError(
                    f"{output_dir} was begun with {name} = {earlier.get(name)}, this run has {settings.get(name)}; go"
                    " on with the same arguments, or give a new --output_dir"
                )
    elif any(path.name != LOCK_NAME for path in output_dir.iterdir()):
        raise ValueError(f"{output_dir}: holds other files; give a new or empty --output_dir")
    else:
        with whole_or_absent(settings_path) as temporary:
            temporary.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
    for folder in ("data", "stacks"):
        (output_dir / folder).mkdir(exist_ok=True)
    shards = {path.stem: path for path in (output_dir / "data").glob("*.parquet")}
    records, by_name = [], {job["name"]: job for job in jobs}
    for path in sorted((output_dir / "stacks").glob("*.json")):
        record, job = read_json(path), by_name.get(path.stem)
        if job is None:
            raise ValueError(f"{output_dir} has cells of {path.stem}, which --images leaves out; add it again")
        num_bytes = shards[path.stem].stat().st_size if path.stem in shards else 0
        if record.get("num_bytes") == num_bytes and all(record.get(key) == job[key] for key in IDENTITY):
            records.append(record)
            shards.pop(path.stem, None)
        else:  # a file or its row has changed since
            path.unlink()
    if foreign := sorted(path.name for name, path in shards.items() if name not in by_name):
        raise ValueError(f"{output_dir / 'data'}: {foreign[0]} is of no stack of --images; move it away")
    for left_over in shards.values():
        left_over.unlink()
    remove_left_overs(output_dir)
    return records


def write_reports(output_dir: Path, records: list[dict], failed: list[dict]) -> None:
    """report.csv, a line a stack; dropped.csv, a line a cell; and the same in brief."""
    records = sorted(records + failed, key=lambda record: record["source"])
    counts, dropped = Counter(), Counter()
    with (
        whole_or_absent(output_dir / "report.csv") as report_path,
        whole_or_absent(output_dir / "dropped.csv") as dropped_path,
        open(report_path, "w", encoding="utf-8", newline="") as report_file,
        open(dropped_path, "w", encoding="utf-8", newline="") as dropped_file,
    ):
        report, cells = csv.writer(report_file), csv.writer(dropped_file)
        report.writerow(["source", "label", "cells", *REASONS, "error"])
        cells.writerow(["source", "label_id", "reason"])
        for record in records:
            reasons = Counter(reason for _, reason in record.get("dropped", []))
            dropped += reasons
            counts[record["label"]] += record.get("cells", 0)
            numbers = [record.get("cells", ""), *(reasons[reason] for reason in REASONS)]
            report.writerow([record["source"], record["label"], *numbers, record.get("error")])
            cells.writerows([record["source"], *cell] for cell in record.get("dropped", []))
    print(f"\n{counts.total():>8} cells kept, of {len(records) - len(failed)} stacks, in {output_dir}")
    for name, number in sorted(counts.items()):
        print(f"{number:>16} {name}")
    print(f"{dropped.total():>8} cells dropped (dropped.csv)")
    for reason in REASONS:
        print(f"{dropped[reason]:>16} {reason}")
    if oversize := sum(record.get("oversize", 0) for record in records):
        print(f"{oversize:>8} of the cells kept are longer than 64 voxels: train with --oversize, or on larger voxels")
    if in_parts := sum(record.get("in_parts", 0) for record in records):
        print(f"{in_parts:>8} of the cells kept have a label of several parts, and may be two cells")
    if failed:
        print(f"{len(failed):>8} stacks failed (report.csv):")
        for job in failed:
            print(f"         {job['error']}")


def write_card(output_dir: Path, records: list[dict], features: Features, settings: dict) -> None:
    """The data set's card, which tells `load_dataset` what there is, and when to forget what it read before."""
    shards = list((output_dir / "data").glob("*.parquet"))
    num_cells, num_bytes = sum(record["cells"] for record in records), sum(path.stat().st_size for path in shards)
    card_data = DatasetCardData(tags=["biology", "microscopy", "3d", "single-cell"])
    MetadataConfigs({"default": {"data_files": "data/*.parquet"}}).to_dataset_card_data(card_data)
    # Without sizes, the cache of 🤗 Datasets would take all folders of this name and these columns for one data set.
    splits = SplitDict({"train": SplitInfo("train", num_bytes=num_bytes, num_examples=num_cells)})
    info = DatasetInfo(features=features, splits=splits, download_size=num_bytes, dataset_size=num_bytes)
    DatasetInfosDict({"default": info}).to_dataset_card_data(card_data)
    counts = Counter()
    for record in records:
        counts[record["label"]] += record["cells"]
    text = CARD.format(
        title=output_dir.resolve().name,
        num_cells=num_cells,
        num_stacks=len(records),
        counts="\n".join(f"| {name} | {counts[name]} |" for name in settings["class_names"]),
        settings=json.dumps(settings, ensure_ascii=False, indent=1),
    )
    with whole_or_absent(output_dir / "README.md") as temporary:
        DatasetCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}").save(temporary)


def main(args: argparse.Namespace) -> int:
    """Returns the exit status: 0 if every stack was used and a cell is left."""
    output_dir = Path(args.output_dir)
    try:
        jobs, columns = plan(args)
        if glob.has_magic(str(output_dir.resolve())):
            raise ValueError(
                f"{output_dir.resolve()}: 🤗 Datasets takes *, ? and [ for patterns; give another --output_dir"
            )
        class_names = sorted({job["label"] for job in jobs})
        settings = {name: getattr(args, name) for name in ("channels", "scene", "source_voxel_size_um", *CUT_OPTIONS)}
        settings |= {"class_names": class_names, "columns": columns, "nucleus_labels": args.nucleus_labels is not None}
        settings = json.loads(json.dumps(settings))  # as they will be read again
        if args.push_to_hub:  # now, to learn of a wrong name or a missing login before the work
            HfApi().create_repo(args.push_to_hub, repo_type="dataset", private=args.private, exist_ok=True)
        with lock_folder(output_dir):
            records, failed = records_of(output_dir, jobs, settings), []
            done = {record["source"] for record in records}
            left = [job for job in jobs if job["source"] not in done]
            features = features_of(class_names, columns)
            if left:
                (output_dir / "README.md").unlink(missing_ok=True)  # it tells of the shards that there were
            with tqdm(total=len(jobs), initial=len(done), desc="Cutting", unit="stack") as progress:
                for record in prepare_stacks(left, args, features):
                    (failed if "error" in record else records).append(record)
                    progress.update()
                    progress.set_postfix(cells=sum(record["cells"] for record in records), failed=len(failed))
                    if failed and args.strict:
                        raise ValueError(f"{failed[0]['error']} (--strict; {len(records)} stacks are done)")
            write_reports(output_dir, records, failed)
            write_card(output_dir, records, features, settings)
            if not any(record["cells"] for record in records):
                raise ValueError("no cell was kept; see dropped.csv and report.csv")
            if args.push_to_hub:
                HfApi().upload_folder(
                    repo_id=args.push_to_hub,
                    repo_type="dataset",
                    folder_path=output_dir,
                    allow_patterns=["README.md", "data/*.parquet"],
                    delete_patterns=["data/*.parquet"],  # of stacks that are no longer part of it
                )
    except (OSError, ValueError) as error:  # bad input: the message says what to mend, a traceback would hide it
        if is_full_disk(error):
            error = f"{output_dir}: the disk is full; make room, and run the same command again to go on"
        raise SystemExit(f"prepare_cells.py: error: {error}") from None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
