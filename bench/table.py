"""Result files as Markdown: tables of whole training steps, of the host's time, of the head alone."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import rows
from .cases import CAM_LIBRARIES, COMPILED, COMPILED_REFERENCE, FUSED_COMPILED

KEY = ("op", "provider", "pass", "N", "C", "H", "W", "dtype", "layout", "timing")
NAMES = {"step": "guided step", "fwd_beta": "forward and beta", "fwd": "forward"}
WHOLE = {  # provider: what stands in the table
    "linear": "pooling and a linear layer",
    "fused": "this head",
    "fused_compiled": "this head, compiled",
    "authors": "the authors' way, two backward passes",
}
HOST = {  # name in the file of `host`: what is called, with what it is compared
    "fused": ("eager step: `fused_ggam_loss`, backward", "eager"),
    "drop_in": ("eager step: `head(x, y)`, `GGAMLoss`, backward", "eager"),
    "forward": ("eager inference: `head(x)` of one image, without gradients", "eager_forward"),
    "fused_compiled": ("compiled step: `fused_ggam_loss`, backward", "compiled"),
}
PEERS = {  # column: providers, the fastest of which is shown
    "eager": ("eager",),
    "compiled": COMPILED_REFERENCE,
    "closed form": ("compiled_closed_form",),
}


class Results:
    """The newest row of each measurement in one file."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = {tuple(row[k] for k in KEY): row for row in rows.read(path)}
        if not self.rows:
            raise ValueError(f"{path} holds no rows")
        self.newest = max(self.rows.values(), key=lambda row: row["utc"])

    @property
    def on_gpu(self) -> bool:
        return bool(self.newest["cuda"])

    @property
    def timing(self) -> str:
        """The timing that speed-ups compare: what a step costs when A comes from memory."""
        return "cold" if self.on_gpu else "hot"

    def cases(self, run: str, op: str = "ggam") -> list["Sized"]:
        """What was measured of a pass: maps in the order of the file, each by batch size."""
        found = [
            Sized(*(row[k] for k in Sized._fields))
            for row in self.rows.values()
            if row["pass"] == run and row["op"] == op
        ]
        maps = list(dict.fromkeys(case._replace(N="") for case in found))
        return sorted(dict.fromkeys(found), key=lambda c: (maps.index(c._replace(N="")), int(c.N)))

    def compared(self, run: str = "step") -> list["Sized"]:
        """The cases that were timed against torch.compile too; all of them if none was."""
        cases = self.cases(run)
        return [c for c in cases if self.time(COMPILED_REFERENCE, run, c, self.timing)] or cases

    def row(self, provider: str, run: str, case: "Sized", timing: str, op: str = "ggam") -> Any:
        return self.rows.get((op, provider, run, *case, timing))

    def time(self, providers: Sequence[str], run: str, case: "Sized", timing: str) -> "Time | None":
        """The fastest of the providers."""
        found = [(float(row["p50"]), p, row) for p in providers if (row := self.row(p, run, case, timing))]
        return Time(*min(found, key=lambda t: t[0])) if found else None

    def ours(self, run: str, case: "Sized", peer: str) -> "Time | None":
        """What a peer is compared with: this library, compiled if the peer is."""
        providers = FUSED_COMPILED if peer in COMPILED else ("fused",)
        return self.time(providers, run, case, self.timing)

    def floor(self, run: str, case: "Sized") -> float | None:
        """Microseconds, as the rows have it."""
        for row in self.rows.values():
            if row["x_floor"] and row["pass"] == run and tuple(row[k] for k in Sized._fields) == case:
                return float(row["p50"]) / float(row["x_floor"])
        return None


class Sized(NamedTuple):
    """A case as the file's text has it."""

    N: str
    C: str
    H: str
    W: str
    dtype: str
    layout: str

    @property
    def map(self) -> str:
        size = f"{self.C} x {self.H}" if self.layout == "nlc" else f"{self.C} x {self.H} x {self.W}"
        layout = {"nchw": "", "channels_last": ", channels-last", "nlc": " tokens"}[self.layout]
        return f"{size}{layout}" + ("" if self.dtype == "bfloat16" else f", {self.dtype}")

    @property
    def bytes(self) -> int:
        size = {"float32": 4, "float64": 8}.get(self.dtype, 2)
        return int(self.N) * int(self.C) * int(self.H) * int(self.W) * size


class Time(NamedTuple):
    microseconds: float
    provider: str
    row: dict[str, str]


