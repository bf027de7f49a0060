import numpy as np
import pytest

from diffusers_byoc.data import Volume, write_shards


def make_volume(number):
    """A cell whose first voxel above background tells its number: 100 + number, of at most 255."""
    data = np.zeros((2, 4, 5, 6), np.uint8)
    data[:, 1:3, 1:4, 1:5] = 255
    data[:, 1, 1, 1] = 100 + number
    return Volume(data, (0.5, 0.5, 0.5), ("cell", "nucleus"))


def number_of(item):
    """The number of a preprocessed cell of `make_volume`."""
    volumes = item["volumes"]
    corner = (volumes.flatten(-4) > -1).nonzero()[0, 0]
    return round((volumes.flatten(-4)[corner].item() + 1) / 2 * 255) - 100


@pytest.fixture(params=["parquet", "webdataset"])
def shards(request, tmp_path):
    """23 cells in three files, of labels a and b, four of each source image."""
    cells = ((make_volume(i), {"label": "ab"[i % 2], "source": f"image {i // 4}", "well": i % 3}) for i in range(23))
    assert write_shards(tmp_path / "cells", cells, request.param, cells_per_shard=10) == 23
    return tmp_path / "cells"
