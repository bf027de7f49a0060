"""Files and folders that are whole or absent, whenever the process ends, and folders that one process writes into."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .optional import optional


LOCK_NAME = "run.lock"
TEMPORARY_PREFIX = ".tmp-"  # of folders that only a process that was killed leaves behind


@contextmanager
def whole_or_absent(path: str | os.PathLike) -> Iterator[Path]:
    """A place to write a file or a folder in; it gets its own at the end, and not if that is never reached.

    What had that name before is replaced. Folders above are made as needed. The place is in a hidden folder beside
    `path`, under the same name, as some writers look at it; each call has its own.

    Args:
        path: of the file or the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=path.parent) as folder:
        yield Path(folder) / path.name
        move_into_place(Path(folder) / path.name, path)


def move_into_place(whole: Path, path: Path) -> None:
    """Give a whole file or folder its name; an older one of that name is removed first, if it is a folder."""
    if path.is_dir() and not path.is_symlink():  # what is not empty cannot be replaced in one step
        remove(path)
    whole.replace(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one; a folder under another name, so that no half one keeps its own."""
    if path.is_dir() and not path.is_symlink():
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
        path.rename(folder / path.name)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_left_overs(directory: Path) -> None:
    """Remove what processes that were killed left in a folder and those below it; nobody may be writing there."""
    for folder in list(directory.rglob(f"{TEMPORARY_PREFIX}*")):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def lock_folder(directory: str | os.PathLike) -> Iterator[None]:
    """Hold `directory`, made if missing, for this process alone; the system lets go of it however the process ends.

    Raises:
        OSError: if another process holds it, or it cannot be written to.
        ImportError: if filelock is not installed.
    """
    filelock = optional("filelock", "data")
    directory = Path(directory)
    path, is_new = directory / LOCK_NAME, not directory.exists()
    lock = filelock.FileLock(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        with suppress(OSError):  # Windows lets nobody write a locked file; the name is a courtesy
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except filelock.Timeout as error:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        raise OSError(
            f"Expected a folder of its own for this run, got {directory}: {holder} is writing into it. Wait for it to"
            " end, stop it, or give another --output_dir."
        ) from error
    except OSError as error:
        raise OSError(
            f"Expected a folder to write into, got {directory}, which cannot be written to"
            f" ({error.strerror or error}). Make it writable, or give another --output_dir."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # before letting go, so that no other process can hold the old file
            path.unlink()
        lock.release()
        if is_new and not any(directory.iterdir()):
            directory.rmdir()
