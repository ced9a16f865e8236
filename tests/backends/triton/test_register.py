"""Every stage is registered as an operator."""

from typing import Any

import pytest
import torch

from .cases import make, weights  # first: it skips without triton

from ggam_fast.backends.triton.register import OPERATORS  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_opcheck(layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas, fakes (strides included) and dispatch of every stage's operator."""
    monkeypatch.undo()  # opcheck compares outputs of repeated calls: no poison
    a = make(2, 12, 10, device, torch.float32, layout)
    g = make(2, 12, 10, device, torch.float32, "nchw")
    s, t, index = weights(2, 12, device), weights(2, 10, device), torch.randint(10, (2, 12), device=device)
    total, partials = torch.rand(2, device=device) + 1, torch.randn(2, 3, 10, device=device)
    none, pull = (None, None, 0.0, None), (t, total, 0.3, total[0])
    calls: dict[str, list[tuple[Any, ...]]] = {
        "spatial_sum": [(a, t, 0.5), (a, None, 0.5)],
        "channel_sum": [(a, s)],
        "spatial_attention": [(a, s, 0, 1, True), (a, s, 1, 10, False)],
        "spatial_attention_grad": [(a, s, 0.5, t, t, total, 1, *none), (a, s, 1.0, None, t, total, 0, *pull)],
        "guided_spatial_attention_grad": [(a, s, 0.5, t, total, 0, 1, 0.7, t, None)],
        "spatial_norm_grad": [
            (partials, 0.5, t, t, total, 2, *none), (partials, 0.5, None, t, total, 0, *pull)],
        "position_guidance": [(partials, 0, 1.0, t, total), (partials, 1, 0.7, t, None)],
        "max_pooled": [(a, t), (a, None)],
        "position_scatter": [(s, index, 10)],
        "attended_map": [(a, t, s, 1.0, False), (a, None, s, 0.5, True)],
        "grad_cam_means": [(a, g, t), (a, g, None)],
        "attended": [(a, s, 0, 0, False, 10, True), (a, s, 1, 1, False, 10, False),
                     (a, s, 0, 2, True, 1, False)],
        "attention_backward": [
            (a, s, s + 1, 1.0, None, t, total, 0, *pull), (a, s, None, 0.5, t, t, total, 1, *none)],
        "guided_attention_backward": [
            (a, s, s + 1, 1.0, t, total, 0, 0, 1.0, t, total, 2.0),
            (a, s, None, 1.0, t, total, 0, 1, 0.7, t, None, 1.0)],
        "features_grad": [(a, 0, s, index, t, t, s, s, total[0]), (a, 1, s, index, None, None, s, s, None),
                          (a, 2, g, index, t, t, s, None, None)],
        "product": [(s, s + 1, s.t(), None, None, False), (s, None, s.t(), s[:, 0], None, True)],
        "layer_grads": [(s, t, *[None] * 9), (s, t, t, s, t, t, None, None, s, None, total[0])],
        "softmax": [(s,)],
        "softmax_grad": [(s, s, None, None), (s, s, s, total[0])],
        "guidance": [(s, s, t, t, s, s, 10, 0, True, 1.0, 0.1, True, None, None, None, 0.0),
                     (s, s, t, t, s, s, 10, 0, True, 1.0, 0.1, True, total, total, total, 0.5),
                     (s, s, None, None, None, None, 10, 2, False, 2.0, 1.0, False, total, None, None, 0.0)],
        "cross_entropy": [(s, index[:, 0], None, 0.1, 0.0, False, True, 3, True, True, False),
                          (s, s, None, 0.0, 0.0, True, False, 0, False, True, False),
                          (s, s, total[0], 0.0, 1.0, False, False, 0, True, False, True)],
    }  # fmt: skip
    registered = {
        name.removeprefix("ggam_fast::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ggam_fast::")
    }
    whole_steps = {
        "guided_step",
        "guided_step_grads",
        "drop_in_step",
        "drop_in_step_grads",
    }  # in tests/test_compiled.py
    assert registered == OPERATORS.keys() == set(calls) | whole_steps
    for name, arguments in calls.items():
        for call in arguments:
            torch.library.opcheck(OPERATORS[name], call)
