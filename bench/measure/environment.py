"""What a measurement depends on besides the case: device, clocks, driver, versions, commit."""

import ctypes
import functools
import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]


class Environment(NamedTuple):
    """Columns of every record.  Without a GPU, `gpu` is the name of the CPU."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    triton: str
    commit: str
    dirty: int | None
    utc: str
    sm_mhz: int | None
    memory_mhz: int | None
    threads: int
    load: float  # one-minute load average; if it is above `threads`, other processes were running


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory.

    By default it returns blocks of some MB to the system and then asks for them again.  That costs a page
    fault for every 4 kB.  Which calls pay for it depends on what else the process holds.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h's M_TRIM_THRESHOLD and M_MMAP_MAX
    with suppress(AttributeError):  # this is another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def current() -> Environment:
    """The environment and the clocks at this moment."""
    commit, dirty = source()
    on_gpu = torch.cuda.is_available()
    clocks = _clocks() if on_gpu else (None, None)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Environment(
        torch.cuda.get_device_name() if on_gpu else cpu(),
        _driver() if on_gpu else "",
        (torch.version.cuda or "") if on_gpu else "",
        torch.__version__, _triton(), commit, dirty, now, *clocks, torch.get_num_threads(),
        os.getloadavg()[0],
    )  # fmt: skip


@functools.cache
def source() -> tuple[str, int | None]:
    """The commit, and 1 if any file but results differs from it, else 0.

    The variable BENCH_COMMIT overrides the commit, for a copy without its own history.
    """

    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"], None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        # Files that a measurement writes do not count.
        changes = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs/performance.md")
        return commit, int(bool(changes))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


@functools.cache
def cpu() -> str:
    """Model and number of threads."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"CPU {name}, {torch.get_num_threads()} threads"


@functools.cache
def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


@functools.cache
def nvml() -> tuple[Any, Any] | None:
    """(pynvml, handle of torch's current GPU), or None without the driver or the package."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except Exception:
        return None


@functools.cache
def _driver() -> str:
    found = nvml()
    if found is None:
        return ""
    version = found[0].nvmlSystemGetDriverVersion()
    return version.decode() if isinstance(version, bytes) else version


def _clocks() -> tuple[int | None, int | None]:
    found = nvml()
    if found is None:
        return None, None
    pynvml, handle = found
    kinds = (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)
    return tuple(pynvml.nvmlDeviceGetClockInfo(handle, kind) for kind in kinds)  # type: ignore[return-value]


def energy_joules() -> float | None:
    """Energy the GPU has used since its driver was loaded, or None if it cannot be read."""
    found = nvml()
    if found is None:
        return None
    with suppress(Exception):
        return found[0].nvmlDeviceGetTotalEnergyConsumption(found[1]) / 1000
    return None
