"""The report of an ablation has the numbers of its cells."""

import json
from dataclasses import replace

import pytest

from ggam_fast.training.ablation.study import (
    ablate,
)


@pytest.mark.parametrize(
    ("scale", "words"),
    [("unit_mean", "eps of 0.5 therefore acts alike"), ("printed", "differ in the effect of that eps")],
)
def test_the_report_says_what_the_eps_of_the_norm_means(study, report, scale, words):
    rows = {"attentions": ("none", "spatial"), "seeds": (0,), "attention_scale": scale, "norm_eps": 0.5}
    assert ablate(replace(study, study=replace(study.study, **rows, hidden_size=4)), report, "")
    assert words in (study.study.out / "report.md").read_text()
    for path in (study.study.out / "cells").iterdir():
        options = json.loads(path.read_text())["options"]
        assert (options["attention_scale"], options["norm_eps"]) == (scale, 0.5)
