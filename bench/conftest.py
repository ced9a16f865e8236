"""What the benchmarks share: options, the result file, the time budget, the list of what was left out."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import environment, records, timing
from bench.suite.cases import CPU_LEFT_OUT

BUDGET_ON_GPU = 440.0  # seconds; no test starts after them, so a run ends within nine minutes
_LEFT_OUT = pytest.StashKey[list[str]]()
_STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ggam_fast benchmarks")
    group.addoption("--full", action="store_true", help="run every case and provider (GPU only, takes hours)")
    group.addoption(
        "--results",
        type=Path,
        default=records.RESULTS,
        help="folder of the CSV files (default: bench/results)",
    )
    group.addoption(
        "--budget", type=float, help="no test starts after so many seconds (default: 440 on a GPU)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = []
    if not torch.cuda.is_available():
        environment.keep_freed_memory()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run in one process, whatever PYTEST_ADDOPTS says, because a timing needs the whole machine."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.numprocesses = 0


@pytest.fixture(autouse=True)
def _within_budget(request: pytest.FixtureRequest) -> None:
    config = request.config
    budget = config.getoption("--budget")
    if budget is None and torch.cuda.is_available() and not config.getoption("--full"):
        budget = BUDGET_ON_GPU
    if budget is not None and time.monotonic() - _STARTED > budget:
        pytest.skip(f"the budget of {budget:.0f} s is spent")


@pytest.fixture(autouse=True)
def _as_the_rows_say() -> Iterator[None]:
    """Settings that all records need.

    Grad-CAM by autograd can then be compiled, a missing CUDA graph is an error, and float32 is not TF32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    graphs = torch._inductor.config.patch({"triton.cudagraph_or_error": True})
    with torch._dynamo.config.patch(trace_autograd_ops=True), graphs:
        yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    return timing.copy_bandwidth(environment.device())


@pytest.fixture
def beside(request: pytest.FixtureRequest) -> list[Any]:
    """The parameters of the tests that are timed in turns with this one.

    On a CPU these are all selected tests of its file.  On a GPU it is this test alone.
    """
    items = [request.node] if torch.cuda.is_available() else request.session.items
    mine = [item for item in items if item.path == request.path]
    return [value for item in mine for value in item.callspec.params.values()]


@pytest.fixture
def write(request: pytest.FixtureRequest) -> Callable[[list[records.Record]], None]:
    """Appends records to the file of this device and these versions."""

    def append(found: list[records.Record]) -> None:
        records.append(records.path_for(environment.current(), request.config.getoption("--results")), found)

    return append


@pytest.fixture
def leave_out(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the summary of what was not measured."""
    return lambda line: request.config.stash[_LEFT_OUT].append(f"{request.node.name}: {line}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.skipped and isinstance(report.longrepr, tuple):
        item.config.stash[_LEFT_OUT].append(f"{item.name}: {report.longrepr[2].removeprefix('Skipped: ')}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash[_LEFT_OUT]
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        terminalreporter.section("not run on a CPU")
        for line in CPU_LEFT_OUT:
            terminalreporter.line(line)
    if lines:
        terminalreporter.section("not measured")
        for line in lines:
            terminalreporter.line(line)
    path = records.path_for(environment.current(), config.getoption("--results"))
    terminalreporter.section("results")
    terminalreporter.line(f"wrote {path.name}; python -m bench.report prints floors and speed-ups")
