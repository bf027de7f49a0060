"""Files of every format, cut and overwritten at random places: a volume, or one line that names the file."""

import resource
import shutil
import sys

import numpy as np
import pytest
import tifffile

from diffusers_byoc.data import read_volume, write_volume
from diffusers_byoc.data.microscope.stacks import open_stack, read_channels


SHAPE = (2, 5, 24, 26)


def write_all(folder):
    """A small file of every format and compression; names -> what is in it."""
    data = np.random.default_rng(0).integers(0, 2**16, SHAPE).astype(np.uint16)
    data[:, :, :8] = 100  # something to compress
    ome = {"axes": "CZYX"} | {f"PhysicalSize{axis}": 0.5 for axis in "ZYX"}
    for compression in (None, "zlib", "lzw", "zstd"):
        options = {"photometric": "minisblack", "compression": compression}
        tifffile.imwrite(folder / f"{compression}.ome.tif", data, ome=True, metadata=ome, **options)
        tifffile.imwrite(folder / f"{compression}.tif", data, **options)
    options = {"tile": (16, 16), "compression": "zlib", "predictor": True, "photometric": "minisblack"}
    tifffile.imwrite(folder / "tiled.tif", data, **options)
    tifffile.imwrite(folder / "imagej.tif", data.swapaxes(0, 1), imagej=True, metadata={"axes": "ZCYX", "unit": "um"})
    np.save(folder / "a.npy", data)
    np.savez(folder / "b.npz", volume=data)
    np.savez_compressed(folder / "c.npz", volume=data, voxel_size_um=np.array([1.0, 2.0, 3.0]))
    np.save(folder / "d_seg.npy", {"masks": data[0], "filename": "A1.tif"})
    for suffix in (".nii", ".nii.gz", ".ome.zarr", ".tiff"):
        write_volume(folder / f"written{suffix}", data / 65535, 0.5)
    return {path.name: data[:1] if "seg" in path.name else data for path in sorted(folder.iterdir())}


def damage(path, rng):
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        metadata = [file for file in files if file.name in (".zattrs", ".zarray")]
        path = files[rng.integers(len(files))] if rng.random() < 0.6 else metadata[rng.integers(len(metadata))]
    content = bytearray(path.read_bytes())
    if content and rng.random() < 0.3:
        content = content[: rng.integers(len(content))]
    for _ in range(rng.integers(1, 6) if content else 0):
        at, length = int(rng.integers(min(len(content), rng.choice([400, 10**9])))), int(rng.integers(1, 9))
        content[at : at + length] = [rng.bytes(length), b"\xff" * length, bytes(length)][rng.integers(3)]
    path.write_bytes(bytes(content))


def check(tmp_path, num_files, seed):
    pytest.importorskip("nibabel")
    pytest.importorskip("ome_zarr")
    (tmp_path / "whole").mkdir()
    contents, rng, num_read = write_all(tmp_path / "whole"), np.random.default_rng(seed), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(num_files):
        name = list(contents)[number % len(contents)]
        folder = tmp_path / str(number)
        folder.mkdir()
        copy = shutil.copytree if (tmp_path / "whole" / name).is_dir() else shutil.copy
        path = copy(tmp_path / "whole" / name, folder / name)
        damage(path, rng)
        answers = []
        for read in (read_volume, lambda path: read_channels(open_stack(path))):
            try:
                data = read(path).data
            except (ValueError, ImportError) as error:
                message = str(error)
                assert message.startswith("Expected") and name in message and "\n" not in message, message
                # to a stack the size can be given by hand
                answers.append("read" if message.startswith("Expected a voxel size") else "refused")
            else:
                # of a TIFF that says nothing of its axes, two channels are as good as twice the planes
                assert data.shape == contents[name].shape or data.size == contents[name].size, name
                answers.append("read")
        assert len(set(answers)) == 1, f"{name}: {answers}"
        num_read += answers[0] == "read"
        shutil.rmtree(folder)
    assert 0 < num_read < num_files / 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB on Linux


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
def test_a_hundred_damaged_files(tmp_path):
    check(tmp_path, 100, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
def test_a_thousand_damaged_files(tmp_path):
    check(tmp_path, 1000, seed=1)
