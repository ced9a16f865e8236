"""Heads and poolings that the tests of the head share."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity import C, H, K, W

BACKENDS = ("torch", "triton")


class MapClassifier(nn.Module):
    """A user's own module on the attended map, of layers without a closed form."""

    def __init__(self, input_fmt: str = "NCHW") -> None:
        super().__init__()
        self.input_fmt = input_fmt
        self.norm = nn.LayerNorm(C)
        self.out = nn.Linear(C, K)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_fmt == "NCHW":
            x = x.permute(0, 2, 3, 1)
        return self.out(F.gelu(self.norm(x.flatten(1, -2))).square().mean(1))


def pooled_classifier() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 10), nn.GELU(), nn.Linear(10, K))


def layer_norm_head(**options: Any) -> dict[str, Any]:
    return {**options, "norm_layer": nn.LayerNorm, "act_layer": nn.GELU}


HEADS: dict[str, dict[str, Any]] = {
    "avg-hidden": {"pool_type": "avg", "hidden_size": 10},
    "avg-linear": {"pool_type": "avg", "hidden_size": 0},
    "max-hidden": {"pool_type": "max", "hidden_size": 10},
    "max-linear": {"pool_type": "max", "hidden_size": 0},
    "flatten-hidden": {"pool_type": "flatten", "hidden_size": 10, "feat_size": (H, W)},
    "flatten-linear": {"pool_type": "flatten", "hidden_size": 0, "feat_size": (H, W)},
    "avg-layernorm": layer_norm_head(pool_type="avg", hidden_size=10),
    "max-own": {"pool_type": "max", "build_classifier": pooled_classifier},
    "map-own": {"pool_type": ""},
}
POOLS = {
    "avg": {"pool_type": "avg"},
    "max": {"pool_type": "max"},
    "flatten": {"pool_type": "flatten", "feat_size": (H, W)},
    "map": {"pool_type": "", "build_classifier": MapClassifier},
}


def poolings(**common: Any) -> Any:
    cases = [pytest.param({**common, **options}, id=name) for name, options in POOLS.items()]
    return pytest.mark.parametrize("options", cases)
