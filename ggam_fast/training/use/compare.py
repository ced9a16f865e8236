"""`ggam-fast compare`: finished runs side by side, with means over seeds and paired differences."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
import yaml
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from ggam_fast.training.errors import TrainError
from ggam_fast.training.measure.seeds import estimate, holm, paired
from ggam_fast.training.show.console import Report
from ggam_fast.training.show.figures import BLUE, GREEN, ORANGE, VERMILION, new_figure
from ggam_fast.training.system.files import write_atomically

logger = logging.getLogger(__name__)

METRICS, OPTIONS = "metrics.json", "options.yaml"
_MEASURES = ("accuracy", "balanced_accuracy", "macro_f1")
# Options that say where and how fast a run computes, not what.
_ELSEWHERE = {
    "seed", "out", "cache_dir", "workers", "device", "compile", "save_every", "log_to", "resume", "overwrite",
    "recipe",
}  # fmt: skip
_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, "0.3", "0.6")


@dataclass(frozen=True)
class CompareConfig:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of finished runs. Runs that differ in their seed alone are one group; the first group is the
    one that others are compared with."""
    out: Path | None = None
    """Folder for compare.json and curves.png. By default nothing is written."""
    overwrite: bool = False
    """Replace older files in --out."""


class Run(NamedTuple):
    """A finished run: its folder, options and results."""

    folder: Path
    options: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.options["seed"])

    @property
    def what(self) -> dict[str, Any]:
        """The options that decide what is trained."""
        return {name: value for name, value in self.options.items() if name not in _ELSEWHERE}


class Group(NamedTuple):
    """Runs that differ in their seed alone, and the options that name them."""

    label: str
    runs: list[Run]

    def by_seed(self, measure: str) -> dict[int, float]:
        return {run.seed: float(run.metrics["test"][measure]) for run in self.runs}


def compare(config: CompareConfig, report: Report) -> dict[str, Any]:
    """Print the table and the differences, write what `--out` asks for, and return the numbers.

    Raises:
        TrainError: fewer than two runs, a folder that holds no finished run, runs of other classes or test
            images, two runs of one group with the same seed, or files in `--out` already.
    """
    if len(config.runs) < 2:
        raise TrainError(f"ggam-fast compare needs two runs or more; got {len(config.runs)}")
    if config.out is not None and not config.overwrite:
        for name in ("compare.json", "curves.png"):
            if (config.out / name).exists():
                raise TrainError(f"{config.out / name} exists; --overwrite replaces it")
    groups = grouped([read_run(folder) for folder in config.runs])
    found = {"groups": [_numbers(group) for group in groups], "differences": _differences(groups)}
    _show(found, report)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=2) + "\n"
        write_atomically(config.out / "compare.json", lambda part: part.write_text(text))
        draw_curves(config.out / "curves.png", groups)
        logger.info(f"{config.out}: compare.json, curves.png")
    return found


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        TrainError: there is none, it is not finished, or its files cannot be read.
    """
    for name in (OPTIONS, METRICS):
        if not (folder / name).is_file():
            raise TrainError(f"{folder} is not the folder of a finished run: it has no {name}")
    try:
        options = yaml.safe_load((folder / OPTIONS).read_text())
        metrics = json.loads((folder / METRICS).read_text())
        run = Run(folder, dict(options), dict(metrics))
        _ = run.seed, [float(run.metrics["test"][measure]) for measure in _MEASURES], run.metrics["classes"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise TrainError(f"the results of {folder} cannot be read: {error}") from error
    return run


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The groups in the order of their first runs, each named by the options in which the groups differ."""
    first = runs[0]
    for run in runs[1:]:
        for name, mine, theirs in (
            ("classes", first.metrics["classes"], run.metrics["classes"]),
            ("test images", first.metrics["test"]["support"], run.metrics["test"]["support"]),
        ):
            if mine != theirs:
                raise TrainError(f"{run.folder} has other {name} than {first.folder}, so they do not compare")
    members: list[list[Run]] = []
    for run in runs:
        same = next((group for group in members if group[0].what == run.what), None)
        if same is None:
            members.append([run])
        elif any(other.seed == run.seed for other in same):
            raise TrainError(f"{run.folder} has the options and the seed of another run: {run.seed}")
        else:
            same.append(run)
    names = {name for group in members for name in group[0].what}
    values = {name: [group[0].what.get(name) for group in members] for name in sorted(names)}
    differ = [name for name, found in values.items() if any(value != found[0] for value in found)]
    groups = []
    for group in members:
        label = ", ".join(f"{name} {group[0].what.get(name)}" for name in differ) or group[0].folder.name
        groups.append(Group(label, group))
    return groups


