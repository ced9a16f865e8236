"""Times attention, Grad-CAM weights and the guided step against every peer.

    pytest bench/bench_head.py                    # a selection on a GPU, small cases on a CPU
    pytest bench/bench_head.py --full             # all cases, on a GPU only
    pytest bench/bench_head.py -k "2048x14x14 and step"

pytest-benchmark's table shows whole calls by the clock.  The times to report are in the result file.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.measure import environment, records
from bench.measure.parity import Refused
from bench.measure.side_by_side import Timed, take
from bench.measure.timing import first_line
from bench.suite.cases import FUSED_COMPILED, GRAPHED, Case, Run, cpu_default, gpu_default, gpu_full
from bench.suite.peers import Peer
from bench.suite.workload import Workload

OURS = ("memcpy", "eager", "fused", "fused_modular", *FUSED_COMPILED, GRAPHED)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" in metafunc.fixturenames:
        on_gpu, full = torch.cuda.is_available(), metafunc.config.getoption("--full")
        runs = (gpu_full() if full else gpu_default()) if on_gpu else cpu_default()
        metafunc.parametrize("run", list(dict.fromkeys(runs)), ids=str)


@functools.lru_cache(maxsize=1)
def workload(case: Case) -> Workload:
    """The workload of a case.  It is kept for the next provider of the case."""
    return Workload(case, environment.device())


@functools.lru_cache(maxsize=1)
def timed(case: Case, run: str, providers: tuple[str, ...]) -> dict[str, Timed[Peer] | Exception]:
    """The times of all providers.  Each provider's test takes its own from here."""
    return workload(case).timed(run, providers)


def bench_head(
    benchmark: Any,
    run: Run,
    beside: list[Run],
    copy_bandwidth: float,
    write: Callable[[list[records.Record]], None],
    leave_out: Callable[[str], None],
) -> None:
    work = workload(run.case)
    try:
        providers = tuple(r.provider for r in beside if (r.run, r.case) == (run.run, run.case))
        own = take(timed(run.case, run.run, providers), run.provider)
        found = work.records(run.provider, run.run, own, copy_bandwidth)
    except Refused:
        raise
    except Exception as error:
        if run.provider in OURS:
            raise
        pytest.skip(first_line(error))
    write(found)
    for line in own.measured.missing:
        leave_out(line)

    def once() -> None:
        work.call(own.peer)(0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.group = f"{run.run} {run.case}"
    benchmark.extra_info.update(
        {f"{record.timing} p50 us": record.p50 for record in found}, provider=run.provider
    )
    benchmark.pedantic(once, rounds=5)
