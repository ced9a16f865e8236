"""Measurements as lines of a CSV file.  Files only grow, by whole lines."""

import csv
import fcntl
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench.measure.environment import ROOT, Environment

RESULTS = ROOT / "bench" / "results"


class Record(NamedTuple):
    """One measurement, with the columns in order.  Times are in microseconds.  None means not measured."""

    op: str
    provider: str
    run: str  # the CSV's column is called "pass"
    N: int
    C: int
    H: int
    W: int
    dtype: str
    layout: str
    timing: str
    p20: float
    p50: float
    p80: float
    bytes: int | None
    gb_per_s: float | None
    x_memcpy: float | None
    x_floor: float | None
    peak_mib: float | None
    launches: int | None
    environment: Environment
    gradients_mib: float | None = (
        None  # gradients of A and the parameters; they are part of every step's peak
    )
    parity: float | None = None  # the largest error as a share of the allowed error
    images_per_s: float | None = None
    joules_per_image: float | None = None


_RENAMED = {"run": "pass", "gb_per_s": "GB/s", "peak_mib": "peak MiB"}
_OWN = [name for name in Record._fields if name != "environment"]
_BEFORE = _OWN[: _OWN.index("launches") + 1]
_AFTER = _OWN[_OWN.index("launches") + 1 :]
COLUMNS = [_RENAMED.get(n, n) for n in (*_BEFORE, *Environment._fields, *_AFTER)]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def values(record: Record) -> list[str]:
    """The cells of a record, in the order of COLUMNS."""
    cells = [
        *(getattr(record, n) for n in _BEFORE),
        *record.environment,
        *(getattr(record, n) for n in _AFTER),
    ]
    return [_text(cell) for cell in cells]


def _line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def path_for(environment: Environment, folder: Path = RESULTS) -> Path:
    """The file of a device and its versions of torch and Triton."""
    name = f"{environment.gpu}-torch{environment.torch}-triton{environment.triton or 'none'}"
    safe = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    return folder / f"{safe}.csv"


def append(path: Path, records: Iterable[Record]) -> None:
    """Add whole lines in one write under a lock, so no other process sees half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(_line(values(record)) for record in records)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        header = _line(COLUMNS)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, len(header), 0).decode() != header:
            raise ValueError(f"{path} has other columns than these records; move it away or delete it")
        os.write(descriptor, (body if size else header + body).encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, str]]:
    """The lines of the file as dictionaries, in order."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} is not a result file; its columns are {reader.fieldnames}")
        return list(reader)
