"""The fused kernels' waits: the same bits however their programs overtake one another."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.interleave import interleaved
from tests.kernels.test_schedule import backward, features, forward, ops, set_group
from tests.kernels.trace import needs_interpreter

pytestmark = needs_interpreter

CALLS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "forward": forward,
    "forward, maximum": lambda a: forward(a, "max"),
    "forward, dense": lambda a: forward(a, "", "sum"),
    "backward": lambda a: backward(a, 1),
    "backward of a pair": backward,
}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read before it is stored is NaN."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(ops.torch, "empty", poisoned)


LAGS = (2, 0, 1, 3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", list(CALLS))
def test_waits_for_what_it_reads(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a = features(5, "nchw" if seed % 2 else "channels_last")
    set_group(1 + seed % 3, monkeypatch)
    expected = CALLS[name](a)
    monkeypatch.setattr(ops.plan, "REREAD_LAG", LAGS[seed])
    monkeypatch.setattr(ops, "_programs", lambda *_: 2 + seed)
    with interleaved(seed) as launches:
        found = CALLS[name](a)
    assert len(launches) == 1
    assert launches[0].changes > 2 + seed
    for value, wanted in zip(found, expected, strict=True):
        assert torch.isfinite(wanted).all()
        assert torch.equal(value, wanted)
