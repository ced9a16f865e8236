"""Benchmarks of the head and of whole training steps, with the tools around them.

    bench_head.py, bench_e2e.py   the benchmarks: `pytest bench/`
    report/                       tables, pictures and targets from result files: `python -m bench.report`
    suite/                        what is timed: cases, providers, their inputs
    measure/                      how it is timed, checked and recorded
    tools/                        single questions: `python -m bench.NAME` runs `tools/NAME.py`

Imports go from report to suite to measure; tools may use all three.
"""

from pathlib import Path

# Makes `python -m bench.host` find tools/host.py.
__path__.append(str(Path(__file__).with_name("tools")))
