"""Errors, and the errors that are allowed."""

import pytest
import torch

from bench.measure import parity
from bench.measure.parity import Refused


def test_the_share_of_what_is_allowed() -> None:
    """The allowed error is twice that of the eager reference, plus two eps."""
    exact = {"logits": torch.ones(4, dtype=torch.float64)}
    eager, found = ({"logits": exact["logits"] * (1 + off)} for off in (1e-2, 1.5e-2))
    eps = torch.finfo(torch.float32).eps
    share = parity.check("peer", found, exact, eager, torch.float32)
    assert share == pytest.approx(1.5e-2 / (2e-2 + 2 * eps))
    with pytest.raises(Refused, match=r"peer is 1.0e-02 off in logits; allowed: 1.0e-04"):
        parity.check("peer", eager, exact, exact, torch.float32)


def test_a_bias_before_batch_norm_is_compared_with_the_largest_result() -> None:
    exact = {"features": torch.ones(1), "classifier.0.bias": torch.zeros(1)}
    found = {"features": torch.ones(1), "classifier.0.bias": torch.full((1,), 1e-3)}
    assert parity.errors(found, exact)["classifier.0.bias"] == pytest.approx(1e-3)
    other = {name.replace("0.bias", "weight"): x for name, x in exact.items()}
    assert (
        parity.errors({"features": torch.ones(1), "classifier.weight": torch.ones(1)}, other)[
            "classifier.weight"
        ]
        > 1e9
    )


def test_a_missing_or_broken_result_is_refused() -> None:
    eager = exact = {"logits": torch.ones(4, 3)}
    for bad in (torch.full((4, 3), float("nan")), torch.ones(2, 3)):
        with pytest.raises(Refused, match="inf off in logits"):
            parity.check("peer", {"logits": bad}, exact, eager, torch.float32)
    with pytest.raises(Refused, match="expected logits"):
        parity.check("peer", {"scores": exact["logits"]}, exact, eager, torch.float32)


def test_a_reference_that_is_off_itself_judges_nobody() -> None:
    exact = {"logits": torch.ones(4, 3)}
    with pytest.raises(Refused, match="too far to judge others"):
        parity.check("peer", exact, exact, {"logits": 2 * exact["logits"]}, torch.float32)
