import importlib.util

import numpy as np
import pytest
from PIL import Image

from diffusers_byoc.visualization import frame_strip, sample_library, write_film


def frames(count=5):
    volumes = np.zeros((count, 2, 6, 6, 6), np.float32)
    for index in range(count):
        volumes[index, 0, 3, 3, index] = 1.0  # a voxel that wanders along x
    return volumes


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def test_a_strip_shows_frames_evenly_apart():
    strip = pixels(frame_strip(frames(), num_tiles=3))
    assert np.array_equal(strip, pixels(sample_library(frames()[[0, 2, 4]], num_columns=3)))
    assert np.array_equal(pixels(frame_strip(frames(2))), pixels(sample_library(frames(2), num_columns=2)))
    with pytest.raises(ValueError, match="num_tiles of at least 2, got 1"):
        frame_strip(frames(), num_tiles=1)


def test_a_gif_holds_every_frame(tmp_path):
    path = write_film(frames(), tmp_path / "films" / "cells.gif", fps=10, magnification=3)
    with Image.open(path) as film:
        assert (film.n_frames, film.size, film.info["duration"]) == (5, (18, 18), 100)
        for index in range(5):
            film.seek(index)
            brightness = np.asarray(film.convert("RGB"), int).sum(-1)
            y, x = np.unravel_index(brightness.argmax(), brightness.shape)
            assert (y // 3, x // 3) == (3, index)


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="the extra film is not installed")
def test_an_mp4_holds_every_frame(tmp_path):
    import imageio

    path = write_film(frames(), tmp_path / "cells.mp4", magnification=16)
    assert sum(1 for _ in imageio.get_reader(path)) == 5


def test_an_mp4_names_its_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"diffusers_byoc\[film\]"):
        write_film(frames(), tmp_path / "cells.mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((frames(), "cells.avi"), "ends in .gif or .mp4"),
        ((frames(), "cells.gif", (0, 1), 0), "fps and magnification of at least 1, got 0 and 4"),
        ((frames()[0], "cells.gif"), "channels of frames"),
        ((frames() + 2, "cells.gif"), "frames"),
    ],
)
def test_films_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        write_film(*arguments)
