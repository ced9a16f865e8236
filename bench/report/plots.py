"""Result files as pictures: time against batch size, speed-up over each peer, memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from bench.report.results import Results, Sized
from bench.suite.cases import COMPILED

LABELS = {
    "fused": "this library",
    "fused_modular": "this library, separate loss",
    "fused_compiled": "this library, compiled",
    "eager": "eager reference",
    "compiled": "torch.compile",
    "compiled_max_autotune": "torch.compile, max-autotune",
    "compiled_reduce_overhead": "torch.compile, reduce-overhead",
    "compiled_closed_form": "closed form, torch.compile",
    "fused_reduce_overhead": "this library, reduce-overhead",
}
COLOURS = dict(zip(LABELS, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
STEP = ("fused", "fused_modular", "eager", *COMPILED)


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures for which the file has records, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"time": _time, "speedup": _speedup, "memory": _memory}
    paths = []
    for name, plot in pictures.items():
        figure = plot(results)
        if figure is not None:
            path = folder / f"{results.path.stem}-{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            plt.close(figure)
            paths.append(path)
    return paths


def _time(results: Results) -> Any:
    """One panel for each map that was timed at several batch sizes."""
    maps: dict[Sized, list[Sized]] = {}
    for case in results.cases("step"):
        maps.setdefault(case._replace(N=""), []).append(case)
    several = [cases for cases in maps.values() if len(cases) > 1]
    if not several:
        return None
    columns = min(len(several), 3)
    lines = -(-len(several) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, 3.8 * lines + 0.9), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(several) :]:
        axis.set_visible(False)
    for axis, cases in zip(axes.flat, several, strict=False):
        cases.sort(key=lambda c: int(c.N))
        batches = [int(c.N) for c in cases]
        for provider in STEP:
            times = [_best(results, provider, c) for c in cases]
            points = [(n, t) for n, t in zip(batches, times, strict=True) if t]
            if points:
                label, colour = LABELS[provider], COLOURS[provider]
                axis.plot(*zip(*points, strict=True), "o-", label=label, color=colour, markersize=4)
        floors = [(int(c.N), f / 1000) for c in cases if (f := results.floor("step", c))]
        axis.plot(*zip(*floors, strict=True), "--", color="black", label="floor: 3 bytes(A) / copy bandwidth")
        axis.set(xscale="log", yscale="log", title=cases[0].map, xlabel="images", ylabel="guided step, ms")
        axis.set_xticks(batches, [str(n) for n in batches])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    wide = {"ncols": min(4, 2 * columns), "fontsize": 8}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", **wide)
    return figure


def _best(results: Results, provider: str, case: Sized) -> float | None:
    """Milliseconds of a graph's replay if it was measured, else of a call."""
    for timing in ("graph", results.timing):
        row = results.row(provider, "step", case, timing)
        if row:
            return float(row["p50"]) / 1000
    return None


def _bars(groups: list[tuple[str, dict[str, float]]], title: str, xlabel: str) -> Any:
    """One block of bars for each group, with a gap of one bar between blocks."""
    count = sum(len(values) + 1 for _, values in groups)
    if not groups:
        return None
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.19 * count), layout="constrained")
    top, ticks, seen = 0, [], set()
    for _, values in groups:
        for i, provider in enumerate(p for p in LABELS if p in values):
            label = None if provider in seen else LABELS[provider]
            bar = axis.barh(top + i, values[provider], 0.95, label=label, color=COLOURS[provider])
            axis.bar_label(bar, fmt="%.2g", padding=2, fontsize=7)
            seen.add(provider)
        ticks.append(top + (len(values) - 1) / 2)
        top += len(values) + 1
    axis.set_yticks(ticks, [name for name, _ in groups])
    axis.set_ylim(top - 1, -1)
    axis.set(title=title, xlabel=xlabel)
    axis.margins(x=0.08)
    axis.axvline(1.0, color="black", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _groups(results: Results) -> Iterable[tuple[str, Sized]]:
    for case in results.compared():
        yield f"{case.map}, N = {case.N}", case


def _speedup(results: Results) -> Any:
    groups = []
    for name, case in _groups(results):
        values = {}
        for provider in STEP:
            ours = results.ours("step", case, provider)
            row = results.row(provider, "step", case, results.timing)
            if ours and row and not provider.startswith("fused"):
                values[provider] = float(row["p50"]) / ours.microseconds
        if values:
            groups.append((name, values))
    return _bars(groups, "Guided step: times faster than each peer (compiled against compiled)", "times")


def _memory(results: Results) -> Any:
    groups = []
    for name, case in _groups(results):
        found = {p: results.row(p, "step", case, results.timing) for p in STEP}
        values = {
            p: float(r["peak MiB"]) * 2**20 / case.bytes for p, r in found.items() if r and r["peak MiB"]
        }
        if values:
            groups.append((name, values))
    return _bars(groups, "Guided step: peak memory beyond A and parameters (dA is 1)", "in bytes(A)")
