"""README's block is what the result files say, and says so when it is not."""

import json
import re
from pathlib import Path

import pytest

from bench import bars, report, rows, table
from bench.cases import FUSED_COMPILED
from bench.environment import ROOT, Environment

GPU = Environment(
    "Test GPU", "580.1", "13.0", "2.11.0", "3.6.0", "abc", 0, "2026-01-01T00:00:00Z", 1980, 2619, 16, 1.0
)
CPU = GPU._replace(gpu="CPU Test, 2 threads", cuda="", driver="", sm_mhz=None, memory_mhz=None)
TIMES = {
    "eager": 900.0,
    "fused": 100.0,
    "compiled": 300.0,
    "compiled_max_autotune": 250.0,
    "fused_compiled": 110.0,
    "fused_reduce_overhead": 80.0,
}

HOST = {
    "case": "4x64x4x4-float32-nchw", "torch": "2.14.1", "triton": "3.8.0", "python": "3.11.7",
    "cpu": "CPU Test, 1 threads", "fused": 150.0, "drop_in": 200.0, "eager": 900.0, "forward": 30.0,
    "eager_forward": 120.0, "fused_compiled": 200.0, "compiled": 400.0, "launches": 28,
}  # fmt: skip


def row(provider: str, time: float, environment: Environment, **changes: object) -> rows.Row:
    return rows.Row(
        "ggam", provider, "step", 32, 2048, 14, 14, "bfloat16", "nchw", "cold", time, time, time,
        3, None, 2.0, None, None, 7, environment, None, 0.5,
    )._replace(**changes)  # type: ignore[arg-type]  # fmt: skip


def result_file(folder: Path, environment: Environment, timings: tuple[str, ...]) -> Path:
    """Steps at two batch sizes, floor 50 us at 32 images, and a whole training step."""
    path = rows.path_for(environment, folder)
    for n in (32, 128):
        mib, floor = n * 2048 * 196 * 2 / 2**20, 50 * n / 32
        for provider, time in TIMES.items():
            for timing in timings:
                p50 = time * n / 32 * (0.7 if timing == "graph" else 1)
                found = row(provider, p50, environment, N=n, timing=timing, x_floor=p50 / floor)
                rows.append(path, [found._replace(peak_mib=1.3 * mib, gradients_mib=1.25 * mib)])
    for provider, time in (("linear", 70e3), ("fused", 71e3), ("fused_compiled", 80e3), ("authors", 140e3)):
        whole = {"op": "resnet50", "run": "e2e", "timing": "hot", "peak_mib": 900.0, "joules_per_image": 0.5}
        rows.append(path, [row(provider, time, environment, images_per_s=32e6 / time, **whole)])
    return path


def test_readme_is_not_stale() -> None:
    files = report.result_files()
    readme = (ROOT / "README.md").read_text()
    assert report.replaced(readme, report.block(files)) == readme, "run python -m bench.report"
    for link in re.findall(r"\]\((bench/[^)]+)\)", report.block(files)):
        assert (ROOT / link).exists(), f"{link} is linked but not there: run python -m bench.report"


def test_gpu_table(tmp_path: Path) -> None:
    text = table.markdown([result_file(tmp_path, GPU, ("hot", "cold", "graph", "host"))])
    assert "Test GPU, 1980 MHz, driver 580.1, CUDA 13.0, torch 2.11.0, triton 3.6.0, commit abc:" in text
    ours = "70 (1.40 x floor) | 100 | 56 (1.12 x floor) | 80"
    assert f"| 2048 x 14 x 14 | 32 | 50 | {ours} | 900 (9.0 x) | 250 (3.1 x) | - | 0.05 |" in text
    assert "| resnet50, 32 images | pooling and a linear layer | 70.0 | 457 | 900 | 0.50 |" in text
    assert "| resnet50, 32 images | this head | 71.0 (1.01 x) | 451 | 900 | 0.50 |" in text
    assert text.index("resnet50") < text.index("guided step")
    assert "No GPU" not in text


def host_file(folder: Path, **changes: object) -> Path:
    """What `python -m bench.host --json` writes; without what is changed to None."""
    path = folder / report.HOST
    found = {key: value for key, value in (HOST | changes).items() if value is not None}
    path.write_text(json.dumps(found))
    return path


def test_host_times_stand_between_whole_steps_and_the_head_alone(tmp_path: Path) -> None:
    rows_of_it = result_file(tmp_path, GPU, ("hot", "cold", "graph"))
    host = host_file(tmp_path)
    assert report.result_files(tmp_path) == [rows_of_it, host]
    text = table.markdown([rows_of_it, host])
    assert text.index("resnet50") < text.index("costs the host") < text.index("guided step")
    assert "CPU Test, torch 2.14.1, triton 3.8.0, Python 3.11.7, features 4x64x4x4-float32-nchw:" in text
    assert "| eager step: `fused_ggam_loss`, backward | 150 | 900 (6.0 x) |" in text
    assert "| eager step: `head(x, y)`, `GGAMLoss`, backward | 200 | 900 (4.5 x) |" in text
    assert "| eager inference: `head(x)` of one image, without gradients | 30 | 120 (4.0 x) |" in text
    assert "| compiled step: `fused_ggam_loss`, backward | 200 | 400 (2.0 x) |" in text
    assert "without a GPU" in text
    assert "stub of the driver" in text
    assert "28 launches" in text


