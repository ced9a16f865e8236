"""The newest records of a file, by case."""

from pathlib import Path

import pytest

from bench.measure import records
from bench.report.results import Results, memory_beyond
from tests.bench.report.files import CPU, GPU, TIMES, record, result_file


def test_the_newest_record_counts(tmp_path: Path) -> None:
    path = result_file(tmp_path, GPU, ("cold",))
    (case, _) = Results(path).cases("step")
    records.append(path, [record("fused", 50.0, GPU)])
    found = Results(path).row("fused", "step", case, "cold")
    assert float(found["p50"]) == 50


def test_the_fastest_provider(tmp_path: Path) -> None:
    results = Results(result_file(tmp_path, GPU, ("cold",)))
    small, large = results.cases("step")
    assert (small.N, large.N) == ("32", "128")
    best = results.time(("compiled", "compiled_max_autotune"), "step", small, "cold")
    assert best is not None
    assert (best.provider, best.microseconds) == ("compiled_max_autotune", TIMES["compiled_max_autotune"])
    ours = results.ours("step", small, "compiled")
    assert ours is not None
    assert ours.provider == "fused_reduce_overhead"
    assert results.floor("step", small) == pytest.approx(50)
    assert memory_beyond(results.row("fused", "step", small, "cold"), small) == pytest.approx(0.05, rel=1e-3)


def test_timing_of_the_device(tmp_path: Path) -> None:
    gpu, cpu = (Results(result_file(tmp_path, e, ("hot",))) for e in (GPU, CPU))
    assert (gpu.on_gpu, gpu.timing, cpu.on_gpu, cpu.timing) == (True, "cold", False, "hot")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    records.append(path, [])
    with pytest.raises(ValueError, match="holds no records"):
        Results(path)
