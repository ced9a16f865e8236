"""The gate in front of every row: a provider is timed only if it computes what the reference computes.

Judged against the reference in float64 on the same (upcast) inputs and parameters, every output and gradient
by ||found - exact|| / ||exact||.  Allowed is twice the error of the eager reference in A's own type plus two
eps, and never less than LEAST.
"""

import torch
from torch import Tensor

from .peers import Results

LEAST = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CEILING = 0.3
"""The eager reference itself: nothing it gets more wrong than this could judge others."""

# Zero but for rounding, or a difference of nearly equal numbers: judged against the largest result.
CANCELLING = ("guidance_loss", "classifier.0.bias", "classifier.1.bias")


class Refused(AssertionError):
    """The provider's results are not the reference's."""


def error(found: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """||found - exact|| / max(||exact||, scale); infinite for a wrong shape or anything not finite."""
    if found.shape != exact.shape:
        return float("inf")
    difference = float((found.detach().double() - exact.double()).norm())
    norm = max(float(exact.double().norm()), scale, 1e-300)
    return difference / norm if difference == difference else float("inf")


def errors(found: Results, exact: Results) -> dict[str, float]:
    """The error of each result; all that are expected must be there."""
    if found.keys() != exact.keys():
        raise Refused(f"gave {', '.join(found)}; expected {', '.join(exact)}")
    largest = max(float(x.double().norm()) for x in exact.values())
    return {name: error(found[name], exact[name], largest if name in CANCELLING else 0.0) for name in exact}


def check(provider: str, found: Results, exact: Results, eager: Results, dtype: torch.dtype) -> float:
    """The largest error as a share of what is allowed; Refused if it is above 1."""
    yardstick = errors(eager, exact)
    eps = torch.finfo(dtype).eps
    worst = 0.0
    for name, value in errors(found, exact).items():
        allowed = max(2 * yardstick[name] + 2 * eps, LEAST[dtype])
        if yardstick[name] > CEILING:
            raise Refused(f"the eager reference is {yardstick[name]:.1e} off in {name}: too far to judge by")
        if not value <= allowed:
            raise Refused(f"{provider} is {value:.1e} off in {name}; allowed are {allowed:.1e}")
        worst = max(worst, value / allowed)
    return worst
