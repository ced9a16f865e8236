"""The report of an ablation, from its finished cells: Markdown, JSON and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ggam_fast.training.ablation.group import Group, grouped, paired_difference
from ggam_fast.training.ablation.plots import draw_beta, draw_side_by_side, draw_sweep, draw_table
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.measure.localization import MEASURES
from ggam_fast.training.system.files import write_atomically

REPORT, NUMBERS = "report.md", "report.json"
_METHOD = """\
Each seed changes initial weights and order of the batches; the splits are the same. Numbers are mean ±
standard deviation over seeds, in percent unless said; the interval of a difference is Student's, 95 %, on
differences between runs with the same seed. Epochs are the same for every cell. Lambda is the one with the
best mean validation accuracy; test images chose nothing."""
_NO_GUIDED_ROW = """\
Without channel attention S is 1/C whatever is trained, so guidance has nothing to move in `none` and
`spatial`: they have no row with it."""
_SAME_SCALE = """\
The weights of the map average to one in every row, so every row's features have the scale of plain pooling,
and the first batch norm's eps of {norm_eps:g} means the same to all of them."""
_OTHER_SCALE = """\
The weights of the map are as printed, so that attention makes features smaller than plain pooling's. The
first batch norm's eps of {norm_eps:g} then weighs more in those rows: L^2 times as much where the weights sum
to one over L positions, C^2 times for `channel`. A difference between two rows of other attention is a
difference of that eps as well; `--attention-scale unit_mean` takes it away."""
_BETA = """\
Means over the validation images. Spread: standard deviation over mean of b~ over channels; where it is near
0, b~ is the same for every channel and says nothing of the image. Above floor: the guidance loss of an
image minus the least that any S could reach for its b~ (with Q the sum of b~, S = b~/Q gives (Q - 1) log(Q)
/ 2), which no training can lower. Correlation: of log S and beta over channels."""
_CONTEXT = """\
The authors' README history has, for ResNet-50 on CUB-200-2011 (top-1 %, indicative only, its tables
disagree): fine-tune 85.1, spatial 85.60, channel 85.39, both 86.86; with Grad-CAM guidance: baseline 85.3,
spatial 86.58, channel 86.26. Those are whole networks fine-tuned on 200 classes of birds; here a backbone
stays frozen and the data are others, so the direction of a difference can be compared at most, not its
size."""


def write_report(
    out: Path,
    about: dict[str, Any],
    results: Sequence[dict[str, Any]],
    best: Mapping[str, float | None],
    images: ImageSet | None,
) -> list[Path]:
    """Write the report into `out` and return the paths. Photographs are drawn only if `images` is given."""
    groups = grouped(results)
    first = about["cam_norms"][0]
    rows = table_rows(groups, first, best[first])
    paths = [out / REPORT, out / NUMBERS]
    text = markdown(about, groups, rows, best, images is not None)
    write_atomically(paths[0], lambda part: part.write_text(text))
    numbers = {"about": about, "chosen_weights": best, "groups": [numbers_of(group) for group in groups]}
    write_atomically(paths[1], lambda part: part.write_text(json.dumps(numbers, indent=1) + "\n"))
    drawings: list[tuple[str, Callable[[Path], bool]]] = [
        ("table.png", lambda path: draw_table(path, rows)),
        ("sweep.png", lambda path: draw_sweep(path, groups, about["cam_norms"])),
        ("beta.png", lambda path: draw_beta(path, groups, about["cam_norms"], best)),
    ]
    if images is not None:
        sides = about["preprocessing"]
        drawings.append(("side_by_side.jpg", lambda path: draw_side_by_side(path, rows, images, sides)))
    return paths + [out / name for name, draw in drawings if draw(out / name)]


def table_rows(groups: Sequence[Group], cam_norm: str, weight: float | None) -> list[Group]:
    """The paper's table: each attention without guidance and, where it was run, with it."""
    return [
        group
        for attention in ("none", "channel", "spatial", "channel_spatial")
        for group in groups
        if group.attention == attention
        and (not group.weight or (group.cam_norm, group.weight) == (cam_norm, weight))
    ]


def numbers_of(group: Group) -> dict[str, Any]:
    """Every number of a group, with one value per seed."""
    found: dict[str, Any] = {
        "attention": group.attention,
        "cam_norm": group.cam_norm,
        "weight": group.weight,
        "seeds": [cell["cell"]["seed"] for cell in group.cells],
        "training_seconds": group.values("training_seconds"),
    }
    for section in ("val", "test", "localisation", "beta"):
        for cell in group.cells[:1]:
            for path in _leaves(cell.get(section, {})):
                found[".".join((section, *path))] = group.values(section, *path)
    return found


def _leaves(tree: dict[str, Any]) -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = []
    for name, value in tree.items():
        paths += [(name, *below) for below in _leaves(value)] if isinstance(value, dict) else [(name,)]
    return paths


