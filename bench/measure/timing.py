"""Measure how long a call takes, how much memory it needs and how many kernels it launches.

    hot     every call has the same input buffer
    cold    inputs rotate among buffers that together are larger than L2, so A comes from memory
    graph   the same rotation in replays of one CUDA graph, without launch gaps
    host    time until the call returns; the device is idle before it

On a GPU, CUDA events around each call give the times, except for `host`, which takes the CPU's clock.  On a
CPU there is only `hot`, by the CPU's clock.  Calls that are compared take turns.
"""

import gc
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[int], Any]
"""`call(i)` runs once on input i."""

BUDGET = 0.25  # seconds for one kind of timing, without the warm-up
ROUNDS = (10, 200)  # least and largest number of calls
CPU_BUDGET, CPU_BLOCK = 3.0, 0.1  # seconds for each call, seconds of one turn
CPU_TURNS = (10, 30)
CACHE_MULTIPLE, MOST_BUFFERS = 3, 256


class Spread(NamedTuple):
    """Percentiles of the samples, in seconds."""

    p20: float
    p50: float
    p80: float


class Measured(NamedTuple):
    """The spread of each kind of timing, and a line for each kind that failed."""

    spreads: dict[str, Spread]
    missing: list[str]


def spread(samples: list[float]) -> Spread:
    """20th, 50th and 80th percentile, interpolated."""
    if not samples:
        raise ValueError("samples must not be empty")
    return Spread(*(float(x) for x in numpy.percentile(samples, (20, 50, 80))))


def buffers_for(bytes_each: int) -> int:
    """How many inputs to rotate among so that none is still in L2 at its next turn.

    The number is at most MOST_BUFFERS, so the inputs of a single small image may still be in L2.
    """
    if not torch.cuda.is_available():
        return 1
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(max(2, -(-CACHE_MULTIPLE * l2 // bytes_each)), MOST_BUFFERS)


def rounds_for(seconds: float, budget: float = BUDGET, bounds: tuple[int, int] | None = None) -> int:
    """How many calls of that length fit into the budget, between the bounds (default: ROUNDS)."""
    least, most = bounds or ROUNDS
    return int(min(max(budget / max(seconds, 1e-9), least), most))


def host_times(call: Call, rounds: int, synchronize: bool, buffers: int = 1) -> list[float]:
    """Seconds until the call returns.  With `synchronize`, the device is idle before each call."""
    found = []
    for i in range(rounds):
        if synchronize:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(i % buffers)
        found.append(time.perf_counter() - start)
    return found


def in_turns(calls: Sequence[Call]) -> list[Spread]:
    """`hot` on a CPU, in blocks of CPU_BLOCK seconds.

    A shared CPU changes its speed from second to second.  Calls take turns, so this affects all alike.  The
    first call of a block is not counted, because the caches then hold the data of other calls.
    """
    gc.collect()
    once = [min(host_times(call, 6, False)) for call in calls]
    lengths = [max(1, int(CPU_BLOCK / seconds)) for seconds in once]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds_for(max([CPU_BLOCK, *once]), CPU_BUDGET, CPU_TURNS)):
        for call, length, found in zip(calls, lengths, samples, strict=True):
            call(0)
            found += host_times(call, length, False)
    return [spread(found) for found in samples]


def event_times(call: Call, rounds: int, buffers: int) -> list[float]:
    """Seconds between CUDA events around each call."""
    pairs = []
    for i in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(i % buffers)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def capture(call: Call, buffers: int) -> torch.cuda.CUDAGraph:
    """One CUDA graph that calls once on each input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(buffers):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(buffers):
            call(i)
    return graph


def graph_times(call: Call, buffers: int) -> list[float]:
    """Seconds for each call, in replays of `capture`."""
    graph = capture(call, buffers)
    graph.replay()
    torch.cuda.synchronize()
    once = event_times(lambda _: graph.replay(), 3, 1)
    return [t / buffers for t in event_times(lambda _: graph.replay(), rounds_for(min(once)), 1)]


def measure(calls: Mapping[str, Call], buffers: int, captured: Container[str] = ()) -> dict[str, Measured]:
    """How long each call takes.  Calls named in `captured` are also timed as CUDA graphs."""
    if not torch.cuda.is_available():
        spreads = in_turns(list(calls.values()))
        return {name: Measured({"hot": own}, []) for name, own in zip(calls, spreads, strict=True)}
    return {name: _measure_on_gpu(call, buffers, name in captured) for name, call in calls.items()}


def _measure_on_gpu(call: Call, buffers: int, graph: bool) -> Measured:
    gc.collect()
    for i in range(max(3, buffers)):
        call(i % buffers)
    once = min(event_times(call, 3, 1))
    rounds = rounds_for(once)
    found = {
        "hot": spread(event_times(call, rounds, 1)),
        "cold": spread(event_times(call, max(rounds, min(buffers, ROUNDS[1])), buffers)),
        "host": spread(host_times(call, min(rounds, 50), True, buffers)),
    }
    missing = []
    if graph:
        try:
            found["graph"] = spread(graph_times(call, buffers))
        except Exception as error:
            torch.cuda.synchronize()
            missing.append(f"no CUDA graph: {first_line(error)}")
    return Measured(found, missing)


def first_line(error: Exception) -> str:
    """Type of the error and first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def peak_bytes(call: Call) -> int:
    """Peak memory of one call, less what was held before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call(0)
    held = peak = 0
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(call: Call) -> int | None:
    """How many kernels, copies and fills one call puts on the GPU, or None without a GPU."""
    return len(on_gpu(lambda: call(0))) if torch.cuda.is_available() else None


def on_gpu(call: Callable[[], Any]) -> list[Any]:
    """The profiler's events for the kernels, copies and fills of a second call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    found = [e for e in record.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e for e in found if not getattr(e, "is_user_annotation", False)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes together."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    found = measure({"copy": lambda _: target.copy_(source)}, 1)["copy"]
    return 2 * size / found.spreads["hot"].p50
