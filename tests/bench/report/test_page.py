"""docs/performance.md shows the numbers of the result files."""

import re

import pytest

from bench.measure import records
from bench.report import page


def test_the_page_is_not_stale() -> None:
    text, new = page.PAGE.read_text(), page.block(page.result_files())
    assert page.replaced(text, new) == text, "run python -m bench.report"
    for link in re.findall(r"\]\(([^)]+)\)", new):
        assert (page.PAGE.parent / link).exists(), f"{link} is linked but missing: run python -m bench.report"


def test_host_times_are_committed() -> None:
    assert (records.RESULTS / page.HOST).exists(), "python -m bench.host --compile --json FILE"


@pytest.mark.parametrize("text", ["", page.BEGIN, f"{page.END}{page.BEGIN}", f"{page.BEGIN}{page.END}" * 2])
def test_a_page_without_the_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the page must have one"):
        page.replaced(text, "")
