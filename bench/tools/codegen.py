"""Registers, spills and load widths of every kernel, as compiled without a GPU.

    python -m bench.codegen                   # a Markdown table for sm_90
    python -m bench.codegen --target sm_90 sm_80 sm_100 sm_120 gfx942 --write

The launches are the library's own.  Its operators run on empty tensors, and a recorder stands in place of
each kernel.  The code compiled here therefore is the code for a GPU, with the same specialisation.  The first
target gets all shapes.  Each other target gets only the first two, because one launch takes a second or two.
These are ResNet-50's map in both layouts.  The command fails if any kernel spills.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.measure.records import RESULTS
from bench.tools.every_kernel import launch_all

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# (C, L, channels-last): ResNet-50 at 448 and VGG-16 in both layouts, EfficientNet, ViT-L tokens, maps of
# 16x16 and of 56x56
SHAPES = [
    (2048, 196, False),
    (2048, 196, True),
    (512, 784, False),
    (512, 784, True),
    (1280, 49, False),
    (1024, 1024, True),
    (512, 256, False),
    (512, 3136, False),
]
DTYPES = (torch.bfloat16, torch.float32)
_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip
_FLAGS = (
    "R", "POOL", "NORM", "BY_CHANNEL", "RELU", "SPLIT", "STEPS", "BLOCK_M", "BLOCK_N", "WIDE_J", "WIDE_C",
    "CAM_NORM", "SYMMETRIC", "MEAN", "TRAINING", "MOMENTUM", "ACT", "K", "HARD", "IGNORE", "PREDICTED",
)  # fmt: skip
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One kernel with the arguments of the library's launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def variant(self) -> str:
        """The launch's flags, and the names of the optional tensors that it gets."""
        optional = set(re.findall(r"(\w+_ptr) is not None", self.kernel.src))
        names = zip(self.kernel.arg_names, self.arguments, strict=False)
        given = [n.removesuffix("_ptr") for n, v in names if n in optional and v is not None]
        # C varies only for kernels that work on rows.
        flags = ("C", *_FLAGS) if self.keywords.get("L", 1) == 1 else _FLAGS
        return " ".join([*(f"{f}={self.keywords[f]:d}" for f in flags if f in self.keywords), *given])


class Code(NamedTuple):
    """The compiler's numbers for one launch on one target.  Widths are in bits."""

    registers: int
    stack: int  # bytes of stack and local memory, which hold spills
    shared: int  # bytes
    loads: tuple[int, ...]
    stores: tuple[int, ...]


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


def launches(
    channels: int, positions: int, channels_last: bool, dtype: torch.dtype, target: str = "sm_90"
) -> list[Launch]:
    """Every kernel in its variants (`every_kernel`), for features of this shape and type."""
    rocm = target.startswith("gfx")
    found: list[Launch] = []
    modules = [m for name, m in sys.modules.items() if name.startswith("ggam_fast.kernels.")]
    originals = [(m, n, k) for m in modules for n, k in vars(m).items() if n.endswith("_kernel")]
    for module, name, kernel in originals:
        setattr(module, name, _Recorder(kernel, found))
    try:
        with mock.patch.object(torch.version, "hip", "" if rocm else None):
            shape = (2, positions, channels) if channels_last else (2, channels, positions)
            a = torch.empty(shape, dtype=dtype)
            launch_all(a.transpose(1, 2) if channels_last else a)
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)
    return list({_compiled_for(x): x for x in found}.values())


def _compiled_for(launch: Launch) -> tuple[Any, ...]:
    """Everything that the compiler is given."""
    code, options = source(launch)
    return id(launch.kernel), *map(str, (code.signature, code.constants, code.attrs, sorted(options.items())))


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The source that Triton's launcher would compile: types, constants, divisibility by 16."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False))
    values.update({k: v for k, v in launch.keywords.items() if k in names})
    options = {k: v for k, v in launch.keywords.items() if k not in names}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(names):
        value = values[name]
        plain = launch.kernel.params[i].do_not_specialize
        if name in launch.keywords or value is None or (isinstance(value, int) and value == 1 and not plain):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = _POINTER[value.dtype] if is_tensor else "i32"
            number = value.data_ptr() if is_tensor else value
            if number % 16 == 0 and not plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def inspect(launch: Launch, target: str, widths: bool = True) -> Code:
    """Compile one launch for one target, and read the code."""
    kernel_source, options = source(launch)
    compiled = triton.compile(kernel_source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        return _amd(compiled.asm["amdgcn"])
    return _nvidia(compiled.asm["cubin"], compiled.metadata.shared, widths)


@cache  # kernels of the layers do not depend on the features' type and layout
def _nvidia(code: bytes, shared: int, widths: bool) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code)
        cubin.flush()
        usage = _binary("cuobjdump", "-res-usage", cubin.name)
        # -ndf leaves out the slow dataflow analysis.  Each kernel still takes 0.3 s.
        sass = _binary("nvdisasm", "-ndf", "-c", cubin.name) if widths else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    registers, stack, local = map(int, found.groups())
    loads = _widths("LDG", sass) | _widths("LDGSTS", sass)
    return Code(registers, stack + local, shared, tuple(sorted(loads)), tuple(sorted(_widths("STG", sass))))


