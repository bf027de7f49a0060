import math

import pytest

from diffusers_byoc.data.formats.units import Step, micrometres, voxel_size_of


@pytest.mark.parametrize(
    ("size", "spellings"),
    [
        (
            1.0,
            ["µm", "μm", "um", "UM", "micron", "microns", "Micron", "micrometer", "micrometre", "Micrometers", "Âµm"],
        ),
        (1e-3, ["nm", "nanometer", "nanometre", "Nanometers"]),
        (1e3, ["mm", "millimeter", "millimetre"]),
        (1e4, ["cm", "centimeter"]),
        (1e6, ["m", "meter", "metre"]),
        (1e-4, ["Å", "\u212b", "angstrom", "Angstrom", "ångström"]),
        (25400.0, ["inch", "in", "Inches"]),
        (1e-6, ["pm", "picometer"]),
        (1e12, ["Mm", "megameter"]),  # not the same as mm
    ],
)
def test_every_spelling_of_a_unit(size, spellings):
    assert [micrometres(spelling) for spelling in spellings] == [pytest.approx(size, rel=1e-12)] * len(spellings)


@pytest.mark.parametrize("unit", ["pixel", "pixels", "", "sec", "reference frame", "µ m", "foo", "m2", "unknown"])
def test_what_is_no_length_is_none(unit):
    assert micrometres(unit) is None


def test_each_axis_in_its_own_unit():
    size = voxel_size_of({"Z": Step(1500.0, "nm"), "Y": Step(0.5, "µm"), "X": Step(2.5e-7, "m")})
    assert size.um == pytest.approx((1.5, 0.5, 0.25)) and not size.is_wrong


@pytest.mark.parametrize(
    ("steps", "is_wrong", "stated"),
    [
        ({}, False, "z: nothing, y: nothing, x: nothing"),
        ({"Y": Step(0.5, "um"), "X": Step(0.5, "um")}, False, "z: nothing, y: 0.5 um, x: 0.5 um"),
        ({axis: Step(1.0, None) for axis in "ZYX"}, False, "z: 1 without a unit"),
        ({"Z": Step(7.0, "pixel"), "Y": Step(0.5, "um"), "X": Step(0.5, "um")}, True, "'pixel' is no unit of length"),
        ({axis: Step(1.0, "furlong") for axis in "ZYX"}, True, "'furlong' is no unit of length"),
        ({axis: Step(-1.0, "um") for axis in "ZYX"}, True, "z: -1 um"),
        ({"Z": Step(0.0, "um"), "Y": Step(0.5, "um"), "X": Step(0.5, "um")}, True, "z: 0 um"),
        ({axis: Step(math.nan, "um") for axis in "ZYX"}, True, "nan"),
        ({axis: Step(math.inf, None) for axis in "ZYX"}, True, "inf"),
    ],
)
def test_what_is_missing_is_told_from_what_is_wrong(steps, is_wrong, stated):
    size = voxel_size_of(steps)
    assert size.um is None and size.is_wrong == is_wrong and stated in size.stated
