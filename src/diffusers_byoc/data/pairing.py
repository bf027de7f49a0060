"""Which label image and which row of a table belong to which stack: by name, never by order."""

import glob
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path


_SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".ome.zarr", ".zarr", ".czi", ".nd2", ".lif")
_LABEL_WORDS = {
    *("mask", "masks", "label", "labels", "seg", "segmentation", "instances", "cp", "cellpose", "stardist"),
    *("cell", "cells", "cyto", "cytoplasm", "nuc", "nuclei", "nucleus"),
}
_MAX_LISTED = 20


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Sorted paths that match any of some patterns (``*``, ``?``, ``[]``, ``**`` for folders); hidden ones left out.

    Raises:
        FileNotFoundError: if a pattern matches nothing.
    """
    paths = set()
    for pattern in patterns:
        # what exists is no pattern, whatever its name
        root = next(path for path in (Path(pattern), *Path(pattern).parents) if os.path.lexists(path))
        rest = str(Path(pattern).relative_to(root))
        found = [root] if rest == "." else [root / path for path in glob.glob(rest, root_dir=root, recursive=True)]
        found = [path for path in found if not path.name.startswith(".")]
        if not found:
            raise FileNotFoundError(f"{pattern}: no such files; check the path, and quote a pattern for the shell")
        if broken := [path for path in found if not path.exists()]:
            raise FileNotFoundError(f"{broken[0]}: expected a file, got a link to none; mend or remove it")
        paths.update(found)
    return sorted(paths)


def pair_labels(images: Sequence[Path], labels: Sequence[Path]) -> dict[Path, Path]:
    """The label image of each stack, by name.

    Names agree if they are equal without their endings and without words that label images are marked by (``_masks``,
    ``_cp_masks``, ``labels_``, ``.ome``, ...); else if the label image's contains that of the stack as whole words,
    the longest such one. Of several stacks of that name, that one counts whose folders have most names in common
    with those of the label image.

    Raises:
        ValueError: unless each stack has one label image and each label image belongs to one stack; all that do not
            are named.
    """
    stems = {image: _stem(image) for image in images}
    pairs, problems = {}, []
    for label in labels:
        found = []
        for candidate in _candidates(_stem(label)):
            found = found or [image for image, stem in stems.items() if stem == candidate]
        if not found:
            contained = [image for image, stem in stems.items() if _contains(_stem(label), stem)]
            longest = max((len(stems[image]) for image in contained), default=0)
            found = [image for image in contained if len(stems[image]) == longest]
        common = {image: len(set(image.absolute().parts[:-1]) & set(label.absolute().parts[:-1])) for image in found}
        found = [image for image in found if common[image] == max(common.values())]
        if len(found) != 1:
            problems.append(f"{label}: belongs to " + (" or ".join(map(str, found)) if found else "no image"))
            continue
        pairs.setdefault(found[0], []).append(label)
    for image in images:
        if len(pairs.get(image, [])) != 1:
            problems.append(
                f"{image}: has " + (" and ".join(map(str, pairs[image])) if image in pairs else "no labels")
            )
    if problems:
        raise ValueError(
            "every image needs one label image of its name (A1.ome.tif and A1_masks.tif); rename or add:\n  "
            + _listed(problems)
        )
    return {image: pairs[image][0] for image in images}


def pair_rows(
    images: Sequence[Path], rows: Sequence[tuple[int, dict[str, str]]], where: str
) -> dict[Path, dict[str, str]]:
    """The metadata row of each stack, by its column `file_name`: a name, or the last part of a path, or all of it.

    Args:
        images: the stacks.
        rows: see `read_metadata`.
        where: name of the table, for messages.

    Raises:
        ValueError: unless each stack has one row and each row belongs to one stack; all that do not are named.
    """
    names = {image: "/" + _plain(image.absolute()) for image in images}
    pairs, problems = {}, []
    for line, row in rows:
        name = "/" + _plain(row["file_name"].strip())
        found = [image for image, path in names.items() if path.endswith(name)]
        if len(found) != 1:
            which = " and ".join(map(str, found[:3])) if found else "no image"
            problems.append(f"line {line}: {row['file_name']!r} names {which}")
        elif found[0] in pairs:
            problems.append(f"line {line}: {row['file_name']!r} stands already in an earlier line")
        else:
            pairs[found[0]] = row
    problems += [f"no row for {image}" for image in images if image not in pairs]
    if problems:
        raise ValueError(
            f"{where}: every image needs one row, and every row one image; correct file_name:\n  " + _listed(problems)
        )
    return {image: pairs[image] for image in images}


def _plain(path: str | Path) -> str:
    """With / between folders, and letters with marks as one character (macOS writes them as two)."""
    plain = unicodedata.normalize("NFC", str(path)).replace("\\", "/")
    return re.sub(r"/+", "/", plain).removeprefix("./").strip("/")


def _stem(path: Path) -> str:
    name = unicodedata.normalize("NFC", path.name)
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem


def _candidates(stem: str) -> Iterator[str]:
    """The name, then without its last word, and so on, while the words are those of label images; the first too."""
    yield stem
    words = re.split(r"([\W_]+)", stem)  # word, separator, word, ...
    if len(words) > 1 and words[-1].lower() in _LABEL_WORDS:
        yield from _candidates("".join(words[:-2]))
    if len(words) > 1 and words[0].lower() in _LABEL_WORDS:
        yield from _candidates("".join(words[2:]))


def _contains(text: str, part: str) -> bool:
    return re.search(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])", text) is not None


def _listed(problems: list[str]) -> str:
    more = [f"... and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    return "\n  ".join([*problems[:_MAX_LISTED], *more])
