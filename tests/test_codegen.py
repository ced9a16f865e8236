"""Gates on the compiled kernels that need no GPU: no spills, wide loads and stores.

The interpreter is chosen when triton is imported, so the compiler runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ggam_fast import checks

if checks.TRITON_AVAILABLE:
    from ggam_fast.ops import plan

pytestmark = pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, sys
from bench import codegen
targets, shapes, dtypes = json.loads(sys.argv[1])
rows = [
    [launch.kernel.__name__, target, list(code.loads), list(code.stores), code.stack, code.registers,
     code.shared, row]
    for launch, target, code, row in codegen.table(
        targets, [tuple(s) for s in shapes], tuple(getattr(codegen.torch, d) for d in dtypes)
    )
]
print(json.dumps(rows))
"""
# Kernels that read (or write) something of A's size; the rest touch small tensors only.
READS = (
    "spatial_sum",
    "channel_sum",
    "max_pool",
    "hadamard",
    "grad_cam_means",
)
WRITES = ("hadamard", "features_grad")


def compile_all(target: str, shape: tuple[int, int, bool], dtypes: tuple[str, ...]) -> list[list]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([[target], [shape], dtypes])],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# 16 bytes where every row starts on a 16-byte boundary, else 8: 196 two-byte positions are 392 bytes.
@pytest.mark.parametrize(
    ("shape", "dtypes", "width"),
    [
        ((320, 196, False), ("bfloat16", "float32"), 64),
        ((320, 256, False), ("bfloat16",), 128),
        ((264, 196, True), ("bfloat16",), 128),
        ((1024, 1024, True), ("float32",), 128),
        ((2048, 196, True), ("bfloat16",), 128),  # spills where all parts of a map are loaded at once
    ],
    ids=["L=196", "L=256", "channels-last", "ViT-L", "many parts"],
)
def test_no_spills_and_wide_accesses(
    shape: tuple[int, int, bool], dtypes: tuple[str, ...], width: int
) -> None:
    rows = compile_all("sm_90", shape, dtypes)
    assert {r[0].removesuffix("_kernel") for r in rows} >= {
        *READS,
        *WRITES,
        "spatial_norm",
        "spatial_norm_grad",
        "position_scatter",
        "guidance",
    }
    layout = plan.CHANNELS_FIRST if shape[2] else plan.POSITIONS_FIRST
    for name, _, loads, stores, stack, _, shared, row in rows:
        short = name.removesuffix("_kernel")
        assert stack == 0, row
        itemsize = 2 if "bfloat16" in row else 4
        size = (*shape[:2], itemsize, layout)
        cuts = {"channel_sum": plan.channel_sum(*size), "spatial_sum": plan.spatial_sum(*size, 2)}
        if "R=2" not in row:
            del cuts["spatial_sum"]
        cut = cuts.get(short)
        if cut is not None and cut.stages > 1:
            assert shared >= (cut.stages - 1) * cut.block_c * cut.block_l * itemsize, (
                f"no copies ahead: {row}"
            )
        if short in READS:
            assert max(loads) >= width, row
        if short in WRITES:
            assert min(stores) >= width, row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype"),  # one of two types each, as compiling takes long
    [("sm_80", "bfloat16"), ("sm_100", "float32"), ("sm_120", "float32"), ("gfx942", "bfloat16")],
)
def test_compiles_without_spills(target: str, dtype: str) -> None:
    for *_, stack, _, _, row in compile_all(target, (320, 196, False), (dtype,)):
        assert stack == 0, row
