import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusers_byoc.data import Volume


SCRIPT = Path(__file__).parents[2] / "examples" / "view_in_napari.py"
SAVED = Path(__file__).parents[1] / "pipelines" / "saved"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("view_in_napari", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_cells_have_a_layer_a_channel_with_scale_and_names(script):
    cells = script.generate(SAVED / "conditional", 2, "nocodazole", 0)
    found = list(script.layers(cells, ["cell 1", "cell 2"]))
    names = [options["name"] for _, options in found]
    assert names == ["cell 1: cell", "cell 1: nucleus", "cell 2: cell", "cell 2: nucleus"]
    assert all(data.shape == (8, 8, 8) and options["scale"] == (1.0, 0.5, 0.5) for data, options in found)
    np.testing.assert_array_equal(found[3][0], cells[1].data[1])
    assert [options["colormap"] for _, options in found[:2]] == ["green", "magenta"]
    assert [options["translate"] for _, options in found[1:3]] == [(0, 0, 0), (0, 0, pytest.approx(8 * 0.5 * 1.1))]


def test_files_of_other_sizes_do_not_overlap(script):
    cells = [Volume(np.ones((3, 4, 4, length), np.uint16)) for length in (10, 4, 6)]
    found = list(script.layers(cells, ["a", "b", "c"]))
    assert found[2][1]["name"] == "a: channel 2" and found[0][1]["contrast_limits"] == (0, 1)
    starts = [options["translate"][2] for _, options in found[::3]]
    assert all(end >= start + 10 for start, end in zip(starts, starts[1:], strict=False))


@pytest.mark.skipif(importlib.util.find_spec("napari") is not None, reason="napari would open its window")
def test_without_napari_it_says_what_to_install():
    done = subprocess.run([sys.executable, SCRIPT, "cell.tif"], capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "napari[all]"' in done.stderr
