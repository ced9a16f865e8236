"""When a batch norm normalises with the batch, and when it updates its running statistics."""

import pytest
import torch

from ggam_fast.layer import BATCH_NORM, Layer


@pytest.mark.parametrize(
    ("training", "tracked", "from_batch", "moves"),
    [(True, True, True, True), (True, False, True, False), (False, True, False, False),
     (False, False, True, False)],
)  # fmt: skip
def test_batch_norm(training: bool, tracked: bool, from_batch: bool, moves: bool) -> None:
    statistics = torch.zeros(3) if tracked else None
    layer = Layer(BATCH_NORM, running_mean=statistics, running_var=statistics, training=training)
    assert (layer.from_batch, layer.moves) == (from_batch, moves)
