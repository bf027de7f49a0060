"""Tables of cells in files: Parquet, and tar archives in the webdataset layout; on a disk, on the Hub, on any fsspec
file system.

Both kinds are read the same way. First what stands beside the voxels, all of it, which is little: a Parquet file gives
away single columns, and an archive is searched by its headers. Then volumes, a unit of neighbouring rows at a time.
"""

import bisect
import functools
import glob
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ...optional import optional
from ...volumes import voxel_size_triple
from ...whole_files import whole_or_absent
from .reading import read_volume
from .records import decode_volume, encode_volume
from .volume import MAX_VOLUME_BYTES, Volume, VolumeFileError


MAX_JSON_BYTES = 2**20
SAMPLE_SUFFIXES = (".tif", ".tiff", ".npy", ".npz")  # of volumes in an archive
_UNIT_ROWS = 32  # rows that are read together where the file does not say
_SAMPLE = np.dtype(
    [
        ("file", np.int32),
        ("suffix", f"U{max(map(len, SAMPLE_SUFFIXES))}"),
        ("offset", np.int64),
        ("size", np.int64),
    ]
)


class Unit(NamedTuple):
    """Rows [first, first + count) of a table, which one file holds side by side.

    Args:
        file: index of the file.
        part: row group of a Parquet file.
        first: number of the first row in the whole table.
        count: of rows.
    """

    file: int
    part: int
    first: int
    count: int


def is_saved_dataset(path: str | os.PathLike) -> bool:
    """Whether a folder is what `datasets.Dataset.save_to_disk` writes, or the dictionary of several splits of it."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def holds_table(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a table of cells: Parquet or tar below it, or what `save_to_disk` writes."""
    paths = [Path(folder), *Path(folder).rglob("*")]
    return is_saved_dataset(folder) or any(path.suffix in (".parquet", ".tar") for path in paths)


def find_shards(name: str, config_name: str | None = None) -> list[str]:
    """Paths or URLs of the files that hold the "train" split of a data set, in their order.

    Args:
        name: a data set on the Hub, a folder, or a pattern of files (``shards/*.tar``).
        config_name: which of its configurations.

    Raises:
        FileNotFoundError: if there is no such data set, or the Hub cannot be reached.
        ValueError: if it has no such configuration, no "train" split, or files of other kinds.
    """
    if os.path.isdir(name) and glob.has_magic(os.path.abspath(name)):
        raise ValueError(
            f"Expected a folder without *, ? and [ in its path, got {os.path.abspath(name)}: 🤗 Datasets takes them"
            " for patterns. Rename it."
        )
    if os.path.isfile(name) or glob.has_magic(name):
        files = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        if not files:
            raise FileNotFoundError(f"Expected files of the name {name}, got none. Correct the pattern.")
    else:
        datasets = optional("datasets", "data")
        try:
            files = datasets.load_dataset_builder(name, config_name).config.data_files or {}
        except (OSError, ValueError) as error:  # of datasets, huggingface_hub and the network
            raise _error_of(name, error) from error
        if "train" not in files:
            raise ValueError(f'Expected a split "train" in {name}, got {sorted(files) or "no files"}. Name one so.')
        files = [str(file) for file in files["train"]]
    suffixes = {PurePosixPath(file).suffix.lower() for file in files}
    if suffixes not in ({".parquet"}, {".tar"}):
        raise ValueError(
            f"Expected files ending in .parquet, or in .tar, in {name}, got {', '.join(sorted(suffixes))}. Convert"
            " them (diffusers_byoc.data.write_shards), or leave the others out."
        )
    return files


def open_shards(files: list[str], volume_column: str = "volume") -> "ParquetShards | TarShards":
    """The table in the files of `find_shards`."""
    return TarShards(files) if files[0].lower().endswith(".tar") else ParquetShards(files, volume_column)


