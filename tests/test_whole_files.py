import os
import subprocess
import sys

import pytest

from diffusers_byoc.whole_files import lock_folder, remove_left_overs, whole_or_absent


HOLD = """
import sys
from diffusers_byoc.whole_files import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_is_killed(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OSError, match=f"process {holder.pid} on .* give another --output_dir"), lock_folder(folder):
        pass
    holder.kill()
    holder.wait()
    with lock_folder(folder):
        assert f"process {os.getpid()} " in (folder / "run.lock").read_text()
    assert folder.is_dir()  # it was not made by this process


def test_a_folder_that_stayed_empty_is_removed(tmp_path):
    with pytest.raises(ValueError), lock_folder(tmp_path / "new"):
        raise ValueError
    assert not (tmp_path / "new").exists()
    with lock_folder(tmp_path / "new"):
        (tmp_path / "new" / "split.json").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["split.json"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to .* give another --output_dir"):
        with lock_folder(tmp_path / "file" / "run"):
            pass


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_fails_midway_leaves_the_old_one_alone(tmp_path, is_folder):
    def write(path, text):
        if is_folder:
            path.mkdir()
            path /= "inside"
        path.write_text(text)

    def read():
        path = tmp_path / "new" / "name.zarr"
        return (path / "inside" if is_folder else path).read_text()

    path = tmp_path / "new" / "name.zarr"
    with whole_or_absent(path) as temporary:
        write(temporary, "old")
        assert not path.exists() and temporary.suffix == ".zarr"
    with pytest.raises(RuntimeError), whole_or_absent(path) as temporary:
        write(temporary, "half")
        raise RuntimeError
    assert read() == "old"
    with whole_or_absent(path) as temporary:
        write(temporary, "new")
    assert read() == "new" and list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = """
import os, sys
from diffusers_byoc.whole_files import whole_or_absent
with whole_or_absent(sys.argv[1]) as temporary:
    temporary.mkdir()
    (temporary / "half").touch()
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "below" / "name"])
    assert not (tmp_path / "below" / "name").exists() and len(list(tmp_path.rglob("half"))) == 1
    remove_left_overs(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["below"]
