"""Result files: their columns, their growth and their names."""

import csv
import threading
from pathlib import Path

import pytest

from bench.measure import environment, records

ANCHORED = [
    "op", "provider", "pass", "N", "C", "H", "W", "dtype", "layout", "timing", "p20", "p50", "p80", "bytes",
    "GB/s", "x_memcpy", "x_floor", "peak MiB", "launches", "gpu", "driver", "cuda", "torch", "triton",
    "commit", "dirty", "utc",
]  # fmt: skip


def row(**changes: object) -> records.Record:
    values = ("ggam", "fused", "step", 32, 2048, 14, 14, "bfloat16", "nchw", "cold", 100.0, 110.5, 130.0,
              77070336, 697.4, 2.0, 1.25, 27.5, 9)  # fmt: skip
    return records.Record(*values, environment.current())._replace(**changes)  # type: ignore[arg-type]


def test_columns() -> None:
    assert records.COLUMNS[: len(ANCHORED)] == ANCHORED


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.csv"
    records.append(path, [row(), row(provider="eager", launches=None)])
    records.append(path, [row(provider="compiled")])
    found = records.read(path)
    assert [r["provider"] for r in found] == ["fused", "eager", "compiled"]
    assert (found[0]["pass"], found[0]["p50"], found[0]["launches"]) == ("step", "110.5", "9")
    assert found[1]["launches"] == ""
    assert path.read_text().count("provider") == 1


def test_lines_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    threads = [
        threading.Thread(target=lambda: [records.append(path, [row()] * 3) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open(path, newline="") as file:
        lines = list(csv.reader(file))
    assert len(lines) == 1 + 4 * 20 * 3
    assert {len(line) for line in lines} == {len(records.COLUMNS)}


def test_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        records.append(path, [row()])
    with pytest.raises(ValueError, match="not a result file"):
        records.read(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_one_file_for_a_device_and_a_version_set() -> None:
    now = environment.current()._replace(gpu="NVIDIA H100 80GB HBM3", torch="2.11.0+cu130", triton="3.6.0")
    path = records.path_for(now)
    assert path.name == "NVIDIA_H100_80GB_HBM3-torch2.11.0_cu130-triton3.6.0.csv"
    assert path == records.path_for(now._replace(commit="other", utc="later", sm_mhz=1))
    assert path != records.path_for(now._replace(torch="2.12.0"))
