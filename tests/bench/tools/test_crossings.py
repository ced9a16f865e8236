"""Calls between the files of a package that is made for the test."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.tools import crossings


def test_crossings_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "crossed"
    (package / "kernels").mkdir(parents=True)
    sources = {
        "__init__": "",
        "upper": "from . import lower\ndef f():\n lower.g()\n h()\n max([1], key=lower.g)\ndef h(): 0",
        "lower": "from .kernels import n\ndef g(x=0): return k(n(x))\ndef k(x): return x",
        "kernels/__init__": "def n(x): return x",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    from crossed import upper  # type: ignore[import-not-found]

    found = crossings.crossings(upper.f, package)  # upper.f, lower.g, lower.k, upper.h, lower.g, lower.k
    assert found.times == 3
    assert {Path(file).name for file in found.files} == {"upper.py", "lower.py"}
    assert sys.getprofile() is None
    assert crossings.judged("toy", "replayed", found).startswith("met ")
    assert crossings.judged("toy", "replayed", found._replace(times=31)).startswith("MISSED ")
