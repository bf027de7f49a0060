"""What is to be cut: each stack with its label images, its class and what else is known of it."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..formats.metadata import read_metadata
from ..formats.ome_zarr import inner_images, inner_labels, is_image
from ..formats.reading import ending_of
from .pairing import find_files, pair_labels, pair_rows
from .stacks import num_times_of


@dataclass(frozen=True)
class Job:
    """One stack to be cut.

    Args:
        source: how the data set calls it: its path below the folder that all stacks share, and its time point.
        label: its class.
        columns: what the table says of it.
        image: its path.
        labels: path of its label image.
        nuclei: path of the label image of its nuclei, if nuclei are asked for there.
        time: number of its time point, if one is chosen.
        series: what its source would be called as a whole, if each of its time points is a job.
        state: sizes and times of its files, to see changes by.
        problem: why it cannot be cut, where that is known already.
    """

    source: str
    label: str
    columns: dict[str, str]
    image: str
    labels: str = ""
    nuclei: str | None = None
    time: int | None = None
    series: str = ""
    state: list = field(default_factory=list)
    problem: str = ""

    @property
    def name(self) -> str:
        """Of its files in the data set."""
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", self.source)[:80]
        return f"{stem}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}"


def plan_jobs(
    images: Sequence[str],
    labels: Sequence[str] | None,
    nucleus_labels: Sequence[str] | None,
    metadata: str | None,
    label_column: str,
    time: int | str | None,
    scene: str | None = None,
) -> tuple[list[Job], list[str]]:
    """The stacks, each with its label image, class and metadata, and the names of the metadata columns.

    Args:
        images: paths or patterns; a plate stands for its fields.
        labels: of their label images; None for those within the OME-Zarrs.
        nucleus_labels: of the label images of their nuclei.
        metadata: a table, see `read_metadata`; None to take sub-folders for classes.
        label_column: its column of the classes.
        time: number of the time point to take; "all" makes a job of each; None for stacks that have but one.
        scene: see `open_stack`.

    Raises:
        ValueError: if anything does not fit together; all that does not is named.
        FileNotFoundError: if a pattern matches nothing.
    """
    given = find_files(labels) if labels else []
    nuclei = _fields(find_files(nucleus_labels)) if nucleus_labels else []
    found = [path for path in find_files(images) if path not in {*(set(given) - _containers(given)), *nuclei}]
    stacks = _fields(found)
    present = [stack for stack in stacks if stack == _container(stack) or is_image(stack)]
    missing = set(stacks) - set(present)
    if labels:
        # of an image that is given as its own labels, those within it
        inside = [inner for path in given if path in found for inner in _labels_within(_fields([path]))]
        label_images = [*inside, *_fields([path for path in given if path not in found])]
    else:
        label_images = _labels_within(present)
    label_of = pair_labels(present, [path for path in label_images if path.exists()])
    nuclei_of = pair_labels(present, nuclei) if nuclei else {}
    root = Path(os.path.commonpath([_container(stack).absolute().parent for stack in stacks]))
    sources = {stack: stack.absolute().relative_to(root) for stack in stacks}
    if metadata:
        rows = pair_rows(stacks, read_metadata(Path(metadata), label_column), metadata)
    else:  # as for folders of single cells: sub-folders are classes
        in_folders = all(_container(stack).absolute().parent != root for stack in stacks)
        rows = {stack: {label_column: sources[stack].parts[0] if in_folders else "cell"} for stack in stacks}
    columns = [name for name in next(iter(rows.values())) if name not in ("file_name", label_column)]

    jobs = []
    for stack, source in sources.items():
        label, source = rows[stack][label_column].strip(), source.as_posix()
        if not label:
            raise ValueError(
                f"Expected a label for {source} in the column {label_column} of {metadata}, got none. Add it."
            )
        known = {"label": label, "columns": {name: rows[stack][name] for name in columns}, "image": str(stack)}
        if stack in missing:
            problem = f"Expected an image in {stack}, which its plate lists, got none. Copy or export it again."
            jobs.append(Job(source, **known, problem=problem))
            continue
        inputs = [stack, label_of[stack], nuclei_of.get(stack)]
        known |= {"labels": str(label_of[stack]), "nuclei": nuclei_of.get(stack) and str(nuclei_of[stack])}
        known["state"] = [[path.stat().st_size, path.stat().st_mtime_ns] for path in inputs if path]
        if time != "all":
            jobs.append(Job(source, **known, time=time))
            continue
        try:
            num_times = num_times_of(stack, scene)
        except (ValueError, OSError, ImportError) as error:
            jobs.append(Job(source, **known, problem=str(error)))
            continue
        jobs += [Job(f"{source}, time {time}", **known, time=time, series=source) for time in range(num_times)]
    return jobs, columns


def _fields(paths: Sequence[Path]) -> list[Path]:
    """Paths, with the fields of a plate, or of a well, in its place."""
    fields = []
    for path in paths:
        inside = inner_images(path) if path.is_dir() and ending_of(path) == ".zarr" else []
        fields += inside or [path]
    return fields


def _labels_within(images: Sequence[Path]) -> list[Path]:
    return [label for image in images if ending_of(image) == ".zarr" for label in inner_labels(image)]


def _containers(paths: Sequence[Path]) -> set[Path]:
    """Those that hold label images within them, or fields that do."""
    return {
        path for path in paths if path.is_dir() and _labels_within([one for one in _fields([path]) if one.exists()])
    }


def _container(path: Path) -> Path:
    """The OME-Zarr that a path leads into, or the path itself."""
    return next((parent for parent in reversed(path.parents) if parent.suffix.lower() == ".zarr"), path)