class ParquetShards:
    """Rows of `encode_volume`, and columns beside them, in Parquet files.

    A unit is a row group. Only footers are read at construction.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is no Parquet, or its columns are not those of `encode_volume`, or not those of the
            first file.
    """

    def __init__(self, files: list[str], volume_column: str = "volume"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files, self.volume_column = files, volume_column

        def footer(file: str):
            try:
                with _open(file) as stream:
                    return pq.read_metadata(stream)
            except (pa.ArrowException, ValueError) as error:
                raise VolumeFileError(
                    f"Expected a readable Parquet file, got {file}, which is not ({error}). Write it again."
                ) from error

        self.units, self._firsts, self._footers, self.num_rows = [], [], [], 0
        for number, metadata in enumerate(_map_files(footer, files)):
            columns = metadata.schema.to_arrow_schema()
            if number == 0:
                schema = columns
            elif not columns.equals(schema):
                raise VolumeFileError(
                    f"Expected the columns of {files[0]}, got others in {files[number]}. Write the data set again."
                )
            self._firsts.append(self.num_rows)
            for group in range(metadata.num_row_groups):
                count = metadata.row_group(group).num_rows
                self.units.append(Unit(number, group, self.num_rows, count))
                self.num_rows += count
            packed = io.BytesIO()
            metadata.write_metadata_file(packed)
            self._footers.append(packed.getvalue())  # a sixth of the memory
        self.features = optional("datasets", "data").Features.from_arrow_schema(schema)
        check_columns(self.features, volume_column, files[0])

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"row {row}" for row in range(self.num_rows))

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    def column(self, name: str) -> Iterator:
        """All values of a column, class labels as their names; one after the other, as Python objects are large."""
        import pyarrow.parquet as pq

        def read(file: str, footer: bytes):
            with _open(file) as stream:
                parquet = pq.ParquetFile(stream, metadata=_unpack_footer(footer))
                return parquet.read(columns=[name], use_threads=False).column(name)

        for column in _map_files(read, self.files, self._footers):
            for chunk in column.chunks:
                yield from class_names_of(chunk.to_pylist(), self.features[name])

    def read(self, unit: Unit, rows: Collection[int]) -> Iterator[tuple[int, Mapping]]:
        """(number, content) of those `rows` of a unit, in its order; for `decode`."""
        import pyarrow.parquet as pq

        wanted, columns = set(rows), [self.volume_column, "shape", "dtype", *_optional(self.features)]
        with _open(self.files[unit.file]) as stream:
            parquet = pq.ParquetFile(stream, metadata=_unpack_footer(self._footers[unit.file]))
            row = unit.first
            for batch in parquet.iter_batches(_UNIT_ROWS, [unit.part], columns, use_threads=False):
                for position in range(len(batch)):
                    if row in wanted:
                        yield row, batch.slice(position, 1).to_pylist()[0]
                    row += 1

    def decode(self, content: Mapping) -> Volume:
        return decode_volume(content, self.volume_column)

    def where(self, row: int) -> str:
        file = bisect.bisect_right(self._firsts, row) - 1
        return f"{self.files[file]}, row {row - self._firsts[file]}"


class TarShards:
    """Cells in tar archives: ``KEY.npz``, ``KEY.npy`` or ``KEY.tif`` with its ``KEY.json``.

    The JSON object holds what the volume file does not: `label`, `source`, `voxel_size_um`, `channel_names`. Nothing
    is unpacked to a folder, and no file of another kind is opened. Headers and JSON are read at construction; over a
    network that means most of the archive, so that large sets are better Parquet there.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is no tar archive, a sample is incomplete or too large, or a key stands twice.
    """

    def __init__(self, files: list[str]):
        self.files = files
        self.units, keys, samples, texts = [], [], [], []
        for number, file in enumerate(files):
            try:
                with _open(file) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                    found = _samples_of(archive, file)
            except tarfile.TarError as error:
                raise VolumeFileError(
                    f"Expected a readable, uncompressed tar, got {file}, which is not ({error}). Write it again."
                ) from error
            for first in range(0, len(found), _UNIT_ROWS):
                count = min(_UNIT_ROWS, len(found) - first)
                self.units.append(Unit(number, 0, len(keys) + first, count))
            keys.extend(found)
            samples.append(np.array([(number, *place) for *place, _ in found.values()], _SAMPLE))
            texts.extend(text for *_, text in found.values())
        self.ids, self.num_rows = tuple(keys), len(keys)
        # as few objects, not some of each cell's own: a worker that counts references to those copies them
        self._samples, self._texts = np.concatenate(samples), b"".join(texts)
        self._text_bounds = np.cumsum([0, *map(len, texts)])
        if len(set(keys)) != len(keys):
            double = next(key for position, key in enumerate(keys) if key in keys[:position])
            raise VolumeFileError(
                f"Expected other keys in each of {', '.join(files[:3])}, ..., got {double} in several. Rename one."
            )

    @property
    def column_names(self) -> list[str]:
        return sorted({name for row in range(self.num_rows) for name in self._metadata(row)})

    def column(self, name: str) -> Iterator:
        """The values of a key of the JSON objects, None where one lacks it."""
        return (self._metadata(row).get(name) for row in range(self.num_rows))

    def read(self, unit: Unit, rows: Collection[int]) -> Iterator[tuple[int, Mapping]]:
        """(number, content) of those `rows` of a unit, in its order; for `decode`."""
        with _open(self.files[unit.file]) as stream:
            for row in range(unit.first, unit.first + unit.count):
                if row in rows:
                    yield row, self._content(stream, row)

    def volume(self, row: int) -> Volume:
        """One volume, wherever it stands."""
        with _open(self.files[self._samples[row]["file"]]) as stream:
            return self.decode(self._content(stream, row))

    def _metadata(self, row: int) -> dict:
        first, stop = self._text_bounds[row : row + 2]
        return json.loads(self._texts[first:stop])

    def _content(self, stream, row: int) -> dict:
        _, suffix, offset, size = self._samples[row].item()
        stream.seek(offset)
        return {"suffix": suffix, "bytes": stream.read(size), "metadata": self._metadata(row)}

    def decode(self, content: Mapping) -> Volume:
        metadata = content["metadata"]
        with tempfile.NamedTemporaryFile(suffix=content["suffix"]) as file:  # the readers want a path
            file.write(content["bytes"])
            file.flush()
            try:
                volume = read_volume(file.name)
            except ValueError as error:
                raise VolumeFileError(str(error).replace(file.name, "it")) from error
        size, names = metadata.get("voxel_size_um"), metadata.get("channel_names")
        return Volume(
            volume.data,
            volume.voxel_size_um if size is None else voxel_size_triple(size),
            volume.channel_names if names is None else tuple(map(str, names)),
        )

    def where(self, row: int) -> str:
        file, suffix, _, _ = self._samples[row].item()
        return f"{self.files[file]}, {self.ids[row]}{suffix}"


