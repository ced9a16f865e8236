"""The targets of the suite, and whether each result file meets them."""

from collections.abc import Iterator

from bench.measure.verdict import verdict
from bench.report.results import Results, memory_beyond
from bench.suite.cases import CAM_LIBRARIES, COMPILED_PEERS, FUSED_COMPILED, GRAPHED

OURS = (
    (("fused",), "guided step"),
    (FUSED_COMPILED, "compiled guided step"),
    ((GRAPHED,), "graphed guided step"),
)


def judged(results: Results) -> Iterator[str]:
    """A line for each target for which the file has records: its worst case, and whether that is met."""
    yield from _gpu(results) if results.on_gpu else _cpu(results)


def _line(name: str, found: list[tuple[float, str]], limit: float, at_most: bool) -> Iterator[str]:
    if found:
        worst, where = max(found) if at_most else min(found)
        yield f"{verdict(name, worst, limit, at_least=not at_most)} at {where}"


def _ratios(
    results: Results, run: str, ours: tuple[str, ...], peers: tuple[str, ...], timing: str
) -> list[tuple[float, str]]:
    """Time of the fastest peer over the fastest of ours, for each case."""
    found = []
    for case in results.cases(run):
        mine, peer = (results.time(p, run, case, timing) for p in (ours, peers))
        if mine and peer:
            found.append(
                (peer.microseconds / mine.microseconds, f"{case.map}, N = {case.N}, {peer.provider}")
            )
    return found


def _gpu(results: Results) -> Iterator[str]:
    cases = [case for case in results.cases("step") if case.dtype == "bfloat16"]
    for timing in ("cold", "graph"):
        for providers, name in OURS:
            times = [(c, results.time(providers, "step", c, timing)) for c in cases if int(c.N) >= 128]
            floors = [(float(t.row["x_floor"]), f"{c.map}, N = {c.N}") for c, t in times if t]
            yield from _line(f"{name} over floor, N >= 128, {timing}", floors, 1.5, True)
    memory = []
    for case in cases:
        row = results.row("fused", "step", case, "cold")
        share = memory_beyond(row, case) if row else None
        if share is not None and int(case.H) * int(case.W) == 196:
            memory.append((share, f"{case.map}, N = {case.N}"))
    yield from _line("peak beyond A, parameters and gradients, in bytes(A)", memory, 0.1, True)
    for timing in ("hot", "cold", "graph"):
        for providers, name in OURS:
            step = _ratios(results, "step", providers, COMPILED_PEERS, timing)
            yield from _line(f"{name} against the best torch.compile, {timing}", step, 2.0, False)
            step = _ratios(results, "step", providers, ("eager",), timing)
            yield from _line(f"{name} against the eager reference, {timing}", step, 8.0, False)
    for providers, name in ((("fused",), "beta alone"), (FUSED_COMPILED, "compiled beta alone")):
        beta = _ratios(results, "beta", providers, CAM_LIBRARIES, "cold")
        yield from _line(f"{name} against the fastest CAM library", beta, 5.0, False)
    whole = {
        row["provider"]: row
        for row in results.records.values()
        if row["pass"] == "e2e" and row["timing"] == "hot"
    }
    for provider, name in (("fused", "whole step"), ("fused_compiled", "whole step with the compiled head")):
        if {"linear", provider, "authors"} <= whole.keys():
            plain, ours, authors = (float(whole[p]["p50"]) for p in ("linear", provider, "authors"))
            where = whole[provider]["op"]
            yield from _line(f"{name} over a step with the plain head", [(ours / plain, where)], 1.03, True)
            yield from _line(f"{name} against the authors' way", [(authors / ours, where)], 1.5, False)


def _cpu(results: Results) -> Iterator[str]:
    for run in ("step", "fwd_beta", "fwd"):
        eager = _ratios(results, run, ("fused",), ("eager",), "hot")
        yield from _line(f"{run}, eager against the eager reference", eager, 1.5, False)
        compiled = _ratios(results, run, ("fused_compiled",), ("compiled",), "hot")
        yield from _line(f"{run}, compiled against the compiled reference", compiled, 1.0, False)
