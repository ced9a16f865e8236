"""The files of a run. Each is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ggam_fast.training.errors import TrainError

LOCK = ".lock"
_PART = ".part-"
_WAIT = 0.2  # seconds


@contextmanager
def output_folder(
    out: Path | None, data_name: str, *, overwrite: bool = False, resume: Path | None = None
) -> Iterator[Path]:
    """The folder of a run: `resume`, else `out`, else runs/<data_name>-<time>.

    The folder is made and checked. If the run fails without a result, it is removed again.

    Raises:
        TrainError: the folder cannot be made or written, it is not empty, or another run is writing to it.
    """
    folder = resume or out or Path("runs") / f"{data_name}-{time.strftime('%Y%m%d-%H%M%S')}"

    def busy() -> None:
        raise TrainError(f"--out {folder} is in use: another run is writing to it")

    with writable_folder(folder), locked(folder / LOCK, busy):
        results = any(path.name != LOCK for path in folder.iterdir())
        if results and not overwrite and resume is None:
            raise TrainError(f"--out {folder} is not empty; choose another folder or add --overwrite")
        remove_parts(folder)
        yield folder


@contextmanager
def locked(path: Path, busy: Callable[[], object]) -> Iterator[bool]:
    """Hold the lock file `path`, and remove it afterwards. Yield whether it is held.

    On a file system without support for locks, this does nothing and yields False.

    While another process holds the lock, this waits and calls `busy` repeatedly. `busy` may raise.
    If a process is killed, the operating system releases its lock.
    """
    lock, held = FileLock(path, blocking=False), False
    while not held:
        try:
            lock.acquire()
            held = True
        except Timeout:
            busy()
            time.sleep(_WAIT)
        except (OSError, NotImplementedError):
            break
    try:
        yield held
    finally:
        if held:
            path.unlink(missing_ok=True)  # it is still held; a waiting filelock notices that the file is gone
            lock.release()


@contextmanager
def writable_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and check that it can be written. Remove it again if it stays empty.

    Raises:
        TrainError: the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TrainError(f"--out {folder} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):  # the folder holds results
                path.rmdir()


def remove_parts(folder: Path) -> None:
    """Remove all files in `folder` and below it that a killed run left unfinished."""
    for part in list(folder.rglob(f"{_PART}*")):
        shutil.rmtree(part, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file in a temporary folder beside `path`, then move it into place in one step.

    Raises:
        TrainError: the file cannot be written, for example to a full disk. An older file is then unchanged.
    """
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """`write_atomically` for several files. All are written before the first one is moved into place."""
    try:
        # The file gets a folder, because some writers make temporary files of their own beside it.
        with tempfile.TemporaryDirectory(dir=folder, prefix=_PART) as made:
            parts = [Path(made) / name for name in writers]
            for part, write in zip(parts, writers.values(), strict=True):
                write(part)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
            for part in parts:
                part.replace(folder / part.name)
    except OSError as error:
        names = ", ".join(str(folder / name) for name in writers)
        raise TrainError(f"cannot write {names}: {error.strerror or error}") from error
