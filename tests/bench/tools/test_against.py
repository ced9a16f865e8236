"""The head of this commit against that of the last one."""

import subprocess
from pathlib import Path

import pytest

from bench.tools import against

ROOT = Path(against.__file__).parents[2]


def test_rows_of_a_small_case(capsys: pytest.CaptureFixture[str]) -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("needs a git checkout")
    code = against.main(["HEAD", "--seconds", "0.01", "--case", "2x16x2x2-float32-nchw"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2].rstrip(":") for line in lines] == ["fwd", "beta", "step", "fused"]
    assert code == int(any(line.startswith("MISSED") for line in lines))


def test_an_unknown_commit_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="commit 'no-such-commit' cannot be read"):
        against.imported("no-such-commit", tmp_path)


def test_least_times_of_calls_in_turns() -> None:
    turns: list[str] = []
    a, b = against.in_turns(lambda: turns.append("a"), lambda: turns.append("b"), 0.0)
    assert a > 0
    assert b > 0
    assert {"a", "b"} == set(turns)
