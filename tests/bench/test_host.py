"""The host's time and what it is measured with: launches into the stub of the driver, bars, crossings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from bench import crossings, driver_stub, host  # noqa: E402
from bench.environment import ROOT  # noqa: E402

needs_stub = pytest.mark.skipif(
    torch.cuda.is_available() or driver_stub.compiler() is None,
    reason="the stub of the driver needs a C compiler, and no GPU",
)


def copy(x, y, scale, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A kernel, never compiled."""


@needs_stub
def test_launches_into_the_stub_are_counted() -> None:
    kernel = triton.JITFunction(copy)
    x, y = torch.ones(8), torch.zeros(8)
    with driver_stub.active():
        before = driver_stub.launch_count()
        for _ in range(2):
            compiled = kernel[(3,)](x, y, 0.5, 8, BLOCK=8, num_warps=2)
        assert driver_stub.launch_count() - before == 2
        values = (x.data_ptr(), y.data_ptr(), 0.5, 8, 8)
        compiled[(3, 1, 1)](*values)
        compiled.run(3, 1, 1, 0, compiled.function, compiled.packed_metadata, None, None, None, *values)
        assert driver_stub.launch_count() - before == 4
        compiled[(0, 1, 1)](*values)  # Triton's launcher knows better than to ask the driver for this
        assert driver_stub.launch_count() - before == 4
        with pytest.raises(TypeError):
            compiled[(3, 1, 1)]("x", *values[1:])
    assert isinstance(compiled, triton.compiler.CompiledKernel)
    assert compiled.packed_metadata == (2, 1, 0)
    assert not kernel.device_caches  # nothing is left that would be launched without the stub
    assert not y.any()


@needs_stub
def test_numbers_are_written(tmp_path: Path) -> None:
    """In a process without the interpreter, whose kernels have no launch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench.host", "--rounds", "2", "--case", "2x32x3x3-float32"]
    command += ["--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert found["case"] == "2x32x3x3-float32-nchw"
    assert all(found[name] for name in ("torch", "triton", "python", "cpu", "commit"))
    times = {"fused", "drop_in", "eager", "forward", "eager_forward"}
    assert found.keys() - {"case", "torch", "triton", "python", "cpu", "commit"} == {*times, "launches"}
    assert all(found[name] > 0 for name in times)
    assert found["launches"] > 2
    judged = [line for line in done.stdout.splitlines() if line.startswith(("met ", "MISSED "))]
    assert len(judged) == 4


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({"fused": 20.0, "eager": 100.0}, "met    fused / eager: 0.200 (at most 0.2)"),
        ({"fused": 21.0, "eager": 100.0}, "MISSED fused / eager: 0.210 (at most 0.2)"),
        ({"drop_in_compiled": 30.0, "compiled": 40.0}, "       drop_in_compiled / compiled: 0.750"),
        ({"launches": 28}, "met    launches: 28 (at most 28)"),
        ({"launches": 29}, "MISSED launches: 29 (at most 28)"),
    ],
)
def test_bars(found: dict[str, float], line: str) -> None:
    assert list(host.report(found))[-1] == line


def test_bars_without_their_numbers() -> None:
    assert not any("compiled" in line for line in host.report({"fused": 1.0, "eager": 5.0}))


def test_calls_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TURN", 2)
    order: list[str] = []
    found = host.microseconds({name: lambda name=name: order.append(name) for name in "ab"}, 4)
    assert "".join(order[-12:]) == "aaabbb" * 2
    assert found.keys() == {"a", "b"}


def test_what_of_torch_is_a_launch() -> None:
    x = torch.rand(4, 6, requires_grad=True)

    def launches_nothing() -> Tensor:
        return torch.empty_like(x.detach()).view(24)[2:].unflatten(0, (2, 11)).t().expand(3, 11, 2)

    assert host.torch_launches(launches_nothing) == 0
    assert host.torch_launches(lambda: x.softmax(1).mean().item()) == 3
    assert host.torch_launches(lambda: torch.zeros(3).clone().add_(1)) == 3
    # the product, the sum, the first gradient, the product's gradient
    assert host.torch_launches(lambda: torch.autograd.grad((x * 2).sum(), x)) == 4


def test_crossings_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "crossed"
    (package / "kernels").mkdir(parents=True)
    sources = {
        "__init__": "",
        "upper": "from . import lower\ndef f():\n lower.g()\n h()\n max([1], key=lower.g)\ndef h(): 0",
        "lower": "from .kernels import n\ndef g(x=0): return k(n(x))\ndef k(x): return x",
        "kernels/__init__": "def n(x): return x",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    from crossed import upper  # type: ignore[import-not-found]

    found = crossings.crossings(upper.f, package)  # upper.f, lower.g, lower.k, upper.h, lower.g, lower.k
    assert found.times == 3
    assert {Path(file).name for file in found.files} == {"upper.py", "lower.py"}
    assert sys.getprofile() is None
    assert crossings.verdict("toy", "replayed", found).startswith("met ")
    assert crossings.verdict("toy", "replayed", found._replace(times=31)).startswith("MISSED ")
