"""Result files as Markdown tables: whole training steps, the host's time, the head alone."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.report.results import Results, Time, memory_beyond
from bench.suite.cases import CAM_LIBRARIES, COMPILED, COMPILED_REFERENCE, FUSED_COMPILED

NAMES = {"step": "guided step", "fwd_beta": "forward and beta", "fwd": "forward"}
WHOLE = {  # provider: its name in the table
    "linear": "pooling and a linear layer",
    "fused": "this head",
    "fused_compiled": "this head, compiled",
    "authors": "the authors' way, with two backward passes",
}
HOST = {  # name in the file of `bench.host`: the call, and the name of its peer
    "fused": ("eager step: `fused_ggam_loss`, backward", "eager"),
    "drop_in": ("eager step: `head(x, y)`, `GGAMLoss`, backward", "eager"),
    "forward": ("eager inference: `head(x)` of one image, without gradients", "eager_forward"),
    "fused_compiled": ("compiled step: `fused_ggam_loss`, backward", "compiled"),
}
PEERS = {  # column: its providers, of which the fastest is shown
    "eager": ("eager",),
    "compiled": COMPILED_REFERENCE,
    "closed form": ("compiled_closed_form",),
}


def markdown(files: Iterable[Path]) -> str:
    """The block of `page`, from files of records (.csv) and of the host's times (.json)."""
    paths = list(files)
    results = sorted(
        (Results(p) for p in paths if p.suffix == ".csv"), key=lambda r: (not r.on_gpu, r.path.name)
    )
    parts = [part for r in results for part in _whole_steps(r)]
    parts += [part for p in paths if p.suffix == ".json" for part in _host_times(p)]
    parts += [part for r in results for part in (_heading(r), *_tables(r))]
    if not any(r.on_gpu for r in results):
        parts.insert(0, "**No GPU has been measured yet.**")
    return "\n\n".join(dict.fromkeys(parts))  # print each legend once


def _heading(results: Results) -> str:
    measured = list(results.records.values())
    if results.on_gpu:
        return f"**The head alone**, in separate calls and in CUDA graphs. {_machine(measured)}:"
    return f"**The head alone, on a CPU.** {_machine(measured)}:"


def _machine(measured: Sequence[dict[str, str]]) -> str:
    """The device, the versions, and the commits of the records."""
    row = max(measured, key=lambda row: row["utc"])
    versions = f"torch {row['torch']}, triton {row['triton']}, {_commits(measured)}"
    if row["cuda"]:
        clocks = f", {row['sm_mhz']} MHz" if row["sm_mhz"] else ""
        return f"{row['gpu']}{clocks}, driver {row['driver']}, CUDA {row['cuda']}, {versions}"
    loads = [float(r["load"]) for r in measured]
    return f"{row['gpu']}, load {min(loads):.1f} to {max(loads):.1f}, {versions}"


def _commits(measured: Sequence[dict[str, str]]) -> str:
    """The commits of the records, beginning with the newest."""
    by_time = sorted(measured, key=lambda row: row["utc"], reverse=True)
    changes = {"1": " with changes", "": " (changes unknown)"}
    counts = Counter(row["commit"] + changes.get(row["dirty"], "") for row in by_time)
    if len(counts) == 1:
        return f"commit {next(iter(counts))}"
    return "commits " + ", ".join(f"{commit} ({n} of {len(by_time)} records)" for commit, n in counts.items())


def _tables(results: Results) -> Iterable[str]:
    if results.on_gpu:
        yield _gpu_table(results)
        yield (
            "Times are medians in microseconds, and A comes from memory. *graph* is a replay of a CUDA\n"
            "graph, which has no gaps between launches. The floor is a number of bytes divided by the copy\n"
            "bandwidth of the same run: 3 bytes(A) for a guided step, 2 for a forward with beta, 1 for a\n"
            "forward. *compiled* and *fused compiled* are the fastest measured mode of `torch.compile` for\n"
            "the case. Brackets say how many times faster this library is. *compiled* and *closed form* are\n"
            "compared with *fused compiled*, and *eager* with *fused*. Memory is the peak of *fused* beyond\n"
            "A, the parameters and their gradients, in bytes(A). The result file also has cases without\n"
            "`torch.compile`."
        )
    else:
        yield _cpu_table(results)
        yield (
            "Times are medians in milliseconds. On a CPU this library runs its torch backend. Brackets say\n"
            "how many times faster it is. If the load is above the number of threads, other processes were\n"
            "running."
        )
    pictures = {"time": "time against batch size", "speedup": "speed-ups", "memory": "memory"}
    links = (
        f"[{text}](../bench/results/plots/{results.path.stem}-{name}.png)" for name, text in pictures.items()
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
    found = {row["provider"] for row in results.records.values() if row["pass"] == "beta"}
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
    """Training steps of a whole network with each head.  On a CPU there are none, as its network is tiny."""
    found = [row for row in results.records.values() if row["pass"] == "e2e" and row["timing"] == "hot"]
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
    yield "Brackets show the time divided by the time of the network with pooling and a linear layer."


def _host_times(path: Path) -> Iterable[str]:
    """How long a call occupies the host, from a file of `python -m bench.host`."""
    found = json.loads(path.read_text())
    versions = f"torch {found['torch']}, triton {found['triton']}, Python {found['python']}"
    if "gpu" in found:
        how, machine = "time until it returns", found["gpu"]
        note = "The GPU is idle before each call."
    else:
        how, machine = "CPU time until it returns, without a GPU", found["cpu"].split(", ")[0]
        note = (
            "Launches of this library end in a stub of the driver, so the driver's own time is missing.\n"
            "torch's operations run on one thread of the CPU. The maps are tiny, so they compute little."
        )
    yield (
        f"**The host's time for a call**: {how} (`python -m bench.host --compile`).\n"
        f"{machine}, {versions}, features {found['case']}:"
    )
    lines = [
        (text, f"{found[name]:.0f}", f"{found[peer]:.0f} ({found[peer] / found[name]:.1f} x)")
        for name, (text, peer) in HOST.items()
        if {name, peer} <= found.keys()
    ]
    yield _table(("", "this library", "reference"), lines)
    yield (
        "Times are medians in microseconds over one run, without its first calls. Brackets say how many\n"
        f"times faster this library is.\n{note}\n"
        f"An eager `fused_ggam_loss` and its backward make {found['launches']:.0f} launches."
    )
