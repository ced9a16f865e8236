"""A stub of the CUDA driver (`stub.c`) under Triton's launcher.  It times the host without a GPU.

    with driver_stub.active():
        kernel[(programs,)](*tensors, **constants)  # tensors of the CPU, which do not change
        launch_count()

Two things differ from a run on a GPU: kernels are not compiled, and the driver does nothing.
`kernel[grid]` binds, specialises and caches as on a GPU and returns a `triton.compiler.CompiledKernel`.
Its launcher is Triton's own.  The launcher's C part is compiled against the stub and kept in Triton's cache.
This happens once for all kernels, or once for each signature in Triton 3.6.
"""

import ctypes
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton import knobs

SOURCE = Path(__file__).with_name("stub.c")
CAPABILITY = (9, 0)


def compiler() -> str | None:
    """The C compiler that builds the stub and Triton's launcher, or None."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """Build libcuda.so.1 in its own folder below `folder`, unless it exists."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = folder / f"driver_stub-{digest}" / "libcuda.so.1"
    if not library.exists():
        command = compiler()
        if command is None:
            raise RuntimeError("the stub of the driver needs a C compiler: install gcc or clang, or set CC")
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=library.parent
        ) as own:  # another process may build it at the same time
            new = Path(own) / library.name
            options = ["-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
            subprocess.run([command, *options, "-o", str(new), str(SOURCE)], check=True)
            new.replace(library)
    return library


@functools.cache
def _stub() -> tuple[Path, ctypes.CDLL]:
    """The stub's path and the loaded library.  Later requests of this process for libcuda.so.1 get it."""
    path = build(Path(knobs.cache.dir))
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path.name)
    if not hasattr(library, "stub_launches"):
        raise RuntimeError("this process has loaded a real CUDA driver; the stub needs a process without one")
    library.stub_launches.restype = ctypes.c_uint64
    return path, library


def launch_count() -> int:
    """The number of launches that have reached the stub since it was loaded."""
    return _stub()[1].stub_launches()


@functools.cache
def _driver() -> Any:
    """Triton's driver, with constants in place of what it asks torch."""
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.set_current_device = lambda device: None
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device: CAPABILITY
    return driver


class _Compiler:
    """Stands for `triton.compile`, and returns an empty binary with the metadata that a launch needs."""

    def __init__(self, folder: Path):
        self.folder, self.kernels = folder, list[Any]()

    def __call__(self, src: Any, target: Any, options: dict[str, Any], **_: Any) -> Any:
        stem = self.folder / str(len(self.kernels))
        scratch = {f"{of}_scratch_{what}": n for of in ("global", "profile") for what, n in _SCRATCH.items()}
        metadata = options | {"name": src.name, "target": target, "shared": 0} | scratch
        files = {"kernel.json": stem.with_suffix(".json"), "kernel.cubin": stem.with_suffix(".cubin")}
        files["kernel.json"].write_text(json.dumps(metadata, default=vars))
        files["kernel.cubin"].write_bytes(b"")
        self.kernels.append(triton.compiler.CompiledKernel(src, files, hash=stem.name))
        return self.kernels[-1]

    def forget(self) -> None:
        """Drop the kernels from Triton's caches, so that no other driver launches or unloads them."""
        for kernel in self.kernels:
            kernel.src.fn.device_caches.clear()
            kernel.module = kernel._run = None


_SCRATCH = {"size": 0, "align": 1}


@contextmanager
def active() -> Iterator[None]:
    """Inside the `with` block, Triton launches into the stub.  Its kernels are dropped at the end."""
    from triton.backends.nvidia import driver as nvidia

    folder = _stub()[0].parent
    with tempfile.TemporaryDirectory() as kernels, knobs.nvidia.scope():
        knobs.nvidia.libcuda_path = str(folder)
        _forget_folders(nvidia)
        compiler = _Compiler(Path(kernels))
        try:
            with (
                mock.patch.object(triton.runtime.driver, "_active", _driver()),
                mock.patch.object(triton.compiler, "compile", compiler),
            ):
                yield
        finally:
            compiler.forget()
            _forget_folders(nvidia)


def _forget_folders(nvidia: Any) -> None:
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()
