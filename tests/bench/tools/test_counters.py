"""The parser of ncu's output, which needs no GPU."""

import pytest

from bench.suite.cases import Case
from bench.tools import counters

NCU = f"""==PROF== Connected to process 1
"ID","Process ID","Kernel Name","{counters.READ}","{counters.WRITTEN}","{counters.TIME}"
"","","","byte","byte","ns"
"0","1","forward_kernel","102,760,448","1,027,604.48","41,000"
"1","1","void other<float>(int, int)","51380224","0","2000"
"""


def test_counters_of_ncu() -> None:
    found = counters.parse(NCU)
    assert [k.name for k in found] == ["forward_kernel", "void other<float>(int, int)"]
    lines = list(counters.table(Case(128, 2048, 14, 14), "step", found))
    assert lines[0][2:] == ("forward_kernel", "1.000", "0.010", "41.00")
    assert lines[-1][2:] == ("all", "1.500", "0.010", "43.00")


@pytest.mark.parametrize(
    ("text", "message"), [("==ERROR== no", "no table"), ('"ID","Kernel Name"\n', "it lacks")]
)
def test_no_counters(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counters.parse(text)
