"""The pictures of a file."""

from pathlib import Path

import pytest

from bench.measure import records
from bench.report.results import Results
from tests.bench.report.files import GPU, record, result_file

pytest.importorskip("matplotlib")

from bench.report import plots


def test_one_picture_for_time_speed_and_memory(tmp_path: Path) -> None:
    drawn = plots.draw(Results(result_file(tmp_path, GPU, ("cold", "graph"))), tmp_path / "pictures")
    assert [path.name.rsplit("-", 1)[1] for path in drawn] == ["time.png", "speedup.png", "memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_no_curve_of_one_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    records.append(path, [record(name, 10.0, GPU, peak_mib=None) for name in ("fused", "eager")])
    assert [p.name for p in plots.draw(Results(path), tmp_path)] == ["one-speedup.png"]
