"""The page of an evaluation needs no other file and shows names as text."""

import json
import re
from html.parser import HTMLParser

from ggam_fast.training.run.train import train
from ggam_fast.training.use.evaluate import EvaluateConfig, evaluate_run


class Page(HTMLParser):
    """What an HTML page shows and refers to."""

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
    page = Page(text)
    assert page.references
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    # One picture of the curves, and every test image.
    assert page.tags.count("img") == 1 + 6
    found = json.loads((out / "evaluation.json").read_text())
    assert found["localisation"] == {}
    assert "says nothing of where objects are" in report.console.file.getvalue()
    assert f"{100 * found['classification']['accuracy']:.1f} %" in page.text
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "evaluation.html"}


def test_names_are_text(photos, tiny_config, report, tmp_path):
    strange = "<img src=x>&amp;'"
    (photos / "red").rename(photos / strange)
    train(tiny_config, report)
    evaluate_run(EvaluateConfig(run=tiny_config.run.out, device="cpu", faithfulness=0), report)
    page = Page((tiny_config.run.out / "evaluation.html").read_text())
    assert "x" not in page.references
    assert strange in page.text


def test_many_classes_have_a_list_of_mistakes():
    from ggam_fast.training.show.page import _confusion

    names = [f"class {index}" for index in range(50)]
    matrix = [[0] * 50 for _ in names]
    matrix[3][7], matrix[8][2], matrix[5][5] = 4, 9, 20
    text = Page(_confusion(matrix, names)).text
    cells = [word for word in text if word.startswith("class ") or word.isdigit()]
    assert cells == ["class 8", "class 2", "9", "class 3", "class 7", "4"]
