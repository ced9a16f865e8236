"""An evaluation as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ggam_fast.training.measure.classification import confused_with
from ggam_fast.training.measure.localization import localisation_rows
from ggam_fast.training.show.figures import literal, new_figure, show_heat, show_image
from ggam_fast.training.system.files import write_atomically

_MATRIX_CLASSES = 40
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f3f4f6; --line: #d8dce2;
  --blue: 0 114 178; --red: 213 94 0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181c; --soft: #22262c;
  --line: #3a4049;  --blue: 86 180 233; --red: 230 159 0; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; }
.tile { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.matrix td, .matrix th { padding: .1rem .3rem; border: 0; font-size: .75rem; text-align: center; }
.matrix th:first-child { text-align: right; white-space: nowrap; }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  white-space: nowrap; }
figure { margin: 0 0 1rem; background: #ffffff; color: #1b1f24; border: 1px solid var(--line);
  border-radius: .5rem; padding: .5rem; display: inline-block; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .9rem; } .right { color: #00598c; } .wrong { color: #a84a00; }
.note { color: color-mix(in srgb, var(--ink) 70%, var(--paper)); font-size: .9rem; }
"""


class Example(NamedTuple):
    """One image of the report. `picture`: (H, W, 3) in [0, 1]; `maps`: (h, w) each, with their names."""

    file: str
    picture: Tensor
    label: str
    guess: str
    probability: float
    maps: Sequence[tuple[str, Tensor]]


def write_html(path: Path, results: dict[str, Any], examples: Sequence[Example]) -> None:
    """Write the page of `results`, what evaluation.json holds."""
    text = page(results, examples)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def page(results: dict[str, Any], examples: Sequence[Example]) -> str:
    """The page's HTML."""
    found = results["classification"]
    run = results["run"]
    title = f"{results['data']}, {results['split']} split"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{found['images']} images, {len(results['classes'])} classes. {escape(run['backbone']['name'])}, "
        f"{'fine-tuned' if run['finetune'] else 'frozen'}, with a GGAM head "
        f"(attention {escape(run['head']['attention'])}, "
        f"guidance weight {run['optim']['guidance_weight']:g}); "
        f"{results['weights']} weights.</p>",
        *(f"<p class='note'>{escape(note)}</p>" for note in results["notes"]),
        _tiles(found),
    ]
    if results["localisation"]:
        parts.append(_localisation(results))
    if results["faithfulness"]:
        parts.append(_faithfulness(results["faithfulness"]))
    if examples:
        parts += [
            "<h2>Pictures</h2><p class='note'>Each map has its own colours, dark for its lowest value.</p>",
            *(_example(example) for example in examples),
        ]
    parts += [_classes(found, results["classes"]), _confusion(found["confusion"], results["classes"])]
    parts.append(f"<p class='note'>{escape(results['device'])}; {escape(versions)}.</p>")
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _tiles(found: dict[str, Any]) -> str:
    tiles = (
        ("accuracy", f"{100 * found['accuracy']:.1f} %"),
        ("always the commonest class", f"{100 * found['majority']:.1f} %"),
        ("top-5 accuracy", f"{100 * found['top5']:.1f} %"),
        ("balanced accuracy", f"{100 * found['balanced_accuracy']:.1f} %"),
        ("macro F1", f"{100 * found['macro_f1']:.1f} %"),
        ("calibration error", f"{found['calibration_error']:.3f}"),
    )
    inner = "".join(f"<div class='tile'><b>{value}</b>{name}</div>" for name, value in tiles)
    return f"<div class='tiles'>{inner}</div>"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An HTML table; everything is escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in line)}</tr>" for line in lines)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _localisation(results: dict[str, Any]) -> str:
    return (
        f"<h2>Where it looks, against {escape(results['localised_against'])}</h2>"
        + table(*localisation_rows(results["localisation"]))
        + "<p class='note'>In percent; the last lines know nothing of the image. Pointing game: the "
        "map's peak lies on the object (or at most 15 pixels away). Energy: share of the map's sum on "
        f"the object. MaxBoxAccV2 over {results['thresholds']} thresholds. Part hits: the peak lies "
        "within a tenth of the box's longer side of a visible part.</p>"
    )


