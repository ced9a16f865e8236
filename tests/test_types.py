"""What a type checker sees: the head's two returns, its options, and every example under --strict."""

from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

ROOT = Path(__file__).resolve().parent.parent
USES = """
from typing_extensions import assert_type

import torch
from torch import Tensor

from ggam_fast import GGAMHead, GGAMOutput
from ggam_fast.functional import ggam_attention
from ggam_fast.reference import GGAMHeadReference

x, y = torch.rand(2, 8, 3, 3), torch.tensor([0, 1])


def maybe(target: Tensor | None) -> None:
    assert_type(GGAMHead(8, 2)(x, target), Tensor | GGAMOutput)


for head in (GGAMHead(8, 2), GGAMHeadReference(8, 2, attention="spatial", guidance_reduction="sum")):
    assert_type(head(x), Tensor)
    assert_type(head(x, pre_logits=True), Tensor)
    assert_type(head(x, y), GGAMOutput)
    assert_type(head(x, target=y).logits, Tensor)
assert_type(GGAMHead(8, 2).forward(x), Tensor)
assert_type(GGAMHead(8, 2).forward(x, y), GGAMOutput)
"""
MISUSES = (
    'GGAMHead(8, 2, attention="spatal")',
    'GGAMHead(8, 2, cam_norm="relu")',
    'GGAMHead(8, 2, pool_type="mean")',
    'GGAMHead(8, 2, backend="cuda")',
    'ggam_attention(x, spatial_norm="none")',
    "GGAMHead(8, 2)(x).guidance_loss",
    "GGAMHead(8, 2)(x, y).argmax(1)",
)

pytestmark = pytest.mark.slow


def check(*paths: Path) -> list[str]:
    """The errors in these files."""
    arguments = ["--strict", "--follow-imports", "silent", "--config-file", str(ROOT / "pyproject.toml")]
    out, problems, _ = api.run([*arguments, *map(str, paths)])
    assert not problems
    return [line for line in out.splitlines() if ": error:" in line]


def test_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert check(*(ROOT / "examples").glob("*.py")) == []


def test_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    right, wrong = tmp_path / "uses.py", tmp_path / "misuses.py"
    right.write_text(USES)
    wrong.write_text(USES + "\n".join(MISUSES))
    assert check(right) == []
    first = len(USES.splitlines()) + 1
    assert [int(e.split(":")[1]) for e in check(wrong)] == list(range(first, first + len(MISUSES)))
