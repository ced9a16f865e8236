"""The number of processes that `pytest` starts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """One test, and the suite's own conftest."""
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "tests" / "test_one.py").write_text(
        "import os\ndef test_one(): print('worker', os.environ.get('PYTEST_XDIST_WORKER'),"
        " os.environ.get('OMP_NUM_THREADS'))\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "distributed"), [([], True), (["-n", "0"], False), (["tests"], False)], ids=str
)
def test_all_cores_without_paths(
    arguments: list[str], distributed: bool, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "pytest", "-rP", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert bool(re.search(r"worker gw\d+ 1", done.stdout)) == distributed
    assert ("worker None" in done.stdout) != distributed
