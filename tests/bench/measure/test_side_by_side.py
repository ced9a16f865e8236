"""Providers are built, checked and timed together. A failure affects only its own provider."""

import pytest

from bench.measure.side_by_side import Timed, take, timed
from bench.measure.timing import Measured


def test_order_and_failures() -> None:
    seen: list[str] = []

    def build(name: str) -> str:
        if name == "missing":
            raise ImportError("not installed")
        seen.append(f"build {name}")
        return name.upper()

    def check(name: str, peer: str) -> float:
        if name == "wrong":
            raise AssertionError("refused")
        seen.append(f"check {peer}")
        return 0.5

    def measure(peers: dict[str, str]) -> dict[str, Measured]:
        seen.append(f"measure {' '.join(peers)}")
        return {name: Measured({}, []) for name in peers}

    found = timed(("a", "missing", "wrong", "b"), build, check, measure)
    assert seen == ["build a", "build wrong", "build b", "check A", "check B", "measure a b"]
    assert take(found, "a") == Timed("A", 0.5, Measured({}, []))
    assert "a" not in found
    with pytest.raises(ImportError, match="not installed"):
        take(found, "missing")
    with pytest.raises(AssertionError, match="refused"):
        take(found, "wrong")
