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
A seed decides the initial weights and the order of the batches. All runs have the same splits and the same
number of epochs. Numbers are the mean ± the standard deviation over seeds, in percent unless said otherwise.
A difference is taken between runs with the same seed. Its interval is the 95 % interval of Student's t.
Lambda is the value with the best mean validation accuracy. Test images were not used to choose it."""
_NO_GUIDED_ROW = """\
Without channel attention S is always 1/C, so guidance cannot change it. `none` and `spatial` therefore have
no row with guidance."""
_SAME_SCALE = """\
In every row the attention weights average to one, so the features have the scale of plain pooling. The first
batch norm's eps of {norm_eps:g} therefore acts alike in all rows."""
_OTHER_SCALE = """\
The attention weights have the scale that the paper prints. Attention then makes features smaller than plain
pooling does, so the first batch norm's eps of {norm_eps:g} acts more strongly in those rows. It acts L^2
times as strongly where the weights sum to one over L positions, and C^2 times for `channel`. Two rows with
different attention therefore also differ in the effect of that eps. `--attention-scale unit_mean` removes
this difference."""
_BETA = """\
All columns are means over the validation images. *Spread* is the standard deviation of b~ over channels,
divided by its mean. Near 0, b~ is the same for every channel and does not depend on the image. *Above floor*
is the guidance loss of an image minus the least loss that any S could reach for its b~. No training can lower
that floor. It is (Q - 1) log(Q) / 2 at S = b~/Q, where Q is the sum of b~. *Correlation* is that of log S and
beta over channels."""
_CONTEXT = """\
The history of the authors' README has top-1 accuracies of ResNet-50 on CUB-200-2011, in percent. They are
only indicative, because its tables disagree. Without guidance: fine-tuning 85.1, spatial 85.60, channel
85.39, both 86.86. With Grad-CAM guidance: baseline 85.3, spatial 86.58, channel 86.26. The authors fine-tuned
whole networks on 200 classes of birds. Here at most its last layers are trained, and the data are different.
At most the sign of a difference can be compared, not its size."""


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
    """The paper's table: each attention without guidance, and with guidance where that was run."""
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
    tuned = f"fine-tuned from {since} on" if (since := about.get("finetune_from")) else "frozen"
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    parts = [
        f"# Ablation on {about['data']}",
        "" if about["finished"] else "**Unfinished: some cells are missing.**",
        f"{splits} images of {len(about['classes'])} classes. Backbone {about['backbone']}, {tuned}. "
        f"{cell['options']['epochs']} epochs. Device: {about['device']}. Versions: {versions}.",
        "\n".join(f"* {note}" for note in about["notes"]),
        f"```\n{about['command']}\n```",
        f"Seeds {', '.join(map(str, seeds))}. " + _METHOD,
        "Chosen lambda: " + ", ".join(f"{norm} {weight:g}" for norm, weight in best.items() if weight) + ".",
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
    lines.append(["most common class", "-", f"{100 * majority:.1f}", "-", "-", "-"])
    header = ["attention", "val accuracy", "test accuracy", "balanced accuracy", "macro F1", "training, s"]
    return _table(header, lines)


def _scale(options: Mapping[str, Any]) -> str:
    """How the scale of the attended map affects the comparison. Without a batch norm it has no effect."""
    if not options["hidden_size"]:
        return ""
    text = _SAME_SCALE if options["attention_scale"] == "unit_mean" else _OTHER_SCALE
    return text.format(**options)


def _differences(rows: Sequence[Group]) -> str:
    """A line for each effect of guidance and of attention: the difference and its interval."""
    plain = {row.attention: row for row in rows if not row.weight}
    pairs = [(row, plain[row.attention]) for row in rows if row.weight and row.attention in plain]
    pairs += [(row, plain["none"]) for name, row in plain.items() if name != "none" and "none" in plain]
    lines = []
    for ours, theirs in pairs:
        found = paired_difference(ours, theirs, "test", "accuracy")
        if found is None:
            continue
        mean, width = (100 * value for value in found)
        verdict = "the interval includes 0" if abs(mean) <= width else "the interval excludes 0"
        lines.append(f"* {ours.label} against {theirs.label}: {mean:+.1f} ± {width:.1f} points; {verdict}.")
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
        "\n\nThe table covers all test images, with the Grad-CAM of each label. MaxBoxAccV2 takes "
        f"{rows[0].cells[0]['options']['thresholds']} thresholds. The last lines do not depend on the image."
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
