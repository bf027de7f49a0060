import numpy as np
import pytest

from diffusers_byoc.app import numbers
from diffusers_byoc.metrics import measure_cell


def ball(radius, nucleus_radius, edge=24):
    axis = np.arange(edge) - (edge - 1) / 2
    distance = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    return np.stack([np.clip(r + 0.5 - distance, 0, 1) for r in (radius, nucleus_radius)]).astype(np.float32)


def test_what_is_measured_stands_in_its_row():
    volumes = np.stack([ball(9, 4), ball(8, 5)])
    measured = numbers.measure(volumes, (1.0, 1.0, 1.0))
    assert measured.shape == (2, len(numbers.SHOWN))
    names = list(numbers.SHOWN)
    assert measured[0, names.index("nucleus_volume_um3")] == measure_cell(volumes[0]).nucleus_volume_um3
    swapped = numbers.measure(volumes[:, ::-1], (1.0, 1.0, 1.0), ("nucleus", "cell"))
    np.testing.assert_array_equal(swapped, measured)

    headings, rows = numbers.table(measured, 1, None)
    assert headings == ["", "cell 2", "all 2 shown"] and len(rows) == len(names)
    volume = rows[0]
    assert volume[0] == "cell volume, µm³"
    assert float(volume[1].replace(",", "")) == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.05)
    headings, rows = numbers.table(measured, 0, np.full((5, len(names)), 1234.4))
    assert headings[-1] == "5 phantoms" and rows[3][-1] == "1,234 (1,234 to 1,234)"


def test_what_a_cell_lacks_is_left_out():
    measured = numbers.measure(np.stack([ball(9, 4)])[:, :1], (1.0, 1.0, 1.0), ("cell",))
    _, rows = numbers.table(measured, 0, None)
    nucleus = rows[list(numbers.SHOWN).index("nucleus_volume_um3")]
    assert nucleus[1:] == ["–", "–"]
    shown = numbers.distributions(measured, np.ones((3, len(numbers.SHOWN))))
    assert list(shown) == ["shown", "phantoms"]
    assert list(shown["shown"]) == list(shown["phantoms"]) and "nucleus volume, µm³" not in shown["shown"]


def test_phantoms_are_measured_once(monkeypatch):
    monkeypatch.setattr(numbers, "NUM_PHANTOMS", 2)
    numbers.measure_phantoms.cache_clear()
    measured = numbers.measure_phantoms("nocodazole")
    assert measured.shape == (2, len(numbers.SHOWN)) and 1000 < measured[:, 0].min() and measured[:, 0].max() < 20_000
    assert numbers.measure_phantoms("nocodazole") is measured
    assert numbers.measure_phantoms("aspirin") is None
    numbers.measure_phantoms.cache_clear()
