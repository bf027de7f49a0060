"""From planned stacks to a data set in a folder: a shard and a record for each stack, a report and a card for all."""

import csv
import errno
import glob
import json
import logging
import multiprocessing
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from ...optional import optional
from ...whole_files import LOCK_NAME, remove_left_overs, whole_or_absent
from ..formats.records import encode_volume
from .cutting import cut_cells
from .planning import Job
from .stacks import Stack, channel_indices, num_times_of, open_stack, read_channels


REASONS = ("touches the border", "too small", "no nucleus", "not finite")
SETTINGS_NAME = "prepare_cells.json"

_ROWS_PER_GROUP = 32  # cells in memory before they are written, and what a reader unpacks at once
_SAME_SIZE = 1e-3  # voxel sizes that differ by less are equal
_CARD = """# {title}

{num_cells} single cells, cut out of {num_stacks} stacks by `byoc-prepare` of diffusers_byoc.

| label | cells |
| --- | --- |
{counts}

`volume` holds the bytes of a (C, Z, Y, X) array of `dtype` and `shape`, compressed by zlib
(`diffusers_byoc.data.decode_volume` unpacks a row); `source` and `label_id` say which label of which stack it was.

```json
{settings}
```
"""


@dataclass(frozen=True)
class CutSettings:
    """How cells are cut; see `open_stack`, `channel_indices` and `cut_cells` for those that are not said here.

    Args:
        channels: for each name in the data set, the number or the name of the stacks' channel.
        source_voxel_size_um: (z, y, x) of stacks that do not say.
        max_memory_gb: larger stacks are read cell by cell.
    """

    channels: Mapping[str, str]
    scene: str | None = None
    voxel_size_um: tuple[float, float, float] = (1.0, 1.0, 1.0)
    source_voxel_size_um: tuple[float, float, float] | None = None
    margin_um: float = 2.0
    mask_out: str = "background"
    min_volume_um3: float = 100.0
    min_nucleus_contrast: float = 0.7
    keep_border: bool = False
    allow_binary_labels: bool = False
    max_memory_gb: float = 4.0

    def identity(self) -> dict:
        """What makes one data set, as JSON has it."""
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name != "max_memory_gb"}))


def features_of(class_names: Sequence[str], columns: Sequence[str], has_times: bool = False):
    """`datasets.Features` of the data set: the columns of `encode_volume`, then what is known of the cell.

    Args:
        class_names: of the label.
        columns: carried on from the metadata.
        has_times: each time point is a source; then its number and the file's name, its series, are columns too.
    """
    datasets = optional("datasets", "data")
    text, times = datasets.Value("string"), {"series": datasets.Value("string"), "time": datasets.Value("int64")}
    return datasets.Features(
        {
            "volume": datasets.Value("binary"),
            "shape": datasets.Sequence(datasets.Value("int64")),
            "dtype": text,
            "voxel_size_um": datasets.Sequence(datasets.Value("float64")),
            "channel_names": datasets.Sequence(text),
            "label": datasets.ClassLabel(names=list(class_names)),
            "source": text,
            "label_id": datasets.Value("int64"),
            **(times if has_times else {}),
            **dict.fromkeys(columns, text),
        }
    )


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk, or a quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


# one stack


def prepare_stack(job: Job, settings: CutSettings, features, output_dir: Path) -> dict:
    """Cut one stack, write its shard, and then its record, which says that it is done.

    A stack that has its record already is not cut again.

    Returns:
        The record, or of a stack that cannot be used "source", "label" and "error".
    """
    if (record := finished_record(output_dir, job)) is not None:
        return record
    if job.problem:
        return _failure(job, job.problem)
    shard, record_path = _shard_of(output_dir, job), _record_path_of(output_dir, job)
    record = _identity(job) | {"cells": 0, "num_bytes": 0, "dropped": [], "oversize": 0, "in_parts": 0}
    try:
        with whole_or_absent(shard) as temporary:
            _write_cells(temporary, _cells_of(job, settings, record), job, features)
        if record["cells"]:
            record["num_bytes"] = shard.stat().st_size
        else:
            shard.unlink()
    except Exception as error:  # of whatever kind: one bad stack shall not stop the others, but a full disk does
        if is_full_disk(error):
            raise
        message = str(error) if isinstance(error, (ValueError, OSError, ImportError)) else repr(error)
        return _failure(job, message if Path(job.image).name in message else f"{job.image}: {message}")
    with whole_or_absent(record_path) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")
    return record


