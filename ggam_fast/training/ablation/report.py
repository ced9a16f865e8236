"""The report of an ablation, from its finished cells: Markdown, JSON and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ggam_fast.training.ablation.group import Comparison, Group, comparisons, grouped
from ggam_fast.training.ablation.guidances import GUIDANCES
from ggam_fast.training.ablation.plots import draw_choice, draw_mechanism, draw_side_by_side, draw_table
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.measure.localization import MEASURES
from ggam_fast.training.system.files import write_atomically

REPORT, NUMBERS = "report.md", "report.json"
_SHOWN = 0.05
_METHOD = """\
A seed decides the initial weights and the order of the batches. All runs have the same splits and the same
number of epochs. Numbers are the mean ± the standard deviation over seeds, in percent unless said otherwise.
Where several values of lambda were given, it is the one with the best mean validation accuracy of the seeds
{choice}. None of these seeds is in the table, and test images were not used to choose."""
_COMPARED = """\
A difference is taken between runs with the same seed. Its interval is the 95 % interval of Student's t. p is
that of a paired t-test after Holm's correction over all {count} comparisons of this table. A difference is
*shown* if p is below 0.05."""
_SAME_SCALE = """\
In every row the attention weights average to one, so the features have the scale of plain pooling. The first
batch norm's eps of {norm_eps:g} therefore acts alike in all rows."""
_OTHER_SCALE = """\
The attention weights have the scale that the paper prints. Attention then makes features smaller than plain
pooling does, so the first batch norm's eps of {norm_eps:g} acts more strongly in those rows. It acts L^2
times as strongly where the weights sum to one over L positions, and C^2 times for `channel`. Two rows with
different attention therefore also differ in the effect of that eps. `--attention-scale unit_mean` removes
this difference."""
_MECHANISM = """\
All columns are means over the validation images. *S and beta*: correlation of log S and beta over channels.
*T and class map*: correlation of T and the class activation map over positions. *Entropy*: as a share of the
uniform distribution's; 1 is uniform. *Spread*: standard deviation of b~ over channels, divided by its mean.
Near 0, b~ is the same for every channel and does not depend on the image. *Above floor*: the guidance loss of
an image minus the least loss that any S could reach for its b~."""
_CONTEXT = """\
The history of the authors' README has top-1 accuracies of ResNet-50 on CUB-200-2011, in percent. They are
only indicative, because its tables disagree. Without guidance: fine-tuning 85.1, spatial 85.60, channel
85.39, both 86.86. With Grad-CAM guidance: baseline 85.3, spatial 86.58, channel 86.26. The authors fine-tuned
whole networks on 200 classes of birds. Here at most its last layers are trained, and the data are different.
At most the sign of a difference can be compared, not its size."""
_MEASURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("accuracy", ("test", "accuracy")),
    ("negative log likelihood", ("test", "nll")),
    ("accuracy in other surroundings", ("shifted", "accuracy")),
    ("pointing game of attention", ("localisation", "attention", "pointing")),
    ("pointing game of Grad-CAM", ("localisation", "grad_cam", "pointing")),
)


def write_report(
    out: Path, about: dict[str, Any], results: Sequence[dict[str, Any]], images: ImageSet | None
) -> list[Path]:
    """Write the report into `out` and return the paths. Photographs are drawn only if `images` is given."""
    rows = grouped(results, about["seeds"])
    tried = grouped(results, about["choice_seeds"])
    compared = comparisons(rows, *_MEASURES)
    paths = [out / REPORT, out / NUMBERS]
    text = markdown(about, rows, tried, compared, images is not None)
    write_atomically(paths[0], lambda part: part.write_text(text))
    numbers = {
        "about": about,
        "table": [numbers_of(group) for group in rows],
        "choice": [numbers_of(group) for group in tried],
        "comparisons": [
            {
                "ours": (one.ours.attention, one.ours.guidance),
                "theirs": (one.theirs.attention, one.theirs.guidance),
                "measure": one.measure,
                **one.difference._asdict(),
                "holm_p": one.p,
            }
            for one in compared
        ],
    }
    write_atomically(paths[1], lambda part: part.write_text(json.dumps(numbers, indent=1) + "\n"))
    drawings: list[tuple[str, Callable[[Path], bool]]] = []
    if rows:
        drawings += [
            ("table.png", lambda path: draw_table(path, rows)),
            ("mechanism.png", lambda path: draw_mechanism(path, rows)),
        ]
    drawings.append(("choice.png", lambda path: draw_choice(path, tried)))
    if images is not None and rows:
        sides = about["preprocessing"]
        drawings.append(("side_by_side.jpg", lambda path: draw_side_by_side(path, rows, images, sides)))
    return paths + [out / name for name, draw in drawings if draw(out / name)]


