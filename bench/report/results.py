"""The newest records of one result file, by case and provider."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure import records
from bench.suite.cases import COMPILED, COMPILED_REFERENCE, FUSED_COMPILED

KEY = ("op", "provider", "pass", "N", "C", "H", "W", "dtype", "layout", "timing")


class Results:
    """The newest record of each measurement in one file."""

    def __init__(self, path: Path):
        self.path = path
        self.records = {tuple(row[k] for k in KEY): row for row in records.read(path)}
        if not self.records:
            raise ValueError(f"{path} holds no records")
        self.newest = max(self.records.values(), key=lambda row: row["utc"])

    @property
    def on_gpu(self) -> bool:
        return bool(self.newest["cuda"])

    @property
    def timing(self) -> str:
        """The timing for speed-ups.  On a GPU it is the one in which A comes from memory."""
        return "cold" if self.on_gpu else "hot"

    def cases(self, run: str, op: str = "ggam") -> list["Sized"]:
        """The measured cases of a pass.  Maps keep the order of the file, each sorted by batch size."""
        found = [
            Sized(*(row[k] for k in Sized._fields))
            for row in self.records.values()
            if row["pass"] == run and row["op"] == op
        ]
        maps = list(dict.fromkeys(case._replace(N="") for case in found))
        return sorted(dict.fromkeys(found), key=lambda c: (maps.index(c._replace(N="")), int(c.N)))

    def compared(self, run: str = "step") -> list["Sized"]:
        """The cases on which torch.compile was timed too, or all cases if there are none."""
        cases = self.cases(run)
        return [c for c in cases if self.time(COMPILED_REFERENCE, run, c, self.timing)] or cases

    def row(self, provider: str, run: str, case: "Sized", timing: str, op: str = "ggam") -> Any:
        return self.records.get((op, provider, run, *case, timing))

    def time(self, providers: Sequence[str], run: str, case: "Sized", timing: str) -> "Time | None":
        """The time of the fastest of the providers."""
        found = [(float(row["p50"]), p, row) for p in providers if (row := self.row(p, run, case, timing))]
        return Time(*min(found, key=lambda t: t[0])) if found else None

    def ours(self, run: str, case: "Sized", peer: str) -> "Time | None":
        """The time of this library with which a peer is compared.  It is compiled if the peer is."""
        providers = FUSED_COMPILED if peer in COMPILED else ("fused",)
        return self.time(providers, run, case, self.timing)

    def floor(self, run: str, case: "Sized") -> float | None:
        """The floor in microseconds, from the records."""
        for row in self.records.values():
            if row["x_floor"] and row["pass"] == run and tuple(row[k] for k in Sized._fields) == case:
                return float(row["p50"]) / float(row["x_floor"])
        return None


class Sized(NamedTuple):
    """A case, as text from the file."""

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


def memory_beyond(row: dict[str, str], case: Sized) -> float | None:
    """Peak memory beyond A, the parameters and their gradients, in bytes(A)."""
    if not row["peak MiB"] or not row["gradients_mib"]:
        return None
    return (float(row["peak MiB"]) - float(row["gradients_mib"])) * 2**20 / case.bytes