def finished_record(output_dir: Path, job: Job) -> dict | None:
    """What an earlier run recorded of a stack, if neither the stack nor what was made of it has changed since."""
    path, shard = _record_path_of(output_dir, job), _shard_of(output_dir, job)
    if not path.is_file():
        return None
    record = read_json(path)
    num_bytes = shard.stat().st_size if shard.is_file() else 0
    is_same = record.get("num_bytes") == num_bytes and all(
        record.get(key) == value for key, value in _identity(job).items()
    )
    return record if is_same else None


def _identity(job: Job) -> dict:
    return {"source": job.source, "label": job.label, "columns": job.columns, "state": job.state}


def _failure(job: Job, message: str) -> dict:
    return {"source": job.source, "label": job.label, "error": message}


def _shard_of(output_dir: Path, job: Job) -> Path:
    return output_dir / "data" / f"{job.name}.parquet"


def _record_path_of(output_dir: Path, job: Job) -> Path:
    return output_dir / "stacks" / f"{job.name}.json"


def _open_all(job: Job, settings: CutSettings) -> tuple[Stack, Stack, Stack | None]:
    """The channels of a stack, its label image and that of its nuclei, in memory if they fit."""
    max_gb = settings.max_memory_gb
    image = open_stack(job.image, settings.scene, max_gb, job.time)
    image = read_channels(image, channel_indices(image, settings.channels), max_gb)
    label_images = []
    for path in (job.labels, job.nuclei):
        if path is None:
            label_images.append(None)
            continue
        num_times = num_times_of(path)
        if job.series and num_times != num_times_of(job.image, settings.scene):
            raise ValueError(
                f"Expected labels of each of its {num_times_of(job.image, settings.scene)} time points for"
                f" {job.image}, got {num_times} in {path}. Choose the one that they are of (--time N)."
            )
        # the labels of one time point may be a file of their own
        time = job.time if num_times > 1 else None
        label_images.append(read_channels(open_stack(path, None, max_gb, time), None, max_gb))
    image.voxel_size_um = _checked_size(image, settings.source_voxel_size_um)
    return image, *label_images


def _checked_size(image: Stack, given: tuple[float, float, float] | None) -> tuple[float, float, float]:
    stated = image.voxel_size_um
    if stated is None and given is None:
        raise ValueError(
            f"Expected the size of the voxels of {image.path} in µm, got {image.stated_size}. Correct the file, or"
            " give --source_voxel_size_um z y x."
        )
    if stated and given and any(abs(a - b) > _SAME_SIZE * a for a, b in zip(given, stated, strict=True)):
        raise ValueError(
            f"Expected voxels of --source_voxel_size_um {given} in {image.path}, got {stated} µm. Correct the file, or"
            " leave the argument out."
        )
    return stated or given


def _cells_of(job: Job, settings: CutSettings, record: dict) -> Iterator[dict]:
    """Rows of the cells of a stack, which is counted in `record`."""
    image, labels, nuclei = _open_all(job, settings)
    names = ("margin_um", "mask_out", "min_volume_um3", "keep_border", "min_nucleus_contrast", "allow_binary_labels")
    options = {name: getattr(settings, name) for name in names}
    cells = cut_cells(
        image, labels, tuple(settings.channels), settings.voxel_size_um, nucleus_labels=nuclei, **options
    )
    for cell in cells:
        if cell.reason:
            record["dropped"].append([cell.label_id, cell.reason])
            continue
        record["cells"] += 1
        record["oversize"] += max(cell.extent) > 64
        record["in_parts"] += cell.num_parts > 1
        yield encode_volume(cell.volume) | {"label_id": cell.label_id}


def _write_cells(path: Path, cells: Iterator[dict], job: Job, features) -> None:
    pyarrow, parquet = optional("pyarrow", "data"), optional("pyarrow.parquet", "data")
    known = {"label": features["label"].str2int(job.label), "source": job.source} | job.columns
    if job.series:
        known |= {"series": job.series, "time": job.time}
    with parquet.ParquetWriter(path, features.arrow_schema, compression="none") as writer:
        rows = []
        for cell in cells:
            rows.append(cell | known)
            if len(rows) == _ROWS_PER_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, features.arrow_schema))
                rows = []
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, features.arrow_schema))


# all stacks