def numbers_of(group: Group) -> dict[str, Any]:
    """Every number of a group, with one value per seed."""
    found: dict[str, Any] = {
        "attention": group.attention,
        "guidance": group.guidance,
        "weight": group.weight,
        "seeds": [cell["cell"]["seed"] for cell in group.cells],
        "training_seconds": group.values("training_seconds"),
    }
    for section in ("val", "test", "shifted", "localisation", "mechanism"):
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
    rows: Sequence[Group],
    tried: Sequence[Group],
    compared: Sequence[Comparison],
    pictures: bool = True,
) -> str:
    """The whole report as Markdown. With `pictures`, it shows photographs too."""
    cell = [*rows, *tried][0].cells[0]
    splits = ", ".join(f"{count} {name}" for name, count in about["splits"].items())
    tuned = f"fine-tuned from {since} on" if (since := about["finetune_from"]) else "frozen"
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    done, count = about["cells"]
    parts = [
        f"# Ablation on {about['data']}",
        "" if about["finished"] else f"**Unfinished: {done} of {count} cells are there.**",
        f"{splits} images of {len(about['classes'])} classes. Backbone {about['backbone']}, {tuned}. "
        f"{cell['options']['epochs']} epochs. Device: {about['device']}. Versions: {versions}.",
        "\n".join(f"* {note}" for note in about["notes"]),
        f"```\n{about['command']}\n```",
        f"Seeds {_listed(about['seeds'])}. "
        + _METHOD.format(choice=_listed(about["choice_seeds"]) or "that were tried"),
    ]
    if rows:
        parts += ["## Attention and guidance", _accuracy_table(rows), _scale(cell["options"])]
        parts.append("![accuracy of every seed](table.png)")
    if compared:
        parts += ["## What is shown", _verdicts(compared), _COMPARED.format(count=len(compared))]
        parts.append(_comparison_table(compared))
    localisation = _localisation_table(rows)
    if localisation:
        parts += ["## Localisation", localisation]
    if pictures and rows:
        parts.append("![Grad-CAM of every variant](side_by_side.jpg)")
    if any(group.weight for group in tried):
        parts += ["## The choice of lambda", _choice_table(tried), "![choice of lambda](choice.png)"]
    if rows:
        parts += ["## What guidance changed", _mechanism_table(rows), _MECHANISM]
        parts.append("![S, T and beta before and after training](mechanism.png)")
    parts += ["## Context", _CONTEXT]
    return "\n\n".join(part for part in parts if part) + "\n"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation of shares, in percent."""
    return _spread([100 * value for value in values], 1)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _accuracy_table(rows: Sequence[Group]) -> str:
    majority = rows[0].values("test", "majority")[0]
    lines = [
        [
            row.label,
            f"{row.weight:g}" if row.weight else "-",
            str(len(row.cells)),
            percent(row.values("test", "accuracy")),
            percent(row.values("test", "balanced_accuracy")),
            _spread(row.values("test", "nll"), 3),
            percent(row.values("test", "calibration_error")),
            percent(row.values("shifted", "accuracy")),
            f"{statistics.mean(row.values('training_seconds')):.0f}",
        ]
        for row in rows
    ]
    lines.append(["most common class", "-", "-", f"{100 * majority:.1f}", "-", "-", "-", "-", "-"])
    header = ["attention and guidance", "lambda", "seeds", "test accuracy", "balanced accuracy"]
    header += ["negative log likelihood, nats", "calibration error", "in other surroundings", "training, s"]
    return _table(header, lines)


def _scale(options: Mapping[str, Any]) -> str:
    """How the scale of the attended map affects the comparison. Without a batch norm it has no effect."""
    if not options["hidden_size"]:
        return ""
    text = _SAME_SCALE if options["attention_scale"] == "unit_mean" else _OTHER_SCALE
    return text.format(**options)


def _verdicts(compared: Sequence[Comparison]) -> str:
    """In words: which differences are shown, and of which pairs none is."""
    lines, silent = [], []
    for pair in dict.fromkeys((one.ours.label, one.theirs.label) for one in compared):
        shown = [
            f"{one.measure} {_signed(one)}"
            for one in compared
            if (one.ours.label, one.theirs.label) == pair and one.p < _SHOWN
        ]
        if shown:
            lines.append(f"* **{pair[0]}** against {pair[1]}: {'; '.join(shown)}.")
        else:
            silent.append(f"{pair[0]} (against {pair[1]})")
    if silent:
        lines.append(f"* No difference is shown for {'; '.join(silent)}.")
    return "\n".join(lines)


def _signed(one: Comparison) -> str:
    mean, width, *_ = one.difference
    if one.measure == "negative log likelihood":
        return f"{mean:+.3f} ± {width:.3f} nats"
    return f"{100 * mean:+.1f} ± {100 * width:.1f} points"


def _comparison_table(compared: Sequence[Comparison]) -> str:
    lines = [
        [
            one.ours.label,
            one.theirs.label,
            one.measure,
            _signed(one),
            str(one.difference.seeds),
            f"{one.difference.p:.2g}",
            f"{one.p:.2g}",
            "shown" if one.p < _SHOWN else "not shown",
        ]
        for one in compared
    ]
    return _table(["row", "against", "measure", "difference", "seeds", "p", "p, Holm", "verdict"], lines)


def _localisation_table(rows: Sequence[Group]) -> str:
    first = rows[0].cells[0].get("localisation") if rows else None
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


def _choice_table(tried: Sequence[Group]) -> str:
    lines = [
        [
            group.label,
            f"{group.weight:g}",
            percent(group.values("val", "accuracy")),
            _spread(group.values("val", "nll"), 3),
        ]
        for group in tried
        if group.weight
    ]
    return _table(
        ["attention and guidance", "lambda", "val accuracy", "val negative log likelihood, nats"], lines
    )


def _mechanism_table(rows: Sequence[Group]) -> str:
    def mean(row: Group, name: str, when: str = "after") -> float:
        return statistics.mean(row.values("mechanism", when, name))

    lines = [
        [
            row.label,
            f"{mean(row, 's_beta'):+.2f}",
            f"{mean(row, 't_class_map'):+.2f}",
            f"{mean(row, 's_entropy'):.3f}",
            f"{mean(row, 't_entropy'):.3f}",
            f"{mean(row, 'median'):.1e}",
            f"{mean(row, 'spread'):.1e}",
            f"{mean(row, 'guidance') - mean(row, 'floor'):.3g}" if GUIDANCES[row.guidance].channels else "-",
        ]
        for row in rows
        if row.attention != "none"
    ]
    header = ["attention and guidance", "S and beta", "T and class map", "entropy of S", "entropy of T"]
    return _table([*header, "median abs. beta", "spread of b~", "above floor"], lines)
