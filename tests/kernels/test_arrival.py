"""How the last program of a launch sees what the others stored, read in the compiled code.

No run can show it: a program that reads too early still finds the right values nearly always.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ggam_fast import checks

pytestmark = pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from bench.tools import codegen
target = sys.argv[1]
found = {}
for launch in codegen.launches(2048, 49, False, codegen.torch.float32, target):
    names = launch.kernel.arg_names
    given = {n for n, v in zip(names, launch.arguments) if v is not None}
    # One of each kernel that counts arrivals, the sum of a norm's statistics aside.
    if given & {"counter_ptr", "counters_ptr"} and launch.kernel.__name__ not in found:
        source, options = codegen.source(launch)
        compiled = codegen.triton.compile(source, target=codegen.TARGETS[target], options=options)
        found[launch.kernel.__name__] = [compiled.asm["ptx"], compiled.asm["ttgir"]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "sm_120"])
def code(request: pytest.FixtureRequest) -> dict[str, tuple[list[str], list[str]]]:
    """PTX and TTGIR of each kernel that counts arrivals, by name; it is compiled without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, request.param],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    return {name: (ptx.splitlines(), ttgir.splitlines()) for name, (ptx, ttgir) in printed.items()}


def where(pattern: str, lines: list[str]) -> list[int]:
    return [i for i, line in enumerate(lines) if re.search(pattern, line)]


SUMS = ("product_kernel", "guidance_kernel", "cross_entropy_kernel")
"""They read what other programs stored."""


Code = dict[str, tuple[list[str], list[str]]]


def test_arrivals_are_counted_with_acquire_and_release(code: Code) -> None:
    assert set(code) >= {*SUMS, "batch_norm_kernel"}
    for name, (ptx, _) in code.items():
        (atomic,) = where(r"\batom\.", ptx)
        assert "atom.global.gpu.acq_rel.add" in ptx[atomic], (name, ptx[atomic])


def test_all_threads_have_stored_before_one_counts(code: Code) -> None:
    """By a barrier of ours: PTX has others too, which the compiler may leave out one day."""
    for name in SUMS:
        _, ttgir = code[name]
        (atomic,) = where(r"\btt\.atomic_rmw\b", ttgir)
        stores = [i for i in where(r"\btt\.store\b", ttgir) if i < atomic]
        assert stores, name
        assert [i for i in where(r"\bbarrier\b", ttgir) if stores[-1] < i < atomic], name


def test_what_others_stored_is_read_past_the_l1_cache(code: Code) -> None:
    for name in SUMS:
        ptx, _ = code[name]
        (atomic,) = where(r"\batom\.", ptx)
        barrier = next(i for i in where(r"\bbar\.sync", ptx) if i > atomic)
        loads = where(r"\bld\.global\.cg\.", ptx)
        assert loads, name
        assert all(i > barrier for i in loads), name
