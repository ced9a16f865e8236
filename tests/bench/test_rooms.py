"""In bench, imports only go down, every module has its test and every command has its name."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bench

BENCH = Path(bench.__file__).parent
ROOT, TESTS = BENCH.parent, Path(__file__).parent
ABOVE = {"measure": (), "suite": ("measure",), "report": ("measure", "suite")}
"""The rooms from which each room may import, besides itself."""
EVERYWHERE = (*ABOVE, "tools")
MODULES = sorted(path for path in BENCH.rglob("*.py") if path.name != "__init__.py")
TOOLS = [path.stem for path in MODULES if path.parent.name == "tools" and "__main__" in path.read_text()]


def room(path: Path) -> str:
    """ "" for the benchmarks themselves."""
    return next(iter(path.relative_to(BENCH).parts[:-1]), "")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: an absolute import works under both names of a tool"
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", sorted(BENCH.rglob("*.py")), ids=lambda p: str(p.relative_to(BENCH)))
def test_each_room_imports_downward(path: Path) -> None:
    own = room(path)
    allowed = {own, *ABOVE.get(own, EVERYWHERE)} - {""}
    found = {name.split(".")[1] for name in imports(path) if name.startswith("bench.")}
    assert found <= allowed
    assert "tests" not in {name.split(".")[0] for name in imports(path)}


def test_no_circle_inside_a_room() -> None:
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in MODULES}
    seen: dict[str, set[str]] = {
        name: {x for x in names if any(i == x or i.startswith(f"{x}.") for i in imports(path))}
        for name, path in names.items()
    }
    while seen:
        free = [name for name, needs in seen.items() if not needs & seen.keys()]
        assert free, f"a circle among {', '.join(seen)}"
        for name in free:
            del seen[name]


def test_every_module_has_its_test() -> None:
    missing = [
        str(path.relative_to(BENCH))
        for path in MODULES
        if not (TESTS / path.relative_to(BENCH).parent / f"test_{path.stem.strip('_')}.py").exists()
    ]
    assert not missing


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_is_a_command(name: str) -> None:
    """`python -m bench.NAME` runs tools/NAME.py, and its help has that name."""
    found = importlib.util.find_spec(f"bench.{name}")
    assert found is not None
    assert found.origin == str(BENCH / "tools" / f"{name}.py")
    assert f'prog="python -m bench.{name}"' in Path(found.origin).read_text()


@pytest.mark.parametrize("name", ["report", "counters"])
def test_commands_start(name: str) -> None:
    command = [sys.executable, "-m", f"bench.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m bench.{name}" in done.stdout


def test_commands_named_in_text_exist() -> None:
    texts = [ROOT / "README.md", *ROOT.glob("d*/**/*.md"), *BENCH.rglob("*.md"), BENCH / "gpu.sh"]
    named = {name for t in texts for name in re.findall(r"-m bench\.(\w+)", t.read_text())}
    assert named
    assert named <= {*TOOLS, "report"}


@pytest.mark.parametrize("script", ["bench/gpu.sh", ".ci/run"])
def test_tests_named_in_scripts_exist(script: str) -> None:
    named = re.findall(r"tests/[\w/{},.*]+", (ROOT / script).read_text())
    assert named
    done = subprocess.run(
        ["bash", "-c", f"ls -d {' '.join(named)}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_its_sections_are_skipped(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("they would run")
    script = BENCH / "gpu.sh"
    done = subprocess.run(
        ["bash", script, tmp_path, "device", "sanitizer", "initcheck", "nonesuch"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for section in ("device", "sanitizer", "initcheck"):
        assert re.search(rf"^{section} +skipped: no GPU$", done.stdout, re.M)
    assert "nonesuch    no such section" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["summary.txt"]
    sections = re.search(r"^all=\((.*)\)$", script.read_text(), re.M)
    assert sections
    explained = re.findall(r"^#   (\w+)  +\w", script.read_text(), re.M)
    assert explained == sections[1].split()