def write_shards(
    folder: str | os.PathLike,
    cells: Iterable[tuple[Volume, Mapping]],
    kind: str = "parquet",
    cells_per_shard: int = 1000,
) -> int:
    """Write cells as a data set that `CellTable`, `StreamedCells` and `datasets.load_dataset` read.

    Args:
        folder: gets ``train-00000.parquet``, or ``train-00000.tar``, and so on; it must hold none of them yet.
        cells: volumes, and what else is known of each: `label`, `source`, any strings and numbers, the same names for
            all. One cell is in memory at a time for "webdataset", `cells_per_shard`, compressed, for "parquet".
        kind: "parquet" or "webdataset".
        cells_per_shard: of a file.

    Returns:
        How many cells were written.

    Raises:
        ValueError: if an argument is wrong, or the folder has a data set already.
    """
    folder = Path(folder)
    write, suffix = {"parquet": (_write_parquet_shard, "parquet"), "webdataset": (_write_tar, "tar")}.get(
        kind, (None, "")
    )
    if write is None:
        raise ValueError(f"Expected `kind` 'parquet' or 'webdataset', got {kind!r}. Choose one.")
    if cells_per_shard < 1:
        raise ValueError(f"Expected `cells_per_shard` of at least 1, got {cells_per_shard}. Raise it.")
    if any(folder.glob(f"train-*.{suffix}")):
        raise ValueError(f"Expected a folder without a data set, got {folder}, which holds one. Give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    count, cells = 0, iter(cells)
    for shard, first in enumerate(cells):
        path = folder / f"train-{shard:05}.{suffix}"
        with whole_or_absent(path) as temporary:
            count += write(temporary, _first_then(first, cells, cells_per_shard), count)
    return count


def check_columns(features: Mapping, volume_column: str, where: str) -> None:
    """Refuse a table that has not the columns of `encode_volume`.

    Raises:
        ValueError: if one is missing, or the one of the volumes holds no bytes.
    """
    missing = {volume_column, "shape", "dtype"} - set(features)
    if missing:
        raise VolumeFileError(
            f"Expected the columns {volume_column}, shape and dtype in {where}, got {', '.join(features) or 'none'}."
            " Say which one holds the volumes (--image_column), or write the table with"
            " diffusers_byoc.data.write_shards."
        )
    dtype = getattr(features[volume_column], "dtype", None)
    if dtype not in ("binary", "large_binary"):
        raise VolumeFileError(
            f"Expected bytes in the column {volume_column} of {where}, got {features[volume_column]}. Name another"
            " column (--image_column), or write the table with diffusers_byoc.data.write_shards."
        )


def class_names_of(values: list, feature) -> list:
    """Values of a column, with the numbers of a ClassLabel as its names."""
    names = getattr(feature, "names", None)
    if names is None:
        return values
    return [None if value is None or not 0 <= value < len(names) else names[value] for value in values]


def _optional(features: Mapping) -> list[str]:
    return [name for name in ("voxel_size_um", "channel_names") if name in features]


def _open(file: str):
    import fsspec

    return fsspec.open(file, "rb").open()


def _map_files(function: Callable, files: list[str], *others: list) -> Iterator:
    """`function` of every file, several at once, as each waits for a network or a disk.

    Of few threads, and few files ahead of what has been asked for, as both keep memory.
    """
    with ThreadPoolExecutor(16 if "://" in files[0] else 4) as pool:
        for first in range(0, len(files), 32):
            part = slice(first, first + 32)
            yield from pool.map(function, *(values[part] for values in (files, *others)))


@functools.lru_cache(maxsize=4)  # one file may have thousands of row groups
def _unpack_footer(footer: bytes):
    import pyarrow.parquet as pq

    return pq.read_metadata(io.BytesIO(footer))


def _error_of(name: str, error: Exception) -> Exception:
    message = str(error).split("\n")[0].rstrip(".")
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return ValueError(f"Expected a data set, got {name}, which is none ({message}). Check its name and its files.")
    return FileNotFoundError(
        f"Expected a data set here or on the Hub, got {name}, which is none, or the Hub cannot be reached ({message})."
        " Check the name and the connection."
    )


def _samples_of(archive: tarfile.TarFile, file: str) -> dict[str, tuple[str, int, int, bytes]]:
    """KEY -> (suffix, offset, size, JSON) of the samples of an archive."""
    volumes, texts = {}, {}
    for member in archive:
        key, suffix = os.path.splitext(member.name.removeprefix("./"))
        key, suffix = key.removesuffix(".ome"), suffix.lower()
        found = texts if suffix == ".json" else volumes
        if suffix not in (".json", *SAMPLE_SUFFIXES) or PurePosixPath(key).name.startswith("."):
            continue
        limit = MAX_JSON_BYTES if suffix == ".json" else MAX_VOLUME_BYTES
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 < member.size <= limit:
            raise VolumeFileError(
                f"Expected a file of 1 to {limit} bytes in {file}, {member.name}, got {member.size}. Write it again."
            )
        if key in found:
            raise VolumeFileError(f"Expected the key {key} once in {file}, got {member.name} again. Rename one.")
        if suffix == ".json":
            texts[key] = archive.extractfile(member).read()
            try:
                if not isinstance(json.loads(texts[key]), dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                raise VolumeFileError(
                    f"Expected a JSON object in {file}, {member.name}, got another text ({error}). Correct it."
                ) from error
        else:
            volumes[key] = (suffix, member.offset_data, member.size)
    if not volumes:
        raise VolumeFileError(
            f"Expected members KEY{'/'.join(SAMPLE_SUFFIXES)} with KEY.json in {file}, got no cells. Write it again."
        )
    lonely = sorted(set(texts) - set(volumes))
    if lonely:
        raise VolumeFileError(
            f"Expected a volume beside {lonely[0]}.json in {file}, got none. Add it, or delete this one."
        )
    return {key: (*volume, texts.get(key, b"{}")) for key, volume in volumes.items()}


def _first_then(first, rest: Iterator, count: int) -> Iterator:
    yield first
    for _, item in zip(range(count - 1), rest, strict=False):
        yield item


def _write_parquet_shard(path: Path, cells: Iterator[tuple[Volume, Mapping]], num_before: int) -> int:
    return write_parquet(path, cells)


def write_parquet(path: Path, cells: Iterable[tuple[Volume, Mapping]]) -> int:
    """Write cells, and what else is known of each, into one Parquet file, as `write_shards` does; returns how many."""
    rows = [encode_volume(volume) | dict(columns) for volume, columns in cells]
    datasets = optional("datasets", "data")
    types = {"shape": "int64", "voxel_size_um": "float64", "channel_names": "string"}
    table = datasets.Dataset.from_list(rows)
    # where no cell of a file has a value, its type would be null, and the files would differ
    table = table.cast(datasets.Features(table.features | {k: [datasets.Value(v)] for k, v in types.items()}))
    table.to_parquet(path, batch_size=_UNIT_ROWS)  # also the size of the row groups
    return len(rows)


def _write_tar(path: Path, cells: Iterator[tuple[Volume, Mapping]], num_before: int) -> int:
    count = 0
    with tarfile.open(path, "w") as archive:
        for volume, columns in cells:
            beside = {"voxel_size_um": volume.voxel_size_um, "channel_names": volume.channel_names} | dict(columns)
            array = io.BytesIO()
            np.savez_compressed(array, volume=volume.data)
            for suffix, content in ((".npz", array.getvalue()), (".json", json.dumps(beside).encode())):
                member = tarfile.TarInfo(f"{num_before + count:08}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            count += 1
    return count
