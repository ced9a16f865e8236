"""The cells of an ablation that differ only in their seed, and comparisons of two such groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ggam_fast.training.ablation.guidances import GUIDANCES
from ggam_fast.training.measure.seeds import Difference, holm, paired


class Group(NamedTuple):
    """Cells that differ only in their seed."""

    attention: str
    guidance: str
    weight: float
    cells: list[dict[str, Any]]

    def values(self, *path: str) -> list[float]:
        """One number of every cell, in the order of the seeds. Cells without it are left out."""
        return list(self.by_seed(*path).values())

    def by_seed(self, *path: str) -> dict[int, float]:
        """One number of every cell that has it, by the cell's seed."""
        found = {}
        for cell in self.cells:
            value: Any = cell
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found[cell["cell"]["seed"]] = float(value)
        return found

    @property
    def label(self) -> str:
        name = self.attention.replace("_", "-")
        return name if self.guidance == "none" else f"{name} + {GUIDANCES[self.guidance].label}"


def grouped(results: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[Group]:
    """The groups of the cells with these seeds, in the order in which their first cells were run."""
    groups: dict[tuple[str, str, float], Group] = {}
    for result in results:
        cell = result["cell"]
        if cell["seed"] in seeds:
            key = (cell["attention"], cell["guidance"], cell["weight"])
            groups.setdefault(key, Group(*key, [])).cells.append(result)
    return list(groups.values())


class Comparison(NamedTuple):
    """`ours` against `theirs` in one measure, over their common seeds."""

    ours: Group
    theirs: Group
    measure: str
    difference: Difference
    p: float  # after Holm's correction over all comparisons of the table


def comparisons(rows: Sequence[Group], *measures: tuple[str, tuple[str, ...]]) -> list[Comparison]:
    """Every guided row against the same attention without guidance, and every attention against none.

    `measures`: name and path of each number that is compared. Pairs with fewer than two common seeds are
    left out.
    """
    plain = {row.attention: row for row in rows if row.guidance == "none"}
    pairs = [(row, plain[row.attention]) for row in rows if row.guidance != "none" and row.attention in plain]
    pairs += [(row, plain["none"]) for name, row in plain.items() if name != "none" and "none" in plain]
    found = []
    for ours, theirs in pairs:
        for name, path in measures:
            difference = paired(ours.by_seed(*path), theirs.by_seed(*path))
            if difference is not None:
                found.append(Comparison(ours, theirs, name, difference, difference.p))
    corrected = holm([one.p for one in found])
    return [one._replace(p=p) for one, p in zip(found, corrected, strict=True)]
