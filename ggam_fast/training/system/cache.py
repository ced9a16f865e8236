"""What the cache folder holds: files and folders that are written whole and carry a checksum.

The checksum is the CRC-32 of zlib. It finds damage, not forgery.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ggam_fast.training.system.files import locked

CHECKSUMS = "checksums.json"
"""The file in a stored folder that has the checksums of all others."""

_MAGIC = b"ggamsum1"
_LENGTH = 8  # bytes of the footer's length
_CHUNK = 1 << 24
_ENTRY = re.compile(r"[\w.-]+-[0-9a-f]{20}(\.maps)?")
_PART = re.compile(rf"\.?{_ENTRY.pattern}\.(?:(?P<host>[\w-]+)\.)?(?P<pid>\d+)\.part")
_HOUR = 3600.0


def store_file(path: Path, chunks: Iterable[Any], about: dict[str, Any]) -> None:
    """Write the chunks (buffers of bytes) and behind them `about`, the checksum and the number of bytes.

    If a chunk fails, no file is left. The folder of `path` must exist.
    """
    with _part(path) as part, part.open("wb") as file:
        checksum = size = 0
        for chunk in chunks:
            file.write(chunk)
            checksum = zlib.crc32(chunk, checksum)
            size += memoryview(chunk).nbytes
        footer = json.dumps({**about, "bytes": size, "crc32": checksum}).encode()
        file.write(footer + len(footer).to_bytes(_LENGTH, "little") + _MAGIC)


def store_folder(path: Path, fill: Callable[[Path], object], about: dict[str, Any]) -> None:
    """Let `fill` make the files of a folder, add their checksums, and put it in the place of an older one."""
    with _part(path) as part:
        part.mkdir()
        fill(part)
        sums = {
            file.relative_to(part).as_posix(): _checksum(file)
            for file in sorted(part.rglob("*"))
            if file.is_file()
        }
        (part / CHECKSUMS).write_text(json.dumps({**about, "crc32": sums}))


def about(path: Path) -> dict[str, Any] | None:
    """The description that was stored with a file or folder, or None if it has none that can be read."""
    try:
        if path.is_dir():
            found = json.loads((path / CHECKSUMS).read_text())
        else:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(end - _LENGTH - len(_MAGIC))
                length, magic = int.from_bytes(file.read(_LENGTH), "little"), file.read()
                start = end - _LENGTH - len(_MAGIC) - length
                if magic != _MAGIC or start < 0:
                    return None
                file.seek(start)
                found = json.loads(file.read(length))
                if found["bytes"] != start:
                    return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) and "crc32" in found else None


def problem(path: Path) -> str | None:
    """What is wrong with a stored file or folder, or None if it has its checksum. It reads every byte."""
    found = about(path)
    if found is None:
        return "it has no checksum: it is cut off, or of an older version"
    try:
        if not path.is_dir():
            return None if _checksum(path, found["bytes"]) == found["crc32"] else "its checksum differs"
        wrong = [name for name, checksum in found["crc32"].items() if _checksum(path / name) != checksum]
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return f"the checksum of {wrong[0]} differs" if wrong else None


def _checksum(path: Path, size: int | None = None) -> int:
    """CRC-32 of the first `size` bytes, by default of all."""
    checksum = 0
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            checksum = zlib.crc32(chunk, checksum)
            left -= len(chunk)
    return checksum


def entries(folder: Path) -> list[Path]:
    """The stored files and folders in the order of their names. Other files in the folder are not named."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _ENTRY.fullmatch(path.name))


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if not path.is_dir() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def dead_parts(folder: Path) -> list[Path]:
    """What killed processes left unfinished: files and folders whose writer is gone."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name) and _is_dead(path))


def remove_dead_parts(folder: Path) -> list[Path]:
    """Remove the `dead_parts` and return their paths."""
    parts = dead_parts(folder)
    for part in parts:
        with suppress(OSError):  # another process removes it too, or it is another user's
            remove(part)
            _lock_of(part).unlink(missing_ok=True)
    return parts


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A path beside `path` that is moved to it at the end. After an error, nothing is left of it."""
    part = path.with_name(f"{path.name}.{_host()}.{os.getpid()}.part")
    with locked(_lock_of(part), lambda: None):
        try:
            yield part
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(part, path)
        finally:
            with suppress(OSError):
                remove(part)


def _lock_of(part: Path) -> Path:
    return part.with_name(f".{part.name}.lock")


def _is_dead(part: Path) -> bool:
    """Whether the writer of `part` is gone. A writer holds a lock, if the file system has locks."""
    lock = _lock_of(part)
    if lock.exists():

        def busy() -> None:
            raise _Busy

        try:
            with locked(lock, busy) as held:
                if held:
                    return True
        except _Busy:
            return False
    name = _PART.fullmatch(part.name)
    assert name is not None
    if name["host"] in (None, _host()) and not _runs(int(name["pid"])):
        return True
    with suppress(OSError):
        return time.time() - part.stat().st_mtime > _HOUR
    return False


class _Busy(Exception):
    pass


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"