def markdown(files: Iterable[Path]) -> str:
    """README's block, of rows (.csv) and of the host's times (.json): what a user gets first."""
    paths = list(files)
    results = sorted(
        (Results(p) for p in paths if p.suffix == ".csv"), key=lambda r: (not r.on_gpu, r.path.name)
    )
    parts = [part for r in results for part in _whole_steps(r)]
    parts += [part for p in paths if p.suffix == ".json" for part in _host_times(p)]
    parts += [part for r in results for part in (_heading(r), *_tables(r))]
    if not any(r.on_gpu for r in results):
        parts.insert(0, "**No GPU has been measured yet.**")
    return "\n\n".join(dict.fromkeys(parts))  # a legend once


def _heading(results: Results) -> str:
    rows = list(results.rows.values())
    if results.on_gpu:
        return f"**The head alone**, one step after another and as CUDA graphs. {_machine(rows)}:"
    return f"**The head alone, on a CPU.** {_machine(rows)}:"


def _machine(rows: Sequence[dict[str, str]]) -> str:
    """The device, the versions, and what the rows were measured at."""
    row = max(rows, key=lambda row: row["utc"])
    versions = f"torch {row['torch']}, triton {row['triton']}, {_commits(rows)}"
    if row["cuda"]:
        clocks = f", {row['sm_mhz']} MHz" if row["sm_mhz"] else ""
        return f"{row['gpu']}{clocks}, driver {row['driver']}, CUDA {row['cuda']}, {versions}"
    loads = [float(r["load"]) for r in rows]
    return f"{row['gpu']}, load {min(loads):.1f} to {max(loads):.1f}, {versions}"


def _commits(rows: Sequence[dict[str, str]]) -> str:
    """What the rows were measured at, the newest first."""
    by_time = sorted(rows, key=lambda row: row["utc"], reverse=True)
    changes = {"1": " with changes", "": " (changes unknown)"}
    counts = Counter(row["commit"] + changes.get(row["dirty"], "") for row in by_time)
    if len(counts) == 1:
        return f"commit {next(iter(counts))}"
    return "commits " + ", ".join(f"{commit} ({n} of {len(by_time)} rows)" for commit, n in counts.items())


def _tables(results: Results) -> Iterable[str]:
    if results.on_gpu:
        yield _gpu_table(results)
        yield (
            "Microseconds, medians with A coming from memory; *graph* is a replay of a CUDA graph,\n"
            "without launch gaps. Floor: 3 bytes(A), of a forward 1 and with beta 2, over the copy\n"
            "bandwidth of the same run. *compiled* is the fastest mode of `torch.compile` measured for\n"
            "that case, of this library too. In brackets how many times faster this library is, compiled\n"
            "than what is compiled. Memory: the peak of *fused* beyond A, parameters and the gradients of\n"
            "both, in bytes(A). What was not timed against `torch.compile` stands in the file."
        )
    else:
        yield _cpu_table(results)
        yield (
            "Milliseconds, medians; in brackets how many times faster this library is, whose torch\n"
            "backend runs here. A load above the number of threads means that others used the\n"
            "machine meanwhile."
        )
    pictures = {"time": "time against batch size", "speedup": "speed-ups", "memory": "memory"}
    links = (
        f"[{text}](bench/results/plots/{results.path.stem}-{name}.png)" for name, text in pictures.items()
    )
    yield f"Pictures: {', '.join(links)}."
    beta = _beta_table(results)
    if beta:
        yield beta


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _over(peer: Time | None, ours: Time | None = None) -> str:
    if peer is None:
        return "-"
    return f"{peer.microseconds:.0f}" + (f" ({peer.microseconds / ours.microseconds:.1f} x)" if ours else "")


def _gpu_table(results: Results) -> str:
    ours = ("fused, graph", "fused", "fused compiled, graph", "fused compiled")
    header = ("", "features", "N", "floor", *ours, *PEERS, "memory")
    lines = []
    for run in ("step", "fwd_beta", "fwd"):
        for case in results.compared(run):
            floor, line = results.floor(run, case), [NAMES[run], case.map, case.N]
            line.append(f"{floor:.0f}" if floor else "-")
            for providers in (("fused",), FUSED_COMPILED):
                graph = results.time(providers, run, case, "graph")
                share = f" ({graph.microseconds / floor:.2f} x floor)" if graph and floor else ""
                line += [_over(graph) + share, _over(results.time(providers, run, case, results.timing))]
            for names in PEERS.values():
                peer = results.time(names, run, case, results.timing)
                line.append(_over(peer, results.ours(run, case, names[0])))
            row = results.row("fused", run, case, results.timing)
            memory = memory_beyond(row, case) if row else None
            lines.append((*line, "-" if memory is None else f"{memory:.2f}"))
    return _table(header, lines)


