"""A bare checkout finds its kernels as `ggam_fast.kernels`; elsewhere nothing is loaded."""

import sys
from pathlib import Path

import pytest

import ggam_fast
from ggam_fast import _checkout

NAME = "ggam_fast.kernels"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with kernels/, in place of the repository; nothing of it is loaded yet."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("here = True\n")
    monkeypatch.setattr(_checkout, "__file__", str(tmp_path / "ggam_fast" / "_checkout.py"))
    monkeypatch.setattr(ggam_fast, "kernels", None, raising=False)
    monkeypatch.setitem(sys.modules, NAME, None)
    monkeypatch.delitem(sys.modules, NAME)
    return tmp_path


def test_kernels_of_a_checkout(checkout: Path) -> None:
    (checkout / "pyproject.toml").touch()
    _checkout.load_sibling_kernels()
    assert ggam_fast.kernels.here
    assert sys.modules[NAME] is ggam_fast.kernels


def test_a_neighbour_that_is_no_checkout_is_left_alone(checkout: Path) -> None:
    """As in site-packages, where a folder kernels/ belongs to another project."""
    _checkout.load_sibling_kernels()
    assert NAME not in sys.modules


def test_installed_kernels_stay(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "pyproject.toml").touch()
    monkeypatch.setitem(sys.modules, NAME, pytest)
    _checkout.load_sibling_kernels()
    assert sys.modules[NAME] is pytest
