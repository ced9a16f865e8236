"""The report of an ablation has the numbers of its cells."""

import json
from dataclasses import replace

import pytest

from ggam_fast.training.ablation.group import Comparison, Group
from ggam_fast.training.ablation.report import _verdicts
from ggam_fast.training.ablation.study import ablate
from ggam_fast.training.measure.seeds import Difference


@pytest.mark.parametrize(
    ("scale", "words"),
    [("unit_mean", "eps of 0.5 therefore acts alike"), ("printed", "differ in the effect of that eps")],
)
def test_the_report_says_what_the_eps_of_the_norm_means(study, report, scale, words):
    rows = {"attentions": ("none", "spatial"), "seeds": (1,), "attention_scale": scale, "norm_eps": 0.5}
    assert ablate(replace(study, study=replace(study.study, **rows, hidden_size=4)), report, "")
    assert words in (study.study.out / "report.md").read_text()
    for path in (study.study.out / "cells").iterdir():
        options = json.loads(path.read_text())["options"]
        assert (options["attention_scale"], options["norm_eps"]) == (scale, 0.5)
    numbers = json.loads((study.study.out / "report.json").read_text())
    assert [row["seeds"] for row in numbers["table"]] == [[1], [1]]
    assert 0 <= numbers["table"][0]["test.calibration_error"][0] <= 1


def test_what_is_shown_is_said_in_words():
    plain, guided = Group("spatial", "none", 0.0, []), Group("spatial", "positions", 3.0, [])
    found = [
        Comparison(guided, plain, "accuracy", Difference(0.01, 0.03, 0.4, 5), 0.8),
        Comparison(guided, plain, "negative log likelihood", Difference(-0.05, 0.01, 0.001, 5), 0.004),
    ]
    text = _verdicts(found)
    assert text == "* **spatial + positions** against spatial: negative log likelihood -0.050 ± 0.010 nats."
    silent = _verdicts(found[:1])
    assert silent == "* No difference is shown for spatial + positions (against spatial)."