def memory_beyond(row: dict[str, str], case: Sized) -> float | None:
    """Peak beyond A, parameters and the gradients of both, in bytes(A)."""
    if not row["peak MiB"] or not row["gradients_mib"]:
        return None
    return (float(row["peak MiB"]) - float(row["gradients_mib"])) * 2**20 / case.bytes


def _cpu_table(results: Results) -> str:
    def milliseconds(peer: Time | None, ours: Time | None = None) -> str:
        if peer is None:
            return "-"
        ratio = f" ({peer.microseconds / ours.microseconds:.1f} x)" if ours else ""
        time = peer.microseconds / 1000
        return f"{time:.{2 if time < 1 else 1}f}{ratio}"

    lines = []
    for run in ("step", "fwd_beta", "fwd"):
        for case in results.cases(run):
            eager, ours, compiled, both = (
                results.time((p,), run, case, "hot") for p in ("eager", "fused", "compiled", "fused_compiled")
            )
            lines.append((NAMES[run], case.map, case.N, milliseconds(ours), milliseconds(eager, ours),
                          milliseconds(both), milliseconds(compiled, both)))  # fmt: skip
    header = ("", "features", "N", "fused", "eager reference", "fused, compiled", "compiled reference")
    return _table(header, lines)


def _beta_table(results: Results) -> str | None:
    cases = results.cases("beta")
    if not cases:
        return None
    found = {row["provider"] for row in results.rows.values() if row["pass"] == "beta"}
    names = [n for n in ("fused", "eager", *COMPILED, *CAM_LIBRARIES) if n in found]
    lines = []
    for case in cases:
        line = [f"{case.map}, N = {case.N}"]
        for name in names:
            ours = None if name.startswith("fused") else results.ours("beta", case, name)
            line.append(_over(results.time((name,), "beta", case, results.timing), ours))
        lines.append(line)
    return _table(("beta alone, microseconds", *(n.replace("_", "-") for n in names)), lines)


def _whole_steps(results: Results) -> Iterable[str]:
    """A training step of a whole network with each head; a tiny one on a CPU says little about speed."""
    found = [row for row in results.rows.values() if row["pass"] == "e2e" and row["timing"] == "hot"]
    if not found or not results.on_gpu:
        return
    yield (
        "**A whole training step**: backbone, head, loss, backward, optimizer.\n"
        f"`pytest bench/bench_e2e.py` on {_machine(found)}:"
    )
    plain = {row["op"]: float(row["p50"]) for row in found if row["provider"] == "linear"}
    lines = []
    for row in found:
        time, beside = float(row["p50"]), plain.get(row["op"])
        share = f" ({time / beside:.2f} x)" if beside and row["provider"] != "linear" else ""
        lines.append((
            f"{row['op']}, {row['N']} images", WHOLE.get(row["provider"], row["provider"]),
            f"{time / 1000:.1f}{share}", f"{float(row['images_per_s']):.0f}", f"{float(row['peak MiB']):.0f}",
            f"{float(row['joules_per_image']):.2f}" if row["joules_per_image"] else "-",
        ))  # fmt: skip
    header = ("network", "head", "milliseconds", "images/s", "peak MiB", "joules an image")
    yield _table(header, lines)
    yield "In brackets the time over that of the network with pooling and a linear layer."


def _host_times(path: Path) -> Iterable[str]:
    """What a call costs the host, from a file of `python -m bench.host`."""
    found = json.loads(path.read_text())
    versions = f"torch {found['torch']}, triton {found['triton']}, Python {found['python']}"
    if "gpu" in found:
        how, machine = "time until a call returns", found["gpu"]
        note = "The GPU has nothing to do before each call."
    else:
        how, machine = "CPU time until a call returns, without a GPU", found["cpu"].split(", ")[0]
        note = (
            "Launches of this library end in a stub of the driver, so the driver's own\n"
            "time is missing. torch's operations run on one thread of the CPU, on maps so small that they\n"
            "have little to compute."
        )
    yield (
        f"**What a call costs the host**: {how} (`python -m bench.host --compile`).\n"
        f"{machine}, {versions}, features {found['case']}:"
    )
    lines = [
        (text, f"{found[name]:.0f}", f"{found[peer]:.0f} ({found[peer] / found[name]:.1f} x)")
        for name, (text, peer) in HOST.items()
        if {name, peer} <= found.keys()
    ]
    yield _table(("", "this library", "reference"), lines)
    yield (
        "Microseconds, medians of one run after the first calls; in brackets how many times faster this\n"
        f"library is. {note}\n"
        f"An eager `fused_ggam_loss` and its backward are {found['launches']:.0f} launches."
    )
