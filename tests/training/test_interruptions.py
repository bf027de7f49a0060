import os
import signal
import subprocess
import sys

import pytest

from diffusers_byoc.training import Termination, lock_folder


HOLD = """
import sys
from diffusers_byoc.training import lock_folder
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


def test_sigterm_is_noticed_once_asked_for(accelerator):
    before = signal.getsignal(signal.SIGTERM)
    termination = Termination()
    assert not termination.requested(accelerator)
    os.kill(os.getpid(), signal.SIGTERM)
    assert termination.requested(accelerator)
    termination.close()
    assert signal.getsignal(signal.SIGTERM) is before
