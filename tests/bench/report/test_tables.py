"""The tables of result files that are made for the test."""

from pathlib import Path

import pytest

from bench.measure import records
from bench.report import page, tables
from bench.report.results import Results
from bench.suite.cases import FUSED_COMPILED
from tests.bench.report.files import CPU, GPU, TIMES, host_file, record, result_file


def test_gpu_table(tmp_path: Path) -> None:
    text = tables.markdown([result_file(tmp_path, GPU, ("hot", "cold", "graph", "host"))])
    assert "Test GPU, 1980 MHz, driver 580.1, CUDA 13.0, torch 2.11.0, triton 3.6.0, commit abc:" in text
    ours = "70 (1.40 x floor) | 100 | 56 (1.12 x floor) | 80"
    assert f"| 2048 x 14 x 14 | 32 | 50 | {ours} | 900 (9.0 x) | 250 (3.1 x) | - | 0.05 |" in text
    assert "| resnet50, 32 images | pooling and a linear layer | 70.0 | 457 | 900 | 0.50 |" in text
    assert "| resnet50, 32 images | this head | 71.0 (1.01 x) | 451 | 900 | 0.50 |" in text
    assert text.index("resnet50") < text.index("guided step")
    assert "No GPU" not in text


def test_host_times_stand_between_whole_steps_and_the_head_alone(tmp_path: Path) -> None:
    rows_of_it = result_file(tmp_path, GPU, ("hot", "cold", "graph"))
    host = host_file(tmp_path)
    assert page.result_files(tmp_path) == [rows_of_it, host]
    text = tables.markdown([rows_of_it, host])
    assert text.index("resnet50") < text.index("The host's time") < text.index("guided step")
    assert "CPU Test, torch 2.14.1, triton 3.8.0, Python 3.11.7, features 4x64x4x4-float32-nchw:" in text
    assert "| eager step: `fused_ggam_loss`, backward | 150 | 900 (6.0 x) |" in text
    assert "| eager step: `head(x, y)`, `GGAMLoss`, backward | 200 | 900 (4.5 x) |" in text
    assert "| eager inference: `head(x)` of one image, without gradients | 30 | 120 (4.0 x) |" in text
    assert "| compiled step: `fused_ggam_loss`, backward | 200 | 400 (2.0 x) |" in text
    assert "without a GPU" in text
    assert "stub of the driver" in text
    assert "28 launches" in text


def test_host_times_of_a_gpu_without_compiled_steps(tmp_path: Path) -> None:
    text = tables.markdown([host_file(tmp_path, gpu="Test GPU", fused_compiled=None, compiled=None)])
    assert "Test GPU, torch 2.14.1" in text
    assert "compiled step" not in text
    assert "stub" not in text
    assert "without a GPU" not in text


def test_the_eager_step_is_not_compared_with_compiled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for provider in FUSED_COMPILED:
        monkeypatch.delitem(TIMES, provider)
    text = tables.markdown([result_file(tmp_path, GPU, ("cold",))])
    assert "| 2048 x 14 x 14 | 32 | 50 | - | 100 | - | - | 900 (9.0 x) | 250 | - | 0.05 |" in text


def test_cpu_table_says_that_no_gpu_was_measured(tmp_path: Path) -> None:
    text = tables.markdown([result_file(tmp_path, CPU, ("hot",))])
    assert text.startswith("**No GPU has been measured yet.**")
    assert "| guided step | 2048 x 14 x 14 | 32 | 0.10 | 0.90 (9.0 x) | 0.11 | 0.30 (2.7 x) |" in text
    assert "resnet50" not in text  # the speed of a tiny step on a CPU means nothing


def test_the_newest_row_counts(tmp_path: Path) -> None:
    path = result_file(tmp_path, GPU, ("cold",))
    before = tables.markdown([path])
    last = [r for r in Results(path).records.values() if r["provider"] == "fused" and r["pass"] == "step"]
    assert last
    newer = GPU._replace(utc="2026-02-01T00:00:00Z", commit="def", dirty=1)
    records.append(path, [record("fused", 50.0, newer)])
    after = tables.markdown([path])
    assert before != after
    assert "(18.0 x)" in after
    assert "commits def with changes (1 of " in after
