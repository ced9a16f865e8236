"""Attention, Grad-CAM weights and the guided step, against every peer.

    pytest bench/bench_head.py                    # a GPU: a telling part; a CPU: small cases
    pytest bench/bench_head.py --full             # a GPU: all
    pytest bench/bench_head.py -k "2048x14x14 and step"

pytest-benchmark's table shows whole calls by the clock; the result file has what is reported.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import environment, rows
from bench.cases import FUSED_COMPILED, GRAPHED, Case, Run, cpu_default, gpu_default, gpu_full
from bench.parity import Refused
from bench.workload import Timed, Workload

OURS = ("memcpy", "eager", "fused", "fused_modular", *FUSED_COMPILED, GRAPHED)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" in metafunc.fixturenames:
        on_gpu, full = torch.cuda.is_available(), metafunc.config.getoption("--full")
        runs = (gpu_full() if full else gpu_default()) if on_gpu else cpu_default()
        metafunc.parametrize("run", list(dict.fromkeys(runs)), ids=str)


@functools.lru_cache(maxsize=1)
def workload(case: Case) -> Workload:
    """Kept from one provider to the next of the same case."""
    return Workload(case, environment.device())


@functools.lru_cache(maxsize=1)
def together(case: Case, run: str, providers: tuple[str, ...]) -> dict[str, Timed | Exception]:
    """Kept from one provider's test to the next's."""
    return workload(case).timed(run, providers)


def timed(request: pytest.FixtureRequest, run: Run) -> Timed:
    """Alone on a GPU; on a CPU in turns with all providers selected for this pass and case."""
    if torch.cuda.is_available():
        found = workload(run.case).timed(run.run, (run.provider,))[run.provider]
    else:
        items = (item for item in request.session.items if hasattr(item, "callspec"))
        runs = [r for item in items if (r := item.callspec.params.get("run")) and r[:2] == run[:2]]
        found = together(run.case, run.run, tuple(r.provider for r in runs))[run.provider]
    if isinstance(found, Exception):
        raise found
    return found


def bench_head(
    request: pytest.FixtureRequest,
    benchmark: Any,
    run: Run,
    copy_bandwidth: float,
    write: Callable[[list[rows.Row]], None],
    leave_out: Callable[[str], None],
) -> None:
    work = workload(run.case)
    try:
        own = timed(request, run)
        found = work.rows(run.provider, run.run, own, copy_bandwidth)
    except Refused:
        raise
    except Exception as error:
        if run.provider in OURS:
            raise
        pytest.skip(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    write(found)
    for line in own.missing:
        leave_out(line)

    def once() -> None:
        work.call(own.peer)(0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.group = f"{run.run} {run.case}"
    benchmark.extra_info.update({f"{row.timing} p50 us": row.p50 for row in found}, provider=run.provider)
    benchmark.pedantic(once, rounds=5)
