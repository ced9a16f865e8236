"""The cells of an ablation that differ only in their seed, and the difference between two such groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ggam_fast.training.measure.seeds import paired


class Group(NamedTuple):
    """Cells that differ only in their seed."""

    attention: str
    cam_norm: str
    weight: float
    cells: list[dict[str, Any]]

    def values(self, *path: str) -> list[float]:
        """One number of every cell, in the order of the seeds. Cells without it are left out."""
        found = []
        for cell in self.cells:
            value: Any = cell
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found.append(float(value))
        return found

    @property
    def label(self) -> str:
        return self.attention.replace("_", "-") + (" + guidance" if self.weight else "")


def grouped(results: Sequence[dict[str, Any]]) -> list[Group]:
    """The groups, in the order in which their first cells were run."""
    groups: dict[tuple[str, str, float], Group] = {}
    for result in results:
        cell = result["cell"]
        key = (cell["attention"], cell["cam_norm"], cell["weight"])
        groups.setdefault(key, Group(*key, [])).cells.append(result)
    return list(groups.values())


def paired_difference(ours: Group, theirs: Group, *path: str) -> tuple[float, float] | None:
    """The mean of (ours - theirs) over the seeds that both have, and half the width of its 95 % interval.

    The interval is Student's t on the differences. With fewer than two common seeds the result is None.
    """

    def by_seed(group: Group) -> dict[int, float]:
        return {
            cell["cell"]["seed"]: value
            for cell, value in zip(group.cells, group.values(*path), strict=False)
            if len(group.values(*path)) == len(group.cells)
        }

    mine, other = by_seed(ours), by_seed(theirs)
    found = paired(mine, other)
    return None if found is None else (found.mean, found.half_width)