def prepare_stacks(
    jobs: Sequence[Job],
    settings: CutSettings,
    features,
    output_dir: Path,
    num_proc: int = 1,
    dask_scheduler: str | None = None,
) -> Iterator[dict]:
    """What `prepare_stack` returns of each stack, as they are done: in processes of their own, or on a Dask cluster.

    A reader may crash its process without harm to the others.

    Args:
        jobs: the stacks.
        settings: how cells are cut.
        features: of the data set.
        output_dir: where it is.
        num_proc: processes of this machine.
        dask_scheduler: address of a cluster whose workers see the same files under the same names.
    """
    arguments = (settings, features, output_dir.absolute())
    if dask_scheduler is not None:
        yield from _prepare_on_cluster(jobs, arguments, dask_scheduler)
        return
    while jobs:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of readers
        pool = ProcessPoolExecutor(min(num_proc, len(jobs)), context, initializer=_start_worker)
        try:
            futures, left = {pool.submit(prepare_stack, job, *arguments): job for job in jobs}, []
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    left.append(futures[future].source)
        finally:
            pool.shutdown(cancel_futures=True)
        # One process does its stacks in their order: of those left, the first is the one that ended it. Several
        # processes do not tell.
        jobs = [job for job in jobs if job.source in left]
        if num_proc == 1 and jobs:
            yield _crashed(jobs[0])
            jobs = jobs[1:]
        else:
            num_proc = 1


def _prepare_on_cluster(jobs: Sequence[Job], arguments: tuple, address: str) -> Iterator[dict]:
    distributed = optional("distributed", "dask")
    with distributed.Client(address) as client:
        futures = {}
        for job in jobs:
            # what a worker that ends was doing, another does
            future = client.submit(_prepare_quietly, job, *arguments, key=f"byoc-prepare-{job.name}", pure=False)
            futures[future] = job
        for future in distributed.as_completed(futures):
            try:
                yield future.result()
            except distributed.KilledWorker:
                yield _crashed(futures[future])
            future.release()


def _prepare_quietly(*arguments) -> dict:
    _quiet()
    return prepare_stack(*arguments)


def _crashed(job: Job) -> dict:
    return _failure(
        job, f"Expected to read {job.image}, got a crash of its reader, or too little memory. Export it again."
    )


