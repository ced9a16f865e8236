"""Result files for the tests of the report."""

import json
from pathlib import Path

from bench.measure import records
from bench.measure.environment import Environment
from bench.report import page

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


def record(provider: str, time: float, environment: Environment, **changes: object) -> records.Record:
    return records.Record(
        "ggam", provider, "step", 32, 2048, 14, 14, "bfloat16", "nchw", "cold", time, time, time,
        3, None, 2.0, None, None, 7, environment, None, 0.5,
    )._replace(**changes)  # type: ignore[arg-type]  # fmt: skip


def result_file(folder: Path, environment: Environment, timings: tuple[str, ...]) -> Path:
    """Steps at two batch sizes, floor 50 us at 32 images, and a whole training step."""
    path = records.path_for(environment, folder)
    for n in (32, 128):
        mib, floor = n * 2048 * 196 * 2 / 2**20, 50 * n / 32
        for provider, time in TIMES.items():
            for timing in timings:
                p50 = time * n / 32 * (0.7 if timing == "graph" else 1)
                found = record(provider, p50, environment, N=n, timing=timing, x_floor=p50 / floor)
                records.append(path, [found._replace(peak_mib=1.3 * mib, gradients_mib=1.25 * mib)])
    for provider, time in (("linear", 70e3), ("fused", 71e3), ("fused_compiled", 80e3), ("authors", 140e3)):
        whole = {"op": "resnet50", "run": "e2e", "timing": "hot", "peak_mib": 900.0, "joules_per_image": 0.5}
        records.append(path, [record(provider, time, environment, images_per_s=32e6 / time, **whole)])
    return path


def host_file(folder: Path, **changes: object) -> Path:
    """The file of `python -m bench.host --json`. A key that `changes` sets to None is left out."""
    path = folder / page.HOST
    found = {key: value for key, value in (HOST | changes).items() if value is not None}
    path.write_text(json.dumps(found))
    return path
