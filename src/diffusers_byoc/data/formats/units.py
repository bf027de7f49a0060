"""Lengths as files state them: a number and a unit, for each axis its own."""

import math
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple


_PREFIXES = {
    **{"Y": 24, "Z": 21, "E": 18, "P": 15, "T": 12, "G": 9, "M": 6, "k": 3, "h": 2, "da": 1, "": 0, "d": -1, "c": -2},
    **{"m": -3, "μ": -6, "u": -6, "n": -9, "p": -12, "f": -15, "a": -18, "z": -21, "y": -24},
}
_PREFIX_NAMES = {
    **{"yotta": 24, "zetta": 21, "exa": 18, "peta": 15, "tera": 12, "giga": 9, "mega": 6, "kilo": 3, "hecto": 2},
    **{"deca": 1, "deka": 1, "": 0, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9, "pico": -12},
    **{"femto": -15, "atto": -18, "zepto": -21, "yocto": -24},
}
_MICROMETRES = {
    **{f"{prefix}m": float(f"1e{power + 6}") for prefix, power in _PREFIXES.items()},
    **{
        f"{prefix}{metre}": float(f"1e{power + 6}")
        for prefix, power in _PREFIX_NAMES.items()
        for metre in ("meter", "meters", "metre", "metres")
    },
    **dict.fromkeys(("micron", "microns", "μ"), 1.0),
    **dict.fromkeys(("Å", "å", "ang", "angstrom", "angstroms", "ångström", "ångstrom"), 1e-4),
    **dict.fromkeys(("in", "inch", "inches", '"'), 25400.0),
    **dict.fromkeys(("thou", "mil"), 25.4),
    **dict.fromkeys(("ft", "foot", "feet"), 304800.0),
    **dict.fromkeys(("yd", "yard", "yards"), 914400.0),
}


class Step(NamedTuple):
    """From one voxel to the next, as the file says it.

    Args:
        length: None where it says none.
        unit: None where it says none.
    """

    length: float | None
    unit: str | None

    def __str__(self) -> str:
        return "nothing" if self.length is None else f"{self.length:g} {self.unit or 'without a unit'}"


class VoxelSize(NamedTuple):
    """What a file says of the size of its voxels.

    Args:
        um: (z, y, x) edges in µm; None if it does not say all three.
        stated: what it says of each axis, for messages.
        is_wrong: it says something that can be no voxel size: a unit that is no length, a step of 0 or less.
    """

    um: tuple[float, float, float] | None
    stated: str
    is_wrong: bool = False


NOT_STATED = VoxelSize(None, "nothing")


def micrometres(unit: str) -> float | None:
    """How many µm a unit is, in any spelling of ImageJ, OME or OME-Zarr; None if it is no length that is known."""
    unit = unicodedata.normalize("NFKC", unit).replace("Â", "").strip()  # µ in UTF-8, taken for Latin-1, is Âµ
    return _MICROMETRES.get(unit, _MICROMETRES.get(unit.lower()))


def voxel_size_of(steps: Mapping[str, Step]) -> VoxelSize:
    """The voxel size from the steps of the axes "Z", "Y" and "X", each in its own unit."""
    steps = {axis: steps.get(axis, Step(None, None)) for axis in "ZYX"}
    stated = ", ".join(f"{axis.lower()}: {step}" for axis, step in steps.items())
    sizes, is_known = [], True
    for length, unit in steps.values():
        if length is not None and not (math.isfinite(length) and length > 0):
            return VoxelSize(None, stated, is_wrong=True)
        if length is None or not unit:
            is_known = False
        elif (scale := micrometres(unit)) is None:
            return VoxelSize(None, f"{stated} ({unit!r} is no unit of length)", is_wrong=True)
        else:
            sizes.append(length * scale)
    return VoxelSize(tuple(sizes) if is_known else None, stated)
