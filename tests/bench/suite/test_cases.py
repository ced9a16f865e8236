"""The cases: their text, and the runs of the default and the full grid."""

import pytest
import torch

from bench.suite.cases import Case, Run, cpu_default, gpu_cases, gpu_default, gpu_full


@pytest.mark.parametrize("case", [*gpu_cases((1, 32)), Case(2, 3, 4, 5, torch.float64)], ids=str)
def test_case_text(case: Case) -> None:
    assert Case.parse(str(case)) == case


@pytest.mark.parametrize(
    "text", ["", "32x2048x14", "32x2048x14x14-half-nchw-", "1x2x3x4-bfloat16-chwn", "1x2x3x4-int"]
)
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(ValueError, match="a case must be"):
        Case.parse(text)


def test_the_default_is_part_of_the_full_grid() -> None:
    full, default = set(gpu_full()), list(dict.fromkeys(gpu_default()))
    assert set(default) <= full
    steps = {r.case for r in full if r.run == "step"}
    assert steps == {r.case for r in full if r.run == "beta"} == set(gpu_cases())
    headline = {r.case for r in default if r.run == "step" and r.provider == "fused"}
    assert headline >= set(gpu_cases(dtypes=(torch.bfloat16,)))


def test_nothing_is_timed_twice() -> None:
    for runs in (list(gpu_full()), list(cpu_default())):
        assert len(runs) == len(set(runs)) == len({str(r) for r in runs})
    assert str(Run(Case(1, 2, 3, 4), "fwd", "eager")) == "1x2x3x4-bfloat16-nchw-fwd-eager"
