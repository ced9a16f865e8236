"""The page of an evaluation needs no other file and shows names as text."""

import json
import re
from html.parser import HTMLParser

import pytest

from ggam_fast.training.run.train import train
from ggam_fast.training.show.page import page
from ggam_fast.training.use.evaluate import EvaluateConfig, evaluate_run
from tests.training.runs import said


class Page(HTMLParser):
    """Collects the text of an HTML page and the addresses in it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_else_and_escapes_names(trained, photos, report, tmp_path):
    out = tmp_path / "looked"
    evaluate_run(EvaluateConfig(run=trained, out=out, device="cpu", faithfulness=2, steps=1), report)
    text = (out / "evaluation.html").read_text()
    shown = Page(text)
    assert shown.references
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in shown.references)
    assert not {"script", "link", "iframe"} & set(shown.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    # The page has one picture of the curves and one of every test image.
    assert shown.tags.count("img") == 1 + 6
    found = json.loads((out / "evaluation.json").read_text())
    assert found["localisation"] == {}
    assert "has no annotations of objects" in said(report)
    assert f"{100 * found['classification']['accuracy']:.1f} %" in shown.text
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "evaluation.html"}


def test_names_are_text(photos, tiny_config, report, tmp_path):
    strange = "<img src=x>&amp;'"
    (photos / "red").rename(photos / strange)
    train(tiny_config, report)
    evaluate_run(EvaluateConfig(run=tiny_config.run.out, device="cpu", faithfulness=0), report)
    shown = Page((tiny_config.run.out / "evaluation.html").read_text())
    assert "x" not in shown.references
    assert strange in shown.text


def results(classes: int) -> dict:
    """The content of evaluation.json for a run without heat maps, with three kinds of predictions."""
    confusion = [[0] * classes for _ in range(classes)]
    confusion[3][7], confusion[8][2], confusion[5][5] = 4, 9, 20
    shares = dict.fromkeys(("accuracy", "majority", "top5", "balanced_accuracy", "macro_f1"), 0.25)
    return {
        "classification": {
            **shares,
            **{"images": 33, "calibration_error": 0.5, "recall": [0.25] * classes},
            **{"support": [0, *[1] * (classes - 1)], "confusion": confusion},
        },
        "run": {
            **{"backbone": {"name": "net"}, "head": {"attention": "channel"}, "finetune": True},
            "optim": {"guidance_weight": 1e-3},
        },
        **{"weights": "last", "data": "photos", "split": "test", "notes": ["a & b"], "device": "cpu"},
        "classes": [f"class {index}" for index in range(classes)],
        **{"localisation": {}, "faithfulness": None, "versions": {"torch": "2", "timm": "1"}},
    }


def test_many_classes_have_a_list_of_mistakes():
    shown = Page(page(results(50), [])).text
    cells = [word for word in shown[shown.index("Most frequent mistakes") :] if word.strip()]
    assert cells[4:10] == ["class 8", "class 2", "9", "class 3", "class 7", "4"]
    assert "Confusion matrix" not in shown


def test_few_classes_have_a_matrix_that_says_shares_by_colour():
    text = page(results(10), [])
    assert 'rgb(var(--blue) / 0.75)">20</td>' in text
    assert 'rgb(var(--red) / 0.75)">9</td>' in text
    assert text.count("<td style=") == 100
    assert "Most frequent mistakes" not in text


def test_what_was_measured_is_what_is_shown():
    found = results(10)
    text = page(found, [])
    assert "a &amp; b" in text
    assert "guidance weight 0.001" in text
    assert "--blue: 0 114 178; --red: 213 94 0;" in text
    assert "cpu; torch 2, timm 1." in text
    assert "Where it looks" not in text
    assert "<td>class 3</td><td>1</td><td>25.0</td><td>class 7 (4)</td>" in text
    assert "<td>class 0</td><td>0</td><td>-</td><td>-</td>" in text
    found["localisation"] = {"attention": {"energy": 0.5}}
    found["localised_against"], found["thresholds"] = "boxes", 7
    assert "<td>attention</td><td>50.0</td>" in page(found, [])
    del found["classification"]["top5"]
    with pytest.raises(KeyError):
        page(found, [])
