"""Benchmarks of the head and of whole training steps, with the tools around them.

    bench_head.py, bench_e2e.py   the benchmarks: `pytest bench/`
    report/                       tables, pictures and targets from result files: `python -m bench.report`
    suite/                        what is timed: cases, providers, their inputs
    measure/                      how it is timed, checked and recorded
    tools/                        commands, one question each: `python -m bench.NAME` runs `tools/NAME.py`

report imports suite, and suite imports measure. tools may import all three.
"""

from pathlib import Path

# This lets `python -m bench.host` find tools/host.py.
__path__.append(str(Path(__file__).with_name("tools")))
