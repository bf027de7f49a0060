"""A folder of volume files as a data set."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..formats.metadata import read_metadata
from ..formats.reading import FORMATS, ending_of, read_volume
from ..formats.volume import Volume
from ..processor import VolumeProcessor
from .cells import ONLY_CLASS, CellDataset
from .splits import Population
from .table import condition_values


METADATA_NAME = "metadata.csv"


class CellFolder(CellDataset):
    """A folder of volume files, one cell each.

    With a ``metadata.csv`` (the convention of 🤗 Datasets) its rows are the cells: column `file_name`, relative to the
    folder, and optionally a label, the group that a split keeps together, and conditions; other columns are ignored.
    Without one,
    every ``.tif``, ``.tiff``, ``.npy`` and ``.npz`` file below the folder is a cell, labelled by the sub-folder it
    lies in, or not at all.

    Args:
        root: the folder.
        processor: makes the crops into network input.
        label: keep only the cells of this label, or of these.
        cache_gb: memory for preprocessed cells, in 10⁹ bytes; at 64³ and two channels a cell takes 2.1 MB.
        label_column: column of the labels; None for `label`, if there is one.
        group_column: column of the groups; None for `source`, if there is one. Without it every cell is a group.
        condition_columns: columns of the cells' `conditions`, of numbers.
        num_workers: processes that read the cells once, at construction; 0 for this one.

    Attributes:
        paths: file of every cell.

    Raises:
        FileNotFoundError: if the folder, or the file of a metadata row, does not exist.
        ValueError: if the folder has no cells, a label has none, the metadata are faulty, or a file is no volume that
            `processor` accepts. The message names the file or the row.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        processor: VolumeProcessor,
        label: str | Sequence[str] | None = None,
        cache_gb: float = 1.0,
        label_column: str | None = None,
        group_column: str | None = None,
        condition_columns: Sequence[str] = (),
        num_workers: int = 0,
    ):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"Expected a folder of cells, got {root}, which does not exist. Check the path.")
        if (self.root / METADATA_NAME).is_file():
            population = _cells_of_metadata(self.root, label_column, group_column, condition_columns)
        elif columns := [*filter(None, (label_column, group_column)), *condition_columns]:
            raise ValueError(f"Expected {METADATA_NAME} with the column {columns[0]} in {root}, got none. Write it.")
        else:
            population = _cells_of_folder(self.root)
        super().__init__(processor, population, label, str(root))
        self._prepare(cache_gb, f"Reading {self.root.name}", num_workers)

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.ids]

    def _read(self, row: int) -> Volume:
        return read_volume(self.root / self.population.ids[row])

    def _where(self, row: int) -> str:
        return str(self.root / self.population.ids[row])


# which cells a folder has


def find_volumes(root: Path) -> list[Path]:
    """Volume files below a folder, OME-Zarr's folders among them; sorted, hidden ones left out."""
    paths = []
    for folder, folders, files in os.walk(root):
        volumes = [name for name in folders if ending_of(name)]
        # e.g. the ._* files of macOS
        folders[:] = [name for name in folders if name not in volumes and not name.startswith(".")]
        paths += [Path(folder) / name for name in [*volumes, *files] if ending_of(name) and not name.startswith(".")]
    return sorted(paths)


def _cells_of_folder(root: Path) -> Population:
    paths = find_volumes(root)
    if not paths:
        raise ValueError(
            f"Expected {METADATA_NAME}, or files ending in {'/'.join(FORMATS)}, in {root}, got no cells. Give the"
            " folder that holds them."
        )
    parts = [path.relative_to(root).parts for path in paths]
    at_root = sum(len(part) == 1 for part in parts)
    if 0 < at_root < len(paths):
        raise ValueError(
            f"Expected all cells of {root} in sub-folders that name their labels, or none, got {at_root} of"
            f" {len(paths)} outside of them. Move them, or write {METADATA_NAME} with the columns file_name and label."
        )
    ids = tuple("/".join(part) for part in parts)
    return Population(ids, tuple(part[0] if len(part) > 1 else ONLY_CLASS for part in parts), groups=ids)


def _cells_of_metadata(
    root: Path, label_column: str | None, group_column: str | None, condition_columns: Sequence[str]
) -> Population:
    metadata_path = root / METADATA_NAME
    rows = read_metadata(metadata_path, *filter(None, (label_column, group_column)), *condition_columns)
    columns = rows[0][1]
    label_column = label_column or ("label" if "label" in columns else None)
    group_column = group_column or ("source" if "source" in columns else None)

    line_of, labels, groups = {}, [], []
    for line, row in rows:
        where = f"{metadata_path}, line {line}"
        name = os.path.normpath(row["file_name"])
        if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            raise ValueError(f"Expected a file inside {root} in {where}, got {row['file_name']!r}. Move it there.")
        if name in line_of:
            raise ValueError(
                f"Expected another file in {where}, got {row['file_name']!r}, which stands in line {line_of[name]}."
                " Delete one."
            )
        if not (root / name).exists():
            raise FileNotFoundError(
                f"Expected the file of {where}, got no {root / name}. Correct file_name, or delete the row."
            )
        for column in filter(None, (label_column, group_column)):
            if not row[column].strip():
                raise ValueError(f"Expected a {column} in {where}, got none. Fill it in, or delete the row.")
        line_of[name] = line
        labels.append(row[label_column] if label_column else ONLY_CLASS)
        groups.append(row[group_column] if group_column else name)
    lines = list(line_of.values())
    conditions = {
        column: condition_values(
            column, (row[column] for _, row in rows), lambda row: f"{metadata_path}, line {lines[row]}"
        )
        for column in condition_columns
    }
    return Population(tuple(Path(name).as_posix() for name in line_of), tuple(labels), tuple(groups), conditions)
