"""The check before every record.  A provider is timed only if its results are those of the reference.

The exact results come from the reference in float64, on the same inputs and parameters.  The error of an
output or gradient is ||found - exact|| / ||exact||.  The allowed error is twice that of the eager reference
in A's own type, plus two eps, and at least LEAST.
"""

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
"""Outputs and gradients by name."""

LEAST = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CEILING = 0.3
"""The largest allowed error of the eager reference.  Beyond it, the reference cannot judge others."""

# These are zero up to rounding, or differences of nearly equal numbers, so they are compared with the largest
# result.
CANCELLING = ("guidance_loss", "classifier.0.bias", "classifier.1.bias")


class Refused(AssertionError):
    """The results of a provider differ from those of the reference."""


def error(found: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """||found - exact|| / max(||exact||, scale), or infinity if a shape is wrong or a value is not finite."""
    if found.shape != exact.shape:
        return float("inf")
    difference = float((found.detach().double() - exact.double()).norm())
    norm = max(float(exact.double().norm()), scale, 1e-300)
    return difference / norm if difference == difference else float("inf")


def errors(found: Outputs, exact: Outputs) -> dict[str, float]:
    """The error of each result by name.  `found` must have the names of `exact`."""
    if found.keys() != exact.keys():
        raise Refused(f"got the results {', '.join(found)}; expected {', '.join(exact)}")
    largest = max(float(x.double().norm()) for x in exact.values())
    return {name: error(found[name], exact[name], largest if name in CANCELLING else 0.0) for name in exact}


def check(provider: str, found: Outputs, exact: Outputs, eager: Outputs, dtype: torch.dtype) -> float:
    """The largest error as a share of the allowed error.  Above 1, Refused is raised."""
    yardstick = errors(eager, exact)
    eps = torch.finfo(dtype).eps
    worst = 0.0
    for name, value in errors(found, exact).items():
        allowed = max(2 * yardstick[name] + 2 * eps, LEAST[dtype])
        if yardstick[name] > CEILING:
            raise Refused(
                f"the eager reference is {yardstick[name]:.1e} off in {name}, too far to judge others"
            )
        if not value <= allowed:
            raise Refused(f"{provider} is {value:.1e} off in {name}; allowed: {allowed:.1e}")
        worst = max(worst, value / allowed)
    return worst