def test_host_times_of_a_gpu_without_compiled_steps(tmp_path: Path) -> None:
    text = table.markdown([host_file(tmp_path, gpu="Test GPU", fused_compiled=None, compiled=None)])
    assert "Test GPU, torch 2.14.1" in text
    assert "compiled step" not in text
    assert "stub" not in text
    assert "without a GPU" not in text


def test_readme_is_stale_after_another_host_file(tmp_path: Path) -> None:
    readme, host = tmp_path / "README.md", host_file(tmp_path)
    readme.write_text(report.block([host]))
    arguments = [str(host), "--readme", str(readme), "--check"]
    assert report.main(arguments) == 0
    host_file(tmp_path, fused=151.0)
    assert report.main(arguments) == 1


def test_host_times_are_committed() -> None:
    assert (rows.RESULTS / report.HOST).exists(), "python -m bench.host --compile --json FILE"


def test_the_eager_step_is_not_compared_with_compiled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for provider in FUSED_COMPILED:
        monkeypatch.delitem(TIMES, provider)
    text = table.markdown([result_file(tmp_path, GPU, ("cold",))])
    assert "| 2048 x 14 x 14 | 32 | 50 | - | 100 | - | - | 900 (9.0 x) | 250 | - | 0.05 |" in text


def test_cpu_table_says_that_no_gpu_was_measured(tmp_path: Path) -> None:
    text = table.markdown([result_file(tmp_path, CPU, ("hot",))])
    assert text.startswith("**No GPU has been measured yet.**")
    assert "| guided step | 2048 x 14 x 14 | 32 | 0.10 | 0.90 (9.0 x) | 0.11 | 0.30 (2.7 x) |" in text
    assert "resnet50" not in text  # a tiny step's speed on a CPU says nothing


def test_the_newest_row_counts(tmp_path: Path) -> None:
    path = result_file(tmp_path, GPU, ("cold",))
    before = table.markdown([path])
    last = [r for r in table.Results(path).rows.values() if r["provider"] == "fused" and r["pass"] == "step"]
    assert last
    newer = GPU._replace(utc="2026-02-01T00:00:00Z", commit="def", dirty=1)
    rows.append(path, [row("fused", 50.0, newer)])
    after = table.markdown([path])
    assert before != after
    assert "(18.0 x)" in after
    assert "commits def with changes (1 of " in after


def test_projects_readme_is_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main([str(result_file(tmp_path, GPU, ("cold",))), "--check"])
    assert "tables of all result files" in capsys.readouterr().err


def test_stale_readme_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, readme = result_file(tmp_path, GPU, ("cold",)), tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = [str(path), "--readme", str(readme), "--plots", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert "stale" in capsys.readouterr().out
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")
    for name in ("time", "speedup", "memory"):
        assert (tmp_path / f"{path.stem}-{name}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN}{report.END}" * 2]
)
def test_a_readme_without_the_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="README must have one"):
        report.replaced(text, "")


def test_bars_of_beta_alone(tmp_path: Path) -> None:
    times = {"fused": 700.0, "fused_reduce_overhead": 100.0, "grad_cam": 500.0, "torchcam": 600.0}
    path = rows.path_for(GPU, tmp_path)
    rows.append(path, [row(provider, time, GPU, run="beta") for provider, time in times.items()])
    lines = list(bars.judged(table.Results(path)))
    where = "at 2048 x 14 x 14, N = 32, grad_cam"
    assert f"MISSED beta alone against the fastest CAM library: 0.71 (at least 5) {where}" in lines
    assert f"met    compiled beta alone against the fastest CAM library: 5.00 (at least 5) {where}" in lines


def test_bars(tmp_path: Path) -> None:
    lines = list(bars.judged(table.Results(result_file(tmp_path, GPU, ("hot", "cold", "graph")))))
    assert (
        "MISSED guided step over floor, N >= 128, cold: 2.00 (at most 1.5) at 2048 x 14 x 14, N = 128"
        in lines
    )
    assert any(x.startswith("met    guided step over floor, N >= 128, graph: 1.40") for x in lines)
    assert any(x.startswith("met    guided step against the best torch.compile, hot: 2.50") for x in lines)
    assert any(
        x.startswith("met    compiled guided step against the best torch.compile, hot: 3.12") for x in lines
    )
    assert any(x.startswith("met    whole step over the plain head's: 1.01") for x in lines)
    assert any(x.startswith("MISSED whole step, compiled head over the plain head's: 1.14") for x in lines)
    cpu = list(bars.judged(table.Results(result_file(tmp_path, CPU, ("hot",)))))
    assert any(x.startswith("met    step, eager against the eager reference: 9.00") for x in cpu)
