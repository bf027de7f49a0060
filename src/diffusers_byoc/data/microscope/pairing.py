"""Which label image and which row of a table belong to which stack: by name, never by order."""

import glob
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..formats.reading import ending_of


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
            raise FileNotFoundError(
                f"Expected files of the name {pattern}, got none. Check the path, and quote a pattern for the shell."
            )
        if broken := [path for path in found if not path.exists()]:
            raise FileNotFoundError(f"Expected a file, got {broken[0]}, a link to none. Mend or remove it.")
        paths.update(found)
    return sorted(paths)


def pair_labels(images: Sequence[Path], labels: Sequence[Path]) -> dict[Path, Path]:
    """The label image of each stack, by name.

    A label image within an OME-Zarr (``labels/NAME``) belongs to that one, a field of a plate to the same field of the
    plate whose name agrees. Names agree if they are equal without their endings and without words that label images
    are marked by (``_masks``, ``_cp_masks``, ``labels_``, ``.ome``, ...); else if the label image's contains that of
    the stack as whole words, the longest such one. Of several stacks of that name, that one counts whose folders have
    most names in common with those of the label image. A field of a plate is called by its place, ``A_1_0``.

    Raises:
        ValueError: unless each stack has one label image and each label image belongs to one stack; all that do not
            are named.
    """
    stems = {image: _stem(image) for image in images}
    at_place = {}
    for image in images:
        at_place.setdefault(_parts(image), []).append(image)
    pairs, problems = {}, []
    for label in labels:
        container, inner = _parts(label)
        found = [label.parent.parent] if label.parent.name == "labels" and label.parent.parent in stems else []
        if inner and not found:
            for candidate in _candidates(container):
                found = found or at_place.get((candidate, inner), [])
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
            "Expected one label image of its name for every image (A1.ome.tif and A1_masks.tif), got other ones."
            " Rename or add:\n  " + _listed(problems)
        )
    return {image: pairs[image][0] for image in images}


def pair_rows(
    images: Sequence[Path], rows: Sequence[tuple[int, dict[str, str]]], where: str
) -> dict[Path, dict[str, str]]:
    """The metadata row of each stack, by its column `file_name`: a name, or the last part of a path, or all of it.

    Of a plate a row may name a field (``plate.ome.zarr/A/1/0``, ``A/1/0``) or a well with all its fields (``A/1``).

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
        if not found:
            fields = [image for image in images if _parts(image)[1]]
            found = [image for image in fields if names[image].rpartition("/")[0].endswith(name)]
        is_well = len({image.parent for image in found}) == 1 and all(_parts(image)[1] for image in found)
        if len(found) != 1 and not is_well:
            which = " and ".join(map(str, found[:3])) if found else "no image"
            problems.append(f"line {line}: {row['file_name']!r} names {which}")
        elif set(found) & set(pairs):
            problems.append(f"line {line}: {row['file_name']!r} stands already in an earlier line")
        else:
            pairs |= dict.fromkeys(found, row)
    problems += [f"no row for {image}" for image in images if image not in pairs]
    if problems:
        raise ValueError(
            f"Expected one row for every image in {where}, and one image for every row, got others. Correct"
            " file_name:\n  " + _listed(problems)
        )
    return {image: pairs[image] for image in images}


def _plain(path: str | Path) -> str:
    """With / between folders, and letters with marks as one character (macOS writes them as two)."""
    plain = unicodedata.normalize("NFC", str(path)).replace("\\", "/")
    return re.sub(r"/+", "/", plain).removeprefix("./").strip("/")


def _parts(path: Path) -> tuple[str, str]:
    """Name of the OME-Zarr that a path leads into, without its ending, and what follows, A/1/0; "" and "" if none."""
    for parent in path.parents:
        if parent.suffix.lower() == ".zarr":
            return _stem(parent), path.relative_to(parent).as_posix()
    return "", ""


def _stem(path: Path) -> str:
    if inner := _parts(path)[1]:
        return inner.replace("/", "_")
    name, ending = unicodedata.normalize("NFC", path.name), ending_of(path)
    stem = name[: -len(ending)] if ending else Path(name).stem
    return stem[: -len(".ome")] if stem.lower().endswith(".ome") else stem


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
