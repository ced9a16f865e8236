"""Compiled kernels have no spills, and their loads and stores are wide.  No GPU is needed.

Triton chooses the interpreter at its import, so the compiler runs in a separate process.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ggam_fast import checks

if checks.TRITON_AVAILABLE:
    from ggam_fast.kernels import plan

pytestmark = pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import json, sys
from bench.tools import codegen
target, shape, dtype, kernels, widths = json.loads(sys.argv[1])
types = (getattr(codegen.torch, dtype),)
rows = [
    [launch.kernel.__name__.removesuffix("_kernel"), code._asdict() | launch.keywords, row]
    for launch, _, code, row in codegen.table([target], [tuple(shape)], types, kernels, widths)
]
print(json.dumps(rows))
"""
# These kernels read or write a tensor of A's size. All others touch only small tensors.
READS = (
    "spatial_sum",
    "channel_sum",
    "max_pool",
    "hadamard",
    "grad_cam_means",
)
WRITES = ("hadamard", "features_grad")
SMALL = {
    "spatial_norm", "spatial_norm_grad", "position_scatter", "product", "layer_grads", "batch_norm",
    "batch_norm_grad", "softmax", "softmax_grad", "cross_entropy", "cross_entropy_grad", "guidance",
    "position_guidance", "guided_norm_grad",
}  # fmt: skip


def compile_all(
    target: str,
    shape: tuple[int, int, bool],
    dtype: str,
    kernels: tuple[str, ...] | None = None,
    widths: bool = False,
) -> list[tuple[str, dict, str]]:
    """(kernel, its `codegen.Code` with the launch's constants, a line to show) of every launch"""
    printed = run(PROGRAM, json.dumps([target, shape, dtype, kernels, widths]))
    return json.loads(printed.splitlines()[-1])


def run(program: str, *arguments: str) -> str:
    """The output of a program without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def resident_warps(code: dict) -> int:
    """The number of programs that fit into a multiprocessor of sm_90.

    It has 65,536 registers, which a thread gets in groups of eight, and 227 KB of shared memory. A program
    takes 1 KB of it more than it asks for.
    """
    by_registers = 65536 // (32 * -(-code["registers"] // 8) * 8)
    by_shared = 227 * 1024 // (code["shared"] + 1024)
    return min(by_registers, by_shared * code["num_warps"])


# Accesses have 16 bytes if every row starts on a 16-byte boundary, else 8. 196 two-byte positions are 392
# bytes.
@pytest.mark.parametrize(
    ("shape", "dtype", "width"),
    [
        ((320, 196, False), "bfloat16", 64),
        ((320, 196, False), "float32", 128),
        ((320, 256, False), "bfloat16", 128),
        ((264, 196, True), "bfloat16", 128),
        ((1024, 1024, True), "float32", 128),
        ((2048, 196, True), "bfloat16", 128),
    ],
    ids=["L=196", "L=196 float32", "L=256", "channels-last", "ViT-L", "many channels"],
)
def test_wide_accesses_of_features(shape: tuple[int, int, bool], dtype: str, width: int) -> None:
    layout = plan.CHANNELS_FIRST if shape[2] else plan.POSITIONS_FIRST
    rows = compile_all("sm_90", shape, dtype, (*READS, *WRITES), widths=True)
    assert {name for name, *_ in rows} == {*READS, *WRITES}
    for name, code, row in rows:
        assert code["stack"] == 0, row
        if code["L"] == 1:  # this launch has small tensors only
            continue
        itemsize = 2 if dtype == "bfloat16" else 4
        size = (*shape[:2], itemsize, layout)
        cuts = {"channel_sum": plan.channel_sum(*size), "spatial_sum": plan.spatial_sum(*size, 2)}
        if "R=2" not in row:
            del cuts["spatial_sum"]
        cut = cuts.get(name)
        if cut is not None and cut.stages > 1:
            assert code["shared"] >= (cut.stages - 1) * cut.block_c * cut.block_l * itemsize, (
                f"no copies ahead: {row}"
            )
        if name in ("channel_sum", "spatial_sum"):
            assert resident_warps(code) >= 16, row
        if name in READS:
            assert max(code["loads"]) >= width, row
            # A is copied too, not only small operands. max_pool reads its maxima again, one by one.
            assert name == "max_pool" or min(code["loads"]) >= 32, row
        if name in WRITES:
            assert min(code["stores"]) >= width, row


SHAPE = (320, 196, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "shape", "dtype"),  # not every pair of target and type, because compiling takes long
    [
        ("sm_80", SHAPE, "bfloat16"),
        ("sm_90", SHAPE, "bfloat16"),
        ("sm_90", SHAPE, "float32"),
        ("sm_90", (2048, 196, True), "bfloat16"),  # it spilled when all parts of a map were loaded at once
        ("sm_100", SHAPE, "float32"),
        ("sm_120", SHAPE, "float32"),
        ("sm_120", SHAPE, "bfloat16"),  # it spilled when channel_sum kept a sum for every element of a tile
        ("gfx942", SHAPE, "bfloat16"),
    ],
)
def test_no_kernel_spills(target: str, shape: tuple[int, int, bool], dtype: str) -> None:
    rows = compile_all(target, shape, dtype)
    assert {name for name, *_ in rows} == {*READS, *WRITES, *SMALL}
    for _, code, row in rows:
        assert code["stack"] == 0, row


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_guidance_of_few_channels_and_a_large_map(target: str) -> None:
    """These kernels spilled when one warp held two blocks of 4,096 positions."""
    rows = compile_all(target, (256, 12544, False), "float32", ("guidance",))
    assert rows
    for _, code, row in rows:
        assert code["stack"] == 0, row


SUMS = """
import triton
from bench.tools.codegen import TARGETS, launches, source, torch
found = next(x for x in launches(320, 196, False, torch.float32) if x.kernel.fn.__name__ == "product_kernel")
code, options = source(found)
print(triton.compile(code, target=TARGETS["sm_90"], options=options).asm["ttir"])
"""


def test_large_products_are_added_up_outside_the_tensor_cores() -> None:
    """Tensor cores truncate sums. Their error at k = 512 was 1.2e-6 on an H100 (`kernels/tf32.py`)."""
    ttir = run(SUMS)
    assert len(re.findall(r"= tt\.dot ", ttir)) == 3
    assert re.search(r"= tt\.dot %\w+, %\w+, %cst\w*, .*maxNumImpreciseAcc = 1", ttir)