def _binary(name: str, *arguments: str) -> str:
    done = subprocess.run([_BINARIES / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _widths(instruction: str, sass: str) -> set[int]:
    widths = set()
    for suffix in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        narrow = re.search(r"\.[US](8|16)\b", suffix)
        wide = re.search(r"\.(64|128|256)\b", suffix)
        widths.add(int(narrow.group(1)) if narrow else int(wide.group(1)) if wide else 32)
    return widths


def _amd(assembly: str) -> Code:
    def number(name: str) -> int:
        return max((int(v) for v in re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)

    def widths(kind: str) -> tuple[int, ...]:
        sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16,
                 "short_d16": 16, "short_d16_hi": 16, "ubyte": 8, "byte": 8}  # fmt: skip
        found = re.findall(rf"(?:global|buffer)_{kind}_(\w+)", assembly)
        return tuple(sorted({sizes[x] for x in found if x in sizes}))

    stack = number("private_segment_fixed_size") + number("vgpr_spill_count") + number("sgpr_spill_count")
    shared = number("group_segment_fixed_size")
    return Code(number("vgpr_count"), stack, shared, widths("load"), widths("store"))


def table(
    targets: list[str],
    shapes: list[tuple[int, int, bool]],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    kernels: Container[str] | None = None,
    widths: bool = True,
) -> Iterator[tuple[Launch, str, Code, str]]:
    """(launch, target, code, Markdown row) of all kernels, or of `kernels`, for every target, shape and type.

    If several shapes or types have equal code, only the first gets a row.
    """
    for target in targets:
        seen: set[tuple[Any, ...]] = set()
        for channels, positions, channels_last in shapes:
            for dtype in dtypes:
                for launch in launches(channels, positions, channels_last, dtype, target):
                    name = launch.kernel.__name__.removesuffix("_kernel")
                    if (kernels is not None and name not in kernels) or _compiled_for(launch) in seen:
                        continue
                    seen.add(_compiled_for(launch))
                    code = inspect(launch, target, widths)
                    layout = "channels-last" if channels_last else "NCHW"
                    loads, stores = ("/".join(map(str, w)) for w in (code.loads, code.stores))
                    row = (
                        f"| {target} | {name} | {launch.variant} | {channels} x {positions} {layout} "
                        f"| {str(dtype).removeprefix('torch.')} | {code.registers} | {code.stack} "
                        f"| {code.shared} | {loads} | {stores} |"
                    )
                    yield launch, target, code, row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--target", nargs="+", choices=list(TARGETS), default=["sm_90"], help="GPUs to compile for"
    )
    parser.add_argument(
        "--write", action="store_true", help="write bench/results/codegen.md instead of printing"
    )
    chosen = parser.parse_args(arguments)
    command = "python -m bench.codegen " + " ".join(sys.argv[1:])
    lines = [
        f"Compiled by triton {triton.__version__} with torch {torch.__version__}: `{command.strip()}`.",
        "Nothing here was run or timed. Stack is the bytes of stack and local memory, which hold spills.",
        "The command fails if it is not 0. Widths are in bits. They cover all global loads and stores,",
        "also those of small operands.",
        "",
        "| target | kernel | variant | features | type | registers | stack | shared | loads | stores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first, *others = chosen.target
    found = [*table([first], SHAPES), *table(others, SHAPES[:2])]
    lines += [row for *_, row in found]
    text = "\n".join(lines) + "\n"
    if chosen.write:
        path = RESULTS / "codegen.md"
        path.write_text(text)
        print(f"{len(found)} rows in {path}")
    else:
        print(text)
    if spilled := sum(code.stack > 0 for _, _, code, _ in found):
        raise SystemExit(f"{spilled} of {len(found)} kernels spill")


if __name__ == "__main__":
    main()
