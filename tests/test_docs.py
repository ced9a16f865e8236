"""README and docs/ name files, commands, options and figures that exist, and their code runs."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import ggam_fast

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "dev").glob("README.md"),
                *(ROOT / "examples").glob("*.md")])  # fmt: skip
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_short_and_has_the_two_commands() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    # .ci/run reads them from here.
    assert lines.count('pip install -e ".[train]" && ggam-fast train') == 1
    assert lines.count('pip install -e ".[test]" && pytest') == 1


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", page.read_text()):
        # The block of tables may name files from the root.
        assert (page.parent / link).exists() or (ROOT / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_are_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # tells of files as they were
    for name in re.findall(
        r"`((?:ggam_fast|kernels|bench|tests|docs|dev|examples)/[\w./-]*)`", page.read_text()
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [README, *(ROOT / "docs").glob("*.md")], ids=name_of)
def test_code_runs(page: Path) -> None:
    blocks = [code for code in CODE.findall(page.read_text()) if "symmetric_kl" not in code]  # a sketch
    if any("ggam_fast.training" in code for code in blocks):
        for extra in ("torchmetrics", "timm", "safetensors"):
            pytest.importorskip(extra)
    names: dict[str, object] = {}
    for code in blocks:
        exec(code, names)


def test_one_version() -> None:
    newest = re.search(r"^## ([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == ggam_fast.__version__
    assert f'"{ggam_fast.__version__}"' not in (ROOT / "pyproject.toml").read_text()


def test_figures_are_what_their_script_draws() -> None:
    draw = load(ROOT / "docs" / "figures" / "draw.py")
    for name, figure in draw.FIGURES.items():
        assert (ROOT / "docs" / "figures" / name).read_text() == figure(), "python docs/figures/draw.py"


def test_readme_has_the_measured_ratios() -> None:
    times = load(ROOT / "docs" / "figures" / "draw.py").step_times()
    for provider in ("fused_compiled", "fused", "authors"):
        assert f"{times[provider] / times['linear']:.2f} x" in README.read_text(), provider


def test_the_table_of_options_has_a_row_for_each() -> None:
    pytest.importorskip("griffe")
    table = load(ROOT / "docs" / "hooks" / "options.py").table(ggam_fast.GGAMHead)
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(
        inspect.signature(ggam_fast.GGAMHead).parameters
    )
    assert '| `attention` | `"channel_spatial"` |' in table


def test_the_help_has_every_command() -> None:
    for extra in ("tyro", "timm", "torchmetrics"):
        pytest.importorskip(extra)
    first, texts = load(ROOT / "docs" / "hooks" / "commands.py").helps()
    assert {"train", "evaluate", "explain", "ablate", "export", "data"} <= texts.keys()
    assert all(f"ggam-fast {name}" in first for name in texts)
    short, full = texts["train"]
    assert "--guidance-weight" in short
    assert len(full.splitlines()) > len(short.splitlines())


def test_every_promise_has_its_test() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "promises.md").read_text())
    assert len(named) > 30
    assert not [(file, test) for file, test in named if f"\ndef {test}(" not in (ROOT / file).read_text()]