def _start_worker() -> None:
    """Readers log and warn of what is reported at the end; and no worker shall outlive a killed run."""
    _quiet()
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("bioio", "ome_types", "xmlschema", "nd2"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


# the folder


def read_json(path: Path) -> dict:
    """A JSON object that an earlier run wrote.

    Raises:
        ValueError: if it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except ValueError as error:
        raise ValueError(
            f"Expected what byoc-prepare writes in {path}, got {error}. Give a new --output_dir."
        ) from error
    return content


def records_of(output_dir: Path, jobs: Sequence[Job], settings: dict) -> list[dict]:
    """What earlier runs finished of the same data set; what they did not finish is removed.

    Raises:
        ValueError: if the folder holds another data set, or something else.
    """
    settings_path = output_dir / SETTINGS_NAME
    if settings_path.is_file():
        earlier = read_json(settings_path)
        for name in sorted(settings.keys() | earlier.keys()):
            if settings.get(name) != earlier.get(name):
                raise ValueError(
                    f"Expected the arguments with which {output_dir} was begun, {name} = {earlier.get(name)}, got"
                    f" {settings.get(name)}. Go on with the same arguments, or give a new --output_dir."
                )
    elif any(path.name != LOCK_NAME for path in output_dir.iterdir()):
        raise ValueError(
            f"Expected an empty folder, got {output_dir}, which holds other files. Give a new or empty --output_dir."
        )
    else:
        with whole_or_absent(settings_path) as temporary:
            temporary.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
    for folder in ("data", "stacks"):
        (output_dir / folder).mkdir(exist_ok=True)
    shards = {path.stem: path for path in (output_dir / "data").glob("*.parquet")}
    records, by_name = [], {job.name: job for job in jobs}
    for path in sorted((output_dir / "stacks").glob("*.json")):
        job = by_name.get(path.stem)
        if job is None:
            raise ValueError(
                f"Expected all stacks of {output_dir} in --images, got others than {path.stem}. Add it again."
            )
        record = finished_record(output_dir, job)
        if record is None:  # a file or its row has changed since
            path.unlink()
        else:
            records.append(record)
            shards.pop(path.stem, None)
    if foreign := sorted(path.name for name, path in shards.items() if name not in by_name):
        raise ValueError(
            f"Expected shards of the stacks of --images in {output_dir / 'data'}, got {foreign[0]}. Move it away."
        )
    for left_over in shards.values():
        left_over.unlink()
    remove_left_overs(output_dir)
    return records


def write_reports(output_dir: Path, records: Sequence[dict], failed: Sequence[dict]) -> str:
    """report.csv, a line a stack; dropped.csv, a line a cell.

    Returns:
        The same in brief.
    """
    every = sorted([*records, *failed], key=lambda record: record["source"])
    counts, dropped = Counter(), Counter()
    with (
        whole_or_absent(output_dir / "report.csv") as report_path,
        whole_or_absent(output_dir / "dropped.csv") as dropped_path,
    ):
        with (
            open(report_path, "w", encoding="utf-8", newline="") as report_file,
            open(dropped_path, "w", encoding="utf-8", newline="") as dropped_file,
        ):
            report, cells = csv.writer(report_file), csv.writer(dropped_file)
            report.writerow(["source", "label", "cells", *REASONS, "error"])
            cells.writerow(["source", "label_id", "reason"])
            for record in every:
                reasons = Counter(reason for _, reason in record.get("dropped", []))
                dropped += reasons
                counts[record["label"]] += record.get("cells", 0)
                numbers = [record.get("cells", ""), *(reasons[reason] for reason in REASONS)]
                report.writerow([record["source"], record["label"], *numbers, record.get("error")])
                cells.writerows([record["source"], *cell] for cell in record.get("dropped", []))
    lines = [f"{counts.total():>8} cells kept, of {len(records)} stacks, in {output_dir}"]
    lines += [f"{number:>16} {name}" for name, number in sorted(counts.items())]
    lines += [f"{dropped.total():>8} cells dropped (dropped.csv)"]
    lines += [f"{dropped[reason]:>16} {reason}" for reason in REASONS]
    if oversize := sum(record["oversize"] for record in records):
        lines += [
            f"{oversize:>8} of the cells kept are longer than 64 voxels: train with --oversize, or larger voxels"
        ]
    if in_parts := sum(record["in_parts"] for record in records):
        lines += [f"{in_parts:>8} of the cells kept have a label of several parts, and may be two cells"]
    if failed:
        lines += [f"{len(failed):>8} stacks failed (report.csv):"]
        lines += [f"         {failure['error']}" for failure in failed]
    return "\n".join(lines)


def write_card(output_dir: Path, records: Sequence[dict], features, settings: dict) -> None:
    """The data set's card, which tells `load_dataset` what there is, and when to forget what it read before."""
    datasets, hub = optional("datasets", "data"), optional("huggingface_hub", "data")
    shards = list((output_dir / "data").glob("*.parquet"))
    num_cells, num_bytes = sum(record["cells"] for record in records), sum(path.stat().st_size for path in shards)
    card_data = hub.DatasetCardData(tags=["biology", "microscopy", "3d", "single-cell"])
    configs = optional("datasets.utils.metadata", "data").MetadataConfigs(
        {"default": {"data_files": "data/*.parquet"}}
    )
    configs.to_dataset_card_data(card_data)
    # Without sizes, the cache of 🤗 Datasets would take all folders of this name and these columns for one data set.
    splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_bytes=num_bytes, num_examples=num_cells)})
    info = datasets.DatasetInfo(features=features, splits=splits, download_size=num_bytes, dataset_size=num_bytes)
    optional("datasets.info", "data").DatasetInfosDict({"default": info}).to_dataset_card_data(card_data)
    counts = Counter()
    for record in records:
        counts[record["label"]] += record["cells"]
    text = _CARD.format(
        title=output_dir.resolve().name,
        num_cells=num_cells,
        num_stacks=len(records),
        counts="\n".join(f"| {name} | {counts[name]} |" for name in settings["class_names"]),
        settings=json.dumps(settings, ensure_ascii=False, indent=1),
    )
    with whole_or_absent(output_dir / "README.md") as temporary:
        hub.DatasetCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}").save(temporary)


def check_output_dir(output_dir: Path) -> None:
    """Refuse a folder that 🤗 Datasets could not read.

    Raises:
        ValueError: if its path looks like a pattern.
    """
    if glob.has_magic(str(output_dir.resolve())):
        raise ValueError(
            f"Expected a folder without *, ? and [ in its path, got {output_dir.resolve()}: 🤗 Datasets takes them"
            " for patterns; give another --output_dir."
        )
