"""`ggam-fast cache`: list what is cached, remove what is of no use, or check the checksums."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.feature_cache import default_cache_dir
from ggam_fast.training.show.console import Report
from ggam_fast.training.system import cache

logger = logging.getLogger(__name__)

_DAY = 86400.0


@dataclass(frozen=True)
class CacheConfig:
    cache_dir: Path | None = None
    """Folder of the cache. By default $XDG_CACHE_HOME/ggam_fast or ~/.cache."""
    json: bool = False
    """Print JSON alone, for programs to read."""
    unused_days: float | None = None
    """prune: also remove what no run has used for this many days. 0 removes everything."""
    dry_run: bool = False
    """prune: say what would be removed, and remove nothing."""

    @property
    def folder(self) -> Path:
        return self.cache_dir or default_cache_dir()


class Entry(NamedTuple):
    """A stored file or folder and its description. `used`: when it was used last, in seconds since 1970."""

    path: Path
    size: int
    used: float
    holds: dict[str, Any]

    def as_dict(self, **more: Any) -> dict[str, Any]:
        when = datetime.fromtimestamp(self.used).astimezone().isoformat(timespec="seconds")
        about = {key: value for key, value in self.holds.items() if key not in ("crc32", "bytes")}
        return {"path": str(self.path), "bytes": self.size, "used": when, **about, **more}


def found(folder: Path) -> list[Entry]:
    """What is stored in the cache, without unfinished parts."""
    entries = []
    for path in cache.entries(folder):
        with suppress(FileNotFoundError):  # another process has removed it
            entries.append(Entry(path, cache.size(path), path.stat().st_mtime, cache.about(path) or {}))
    return entries


def show_list(config: CacheConfig) -> None:
    """Print each stored file or folder: what it holds, its size and when it was used last."""
    entries = found(config.folder)
    if config.json:
        _print_json({"folder": str(config.folder), "entries": [one.as_dict() for one in entries]})
        return
    for one in entries:
        day = datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        logger.info(f"{one.path.name}: {one.size / 1e6:.1f} MB, last used {day}")
        logger.info(f"  {_describe(one.holds)}")
    parts = cache.dead_parts(config.folder)
    logger.info(f"{len(entries)} files and folders in {config.folder}, {_megabytes(entries)}")
    if parts:
        logger.info(f"{len(parts)} unfinished parts of killed runs; ggam-fast cache prune removes them")


def verify(config: CacheConfig, report: Report) -> int:
    """Check all checksums. The exit code is 0, or 2 if something is damaged."""
    entries = found(config.folder)
    start = time.perf_counter()
    problems: list[str | None] = []
    with report.bar("checking", max(len(entries), 1)) as bar:
        for one in entries:
            problems.append(cache.problem(one.path))
            bar.advance(1)
    seconds = time.perf_counter() - start
    damaged = [(one, wrong) for one, wrong in zip(entries, problems, strict=True) if wrong is not None]
    if config.json:
        checked = [one.as_dict(problem=wrong) for one, wrong in zip(entries, problems, strict=True)]
        _print_json({"folder": str(config.folder), "entries": checked, "damaged": len(damaged)})
    else:
        for one, wrong in damaged:
            logger.info(f"damaged: {one.path}: {wrong}")
        logger.info(
            f"{len(damaged)} of {len(entries)} files and folders in {config.folder} are damaged; read "
            f"{_megabytes(entries)} in {seconds:.2f} s"
            + ("; ggam-fast cache prune removes the damaged ones" if damaged else "")
        )
    return 2 if damaged else 0


def prune(config: CacheConfig) -> None:
    """Remove unfinished parts of killed runs, what is damaged, and what was not used for long."""
    if config.unused_days is not None and not config.unused_days >= 0:
        raise TrainError(f"--unused-days must be 0 or more; got {config.unused_days}")
    parts = cache.dead_parts(config.folder)
    gone = [(part, cache.size(part), "an unfinished part of a killed run") for part in parts]
    for one in found(config.folder):
        days = (time.time() - one.used) / _DAY
        if config.unused_days is not None and days >= config.unused_days:
            gone.append((one.path, one.size, f"not used for {days:.1f} days"))
        elif (wrong := cache.problem(one.path)) is not None:
            gone.append((one.path, one.size, wrong))
    if not config.dry_run:
        cache.remove_dead_parts(config.folder)
        for path, _, _ in gone:
            cache.remove(path)
    if config.json:
        removed = [{"path": str(path), "bytes": size, "why": why} for path, size, why in gone]
        _print_json({"folder": str(config.folder), "dry_run": config.dry_run, "removed": removed})
        return
    would = "would remove" if config.dry_run else "removed"
    for path, size, why in gone:
        logger.info(f"{would} {path} ({size / 1e6:.1f} MB): {why}")
    logger.info(f"{would} {len(gone)} files and folders, {sum(size for _, size, _ in gone) / 1e6:.1f} MB")


def _describe(about: dict[str, Any]) -> str:
    if not about:
        return "nothing that can be read"
    if "shape" not in about:
        return str(about["kind"])
    count, *shape, channels = about["shape"]
    size = " x ".join(map(str, (channels, *shape)))
    return f"{about['kind']} of {count} images in {about['images']}, {size}, {about['dtype']}"


def _megabytes(entries: Sequence[Entry]) -> str:
    return f"{sum(one.size for one in entries) / 1e6:.1f} MB"


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=1))
