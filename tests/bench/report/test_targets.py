"""Each target's worst case."""

from pathlib import Path

from bench.measure import records
from bench.report.results import Results
from bench.report.targets import judged
from tests.bench.report.files import CPU, GPU, record, result_file


def test_beta_alone(tmp_path: Path) -> None:
    times = {"fused": 700.0, "fused_reduce_overhead": 100.0, "grad_cam": 500.0, "torchcam": 600.0}
    path = records.path_for(GPU, tmp_path)
    records.append(path, [record(provider, time, GPU, run="beta") for provider, time in times.items()])
    lines = list(judged(Results(path)))
    where = "at 2048 x 14 x 14, N = 32, grad_cam"
    assert f"MISSED beta alone against the fastest CAM library: 0.71 (at least 5) {where}" in lines
    assert f"met    compiled beta alone against the fastest CAM library: 5.00 (at least 5) {where}" in lines


def test_steps(tmp_path: Path) -> None:
    lines = list(judged(Results(result_file(tmp_path, GPU, ("hot", "cold", "graph")))))
    assert (
        "MISSED guided step over floor, N >= 128, cold: 2.00 (at most 1.5) at 2048 x 14 x 14, N = 128"
        in lines
    )
    assert any(x.startswith("met    guided step over floor, N >= 128, graph: 1.40") for x in lines)
    assert any(x.startswith("met    guided step against the best torch.compile, hot: 2.50") for x in lines)
    assert any(
        x.startswith("met    compiled guided step against the best torch.compile, hot: 3.12") for x in lines
    )
    assert any(x.startswith("met    whole step over a step with the plain head: 1.01") for x in lines)
    assert any(
        x.startswith("MISSED whole step with the compiled head over a step with the plain head: 1.14")
        for x in lines
    )
    cpu = list(judged(Results(result_file(tmp_path, CPU, ("hot",)))))
    assert any(x.startswith("met    step, eager against the eager reference: 9.00") for x in cpu)