def _numbers(group: Group) -> dict[str, Any]:
    """The group's runs, and each measure's mean over seeds, in [0, 1], with half its interval's width."""
    estimates = {m: estimate([*group.by_seed(m).values()])._asdict() for m in _MEASURES}
    return {"label": group.label, "runs": [str(run.folder) for run in group.runs], **estimates}


def _differences(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Each other group minus the first one, in accuracy, over common seeds; p by Holm's correction."""
    first, *others = groups
    found = [(group, paired(group.by_seed("accuracy"), first.by_seed("accuracy"))) for group in others]
    corrected = iter(holm([d.p for _, d in found if d is not None]))
    return [
        {
            "label": group.label,
            "minus": first.label,
            **({} if d is None else d._asdict()),
            "holm": None if d is None else next(corrected),
        }
        for group, d in found
    ]


def _show(found: Mapping[str, Any], report: Report) -> None:
    table = Table(
        "",
        "runs",
        *(m.replace("_", " ") for m in _MEASURES),
        title="test split, percent, ± 95 % interval over seeds",
    )
    for group in found["groups"]:
        cells = [_percent(group[m]["mean"], group[m]["half_width"]) for m in _MEASURES]
        table.add_row(group["label"], str(len(group["runs"])), *cells)
    report.console.print(table)
    for difference in found["differences"]:
        what = f"{difference['label']} minus {difference['minus']}"
        if "mean" not in difference:
            logger.info(f"{what}: fewer than two common seeds, so there is no interval")
            continue
        seeds, p = difference["seeds"], difference["holm"]
        points = f"{100 * difference['mean']:+.1f} ± {100 * difference['half_width']:.1f} points of accuracy"
        logger.info(f"{what}: {points} over {seeds} seeds, p = {p:.2g} (paired t-test, Holm's correction)")


def _percent(mean: float, half_width: float | None) -> str:
    return f"{100 * mean:.1f}" if half_width is None else f"{100 * mean:.1f} ± {100 * half_width:.1f}"


def draw_curves(path: Path, groups: Sequence[Group]) -> None:
    """Draw cross entropy and accuracy of every run after each epoch: of validation, else of training."""
    figure = new_figure(10, 4.2)
    panels = figure.subplots(1, 2)
    validated = all(
        "val_accuracy" in epoch for group in groups for run in group.runs for epoch in run.metrics["epochs"]
    )
    names = ("val_loss", "val_accuracy") if validated else ("cross_entropy", "accuracy")
    split = "validation" if validated else "training"
    for axes, name, label in zip(panels, names, ("cross entropy", "accuracy"), strict=True):
        for i, group in enumerate(groups):
            for j, run in enumerate(group.runs):
                points = [(epoch["epoch"], epoch[name]) for epoch in run.metrics["epochs"] if name in epoch]
                if points:
                    colour = _COLOURS[i % len(_COLOURS)]
                    text = group.label if j == 0 else None
                    axes.plot(*zip(*points, strict=True), color=colour, label=text, linewidth=1.2)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylabel(f"{split}, {label}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    write_atomically(path, lambda part: figure.savefig(part))