def markdown(
    about: dict[str, Any],
    groups: Sequence[Group],
    rows: Sequence[Group],
    best: Mapping[str, float | None],
    pictures: bool = True,
) -> str:
    """The whole report as Markdown. With `pictures`, it shows photographs too."""
    norms = about["cam_norms"]
    cell = groups[0].cells[0]
    seeds = sorted({one["cell"]["seed"] for group in groups for one in group.cells})
    splits = ", ".join(f"{count} {name}" for name, count in about["splits"].items())
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    parts = [
        f"# Ablation on {about['data']}",
        "" if about["finished"] else "**Unfinished: some cells are missing.**",
        f"{splits} images, {len(about['classes'])} classes; {about['backbone']}, frozen, "
        f"{cell['options']['epochs']} epochs; {about['device']}; {versions}.",
        "\n".join(f"* {note}" for note in about["notes"]),
        f"```\n{about['command']}\n```",
        f"Seeds {', '.join(map(str, seeds))}. " + _METHOD,
        "Lambda chosen: " + ", ".join(f"{norm} {weight:g}" for norm, weight in best.items() if weight) + ".",
        "## Attention and guidance",
        _accuracy_table(rows),
        f"{_NO_GUIDED_ROW} Guidance here is `{norms[0]}`.",
        _scale(cell["options"]),
        _differences(rows),
        "![accuracy of every seed](table.png)",
    ]
    localisation = _localisation_table(rows)
    if localisation:
        parts += ["## Localisation", localisation]
    if pictures:
        parts.append("![Grad-CAM of every variant](side_by_side.jpg)")
    parts += [
        "## Lambda and the norm of beta",
        _sweep_table(groups),
        "![lambda sweep](sweep.png)",
        "## Beta itself",
        _beta_table(groups, norms, best),
        _BETA,
        "![beta before and after training](beta.png)",
        "## Context",
        _CONTEXT,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation of shares, in percent."""
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _accuracy_table(rows: Sequence[Group]) -> str:
    majority = rows[0].values("test", "majority")[0]
    lines = [
        [
            row.label,
            percent(row.values("val", "accuracy")),
            percent(row.values("test", "accuracy")),
            percent(row.values("test", "balanced_accuracy")),
            percent(row.values("test", "macro_f1")),
            f"{statistics.mean(row.values('training_seconds')):.1f}",
        ]
        for row in rows
    ]
    lines.append(["commonest class", "-", f"{100 * majority:.1f}", "-", "-", "-"])
    header = ["attention", "val accuracy", "test accuracy", "balanced accuracy", "macro F1", "training, s"]
    return _table(header, lines)


def _scale(options: Mapping[str, Any]) -> str:
    """What the scale of the attended map does to the comparison; nothing without a batch norm."""
    if not options["hidden_size"]:
        return ""
    text = _SAME_SCALE if options["attention_scale"] == "unit_mean" else _OTHER_SCALE
    return text.format(**options)


def _differences(rows: Sequence[Group]) -> str:
    """What guidance and each attention change, with its interval, in a sentence each."""
    plain = {row.attention: row for row in rows if not row.weight}
    pairs = [(row, plain[row.attention]) for row in rows if row.weight and row.attention in plain]
    pairs += [(row, plain["none"]) for name, row in plain.items() if name != "none" and "none" in plain]
    lines = []
    for ours, theirs in pairs:
        found = paired_difference(ours, theirs, "test", "accuracy")
        if found is None:
            continue
        mean, width = (100 * value for value in found)
        verdict = (
            "within the noise of the seeds" if abs(mean) <= width else "more than the noise of the seeds"
        )
        lines.append(f"* {ours.label} against {theirs.label}: {mean:+.1f} ± {width:.1f} points, {verdict}.")
    return "\n".join(lines)


def _localisation_table(rows: Sequence[Group]) -> str:
    first = rows[0].cells[0].get("localisation")
    if not first:
        return ""
    names = [name for name in MEASURES if name in first["grad_cam"]]
    lines = [
        [f"{kind} of {row.label}", *(percent(row.values("localisation", key, name)) for name in names)]
        for kind, key in (("Grad-CAM", "grad_cam"), ("attention", "attention"))
        for row in rows
        if row.values("localisation", key, names[0])
    ]
    for kind, key in (("a Gaussian around the centre", "centre"), ("a uniform map", "uniform")):
        if key in first:
            lines.append([kind, *(percent(rows[0].values("localisation", key, name)[:1]) for name in names)])
    return _table(["map", *(MEASURES[name] for name in names)], lines) + (
        "\n\nGrad-CAM is that of the label, on all test images; MaxBoxAccV2 over "
        f"{rows[0].cells[0]['options']['thresholds']} thresholds. The last lines know nothing of the image."
    )


def _sweep_table(groups: Sequence[Group]) -> str:
    lines = [
        [
            group.cam_norm if group.weight else "no guidance",
            f"{group.weight:g}" if group.weight else "0",
            percent(group.values("val", "accuracy")),
            percent(group.values("test", "accuracy")),
            percent(group.values("test", "macro_f1")),
            f"{_above_floor(group, 'after'):.3g}",
            f"{statistics.mean(group.values('beta', 'after', 'correlation')):+.2f}",
        ]
        for group in groups
        if group.attention == "channel_spatial"
    ]
    header = ["cam_norm", "lambda", "val accuracy", "test accuracy", "macro F1"]
    return _table([*header, "guidance above floor", "correlation of log S and beta"], lines)


def _above_floor(group: Group, when: str) -> float:
    guidance, floor = (statistics.mean(group.values("beta", when, name)) for name in ("guidance", "floor"))
    return guidance - floor


def _beta_table(groups: Sequence[Group], norms: Sequence[str], best: Mapping[str, float | None]) -> str:
    lines = []
    for norm in norms:
        for group in groups:
            if (group.attention, group.cam_norm, group.weight) != ("channel_spatial", norm, best[norm]):
                continue
            for when in ("before", "after"):

                def mean(name: str, when: str = when, group: Group = group) -> float:
                    return statistics.mean(group.values("beta", when, name))

                lines.append(
                    [
                        f"{norm}, lambda {group.weight:g}, {when} training",
                        f"{mean('median'):.1e}",
                        f"{mean('p90'):.1e}",
                        f"{mean('spread'):.1e}",
                        f"{mean('guidance'):.5g}",
                        f"{_above_floor(group, when):.3g}",
                        f"{mean('correlation'):+.2f}",
                    ]
                )
    header = ["guidance", "median abs. beta", "90 % quantile", "spread of b~", "guidance loss", "above floor"]
    return _table([*header, "correlation"], lines)
