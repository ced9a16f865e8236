"""The page of an evaluation needs no other file and shows names as text."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from ggam_fast.training.run.train import train
from ggam_fast.training.show.page import Example, Seen, page
from ggam_fast.training.use.evaluate import EvaluateConfig, evaluate_run
from tests.training.runs import said
from tests.training.show.pages import full_page, results


class Page(HTMLParser):
    """Collects the text of an HTML page and the addresses in it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.text, self.pictures = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag == "img":
            self.pictures.append(dict(attributes)["alt"])

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_else_and_escapes_names(trained, photos, report, tmp_path):
    out = tmp_path / "looked"
    config = EvaluateConfig(run=trained, out=out, device="cpu", faithfulness=2, insertion_steps=1)
    evaluate_run(config, report)
    text = (out / "evaluation.html").read_text()
    shown = Page(text)
    assert {reference.split(";")[0] for reference in shown.references if reference[0] != "#"} == {
        *("data:image/jpeg", "data:image/svg+xml"),
    }
    assert not {"link", "iframe"} & set(shown.tags)
    assert not re.search(r"https?:|url\(|@import|fetch\(", text)
    for name in ("losses", "accuracies", "reliability diagram", "insertion curves", "deletion curves"):
        assert sum(name in picture for picture in shown.pictures) == 1
    # Every test image has its picture, its attention and the Grad-CAM of each class in question.
    assert sum(picture.endswith(".png: attention") for picture in shown.pictures) == 6
    assert all(shown.pictures)
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


def test_many_classes_have_a_list_of_mistakes():
    shown = Page(page(results(50), [])).text
    cells = [word for word in shown[shown.index("Most frequent mistakes") :] if word.strip()]
    assert cells[4:10] == ["class 8", "class 2", "9", "class 3", "class 7", "4"]
    assert "Confusion matrix" not in shown


def test_few_classes_have_a_matrix_that_says_shares_by_colour():
    text = page(results(10), [])
    assert 'rgb(var(--blue) / 0.75)">20</td>' in text
    assert 'rgb(var(--red) / 0.75)">9</td>' in text
    assert "<h2>Confusion matrix</h2>" in text
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
    lines = [re.findall(r">([^<>]+)<", line) for line in text.split("<tr>")]
    assert ["class 3", "1", "-", "25.0", "25.0", "class 7 (4)"] in lines
    assert ["class 7", "1", "25.0", "25.0", "25.0", "-"] in lines
    assert ["class 0", "0", "-", "-", "-", "-"] in lines
    assert '<b>25.0 %</b>accuracy<span class="note">20.0 to 30.0 %</span>' in text
    assert '<b>25.0 %</b>macro F1<span class="note">10.0 to 40.0 %</span>' in text
    assert "<b>0.500</b>calibration error</div>" in text
    found["localisation"] = {"attention": {"energy": 0.5}}
    found["localised_against"], found["thresholds"] = "boxes", 7
    assert re.search(r">attention</th>\s*<td>50.0</td>", page(found, []))
    del found["classification"]["top5"]
    with pytest.raises(KeyError):
        page(found, [])


def test_pictures_and_rows_belong_together():
    torch.manual_seed(0)
    seen = [Seen("a.png", "class 1", "class 2", 0.8, 0.1), Seen("b.png", "class 1", "class 1", 0.7, 0.7)]
    cams = {"class 1": torch.rand(2, 2), "class 2": torch.zeros(2, 2)}
    text = page(results(10), seen, [Example(0, torch.rand(8, 8, 3), None, cams)])
    shown = Page(text)
    assert shown.pictures[-3:] == [
        "a.png: image",
        "a.png: Grad-CAM of the class class 1",
        "a.png: Grad-CAM of the prediction class 2: no positive evidence",
    ]
    assert "#image-0" in shown.references  # from the row of the table
    assert "#image-1" not in shown.references
    assert "Other images" not in text
    assert 'value="attention"' not in text
    assert "✗ class 1, predicted class 2" in text


def test_the_rows_of_a_huge_split_are_those_of_the_worst_images(monkeypatch):
    monkeypatch.setattr("ggam_fast.training.show.page._ROWS", 10)
    text = full_page()
    assert "These are the 10 of 33 images whose class has the lowest probability." in text
    assert text.count("data-verdict=") == 10
    assert "009.png" in text
    assert "010.png" not in text