def _faithfulness(found: dict[str, Any]) -> str:
    figure = new_figure(9, 3.1)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("insertion", "deletion"), strict=True):
        for (name, both), line in zip(found["maps"].items(), ("-", "--", ":"), strict=False):
            curve = both[kind]["curve"]
            share = np.linspace(0, 100, len(curve))
            axes.plot(share, curve, line, linewidth=1.8, label=f"{name} ({both[kind]['area']:.3f})")
        axes.set_xlabel(f"pixels {'shown' if kind == 'insertion' else 'blanked'}, %")
        axes.set_title(f"{kind} (area under the curve)", fontsize=10)
        axes.set_ylim(0, 1)
        axes.grid(color="0.9")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("probability of the prediction")
    return (
        "<h2>Whether those pixels matter</h2>"
        + _image(figure, "insertion and deletion curves")
        + f"<p class='note'>Means over {found['images']} images spread over the split. Insertion "
        "uncovers the hottest pixels of a blurred image first: higher is better. Deletion blanks them "
        "first: lower is better.</p>"
    )


def _example(example: Example) -> str:
    panels = 1 + len(example.maps)
    figure = new_figure(2.5 * panels, 2.75)
    axes = figure.subplots(1, panels)
    show_image(axes[0], example.picture)
    axes[0].set_xlabel("image", fontsize=9)
    for place, (name, heat) in enumerate(example.maps, 1):
        show_heat(axes[place], example.picture, heat)
        axes[place].set_xlabel(literal(name), fontsize=9)
    right = example.label == example.guess
    verdict = f"✓ {example.label}" if right else f"✗ {example.label}, predicted {example.guess}"
    caption = (
        f"<figcaption><b class='{'right' if right else 'wrong'}'>{escape(verdict)}</b> "
        f"with {100 * example.probability:.0f} %, {escape(example.file)}</figcaption>"
    )
    return _image(figure, verdict, caption)


def _image(figure: Figure, text: str, caption: str = "") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 88})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"<figure><img alt='{escape(text)}' src='data:image/jpeg;base64,{encoded}'>{caption}</figure>"


def _classes(found: dict[str, Any], classes: Sequence[str]) -> str:
    lines = []
    for index, name in enumerate(classes):
        support = found["support"][index]
        lines.append(
            [
                name,
                str(support),
                f"{100 * found['recall'][index]:.1f}" if support else "-",
                confused_with(found["confusion"], index, classes),
            ]
        )
    return "<h2>Classes</h2>" + table(["class", "images", "recall, %", "most confused with"], lines)


def _confusion(matrix: list[list[int]], classes: Sequence[str]) -> str:
    """The matrix with counts in it or, of many classes, its largest mistakes."""
    if len(classes) > _MATRIX_CLASSES:
        mistakes = sorted(
            (
                (count, classes[row], classes[column])
                for row, line in enumerate(matrix)
                for column, count in enumerate(line)
                if count and row != column
            ),
            reverse=True,
        )[:_MATRIX_CLASSES]
        lines = [[label, guess, str(count)] for count, label, guess in mistakes]
        return "<h2>Most frequent mistakes</h2>" + table(["class", "predicted", "images"], lines)
    head = "".join(f"<th>{escape(name)}</th>" for name in classes)
    body = []
    for row, line in enumerate(matrix):
        total = max(sum(line), 1)
        cells = "".join(
            f"<td style='background: rgb(var(--{'blue' if row == column else 'red'}) / "
            f"{0.75 * count / total:.2f})'>{count or ''}</td>"
            for column, count in enumerate(line)
        )
        body.append(f"<tr><th>{escape(classes[row])}</th>{cells}</tr>")
    return (
        "<h2>Confusion matrix</h2><p class='note'>A line is a true class, a column a prediction.</p>"
        f"<div class='wide'><table class='matrix'><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
