"""ggam_fast: Grad-CAM guided channel-spatial attention (arXiv 2101.09666), fused."""

from typing import TYPE_CHECKING, Any

from . import checks, functional, presets, reference
from . import differentiable as _differentiable  # noqa: F401  (registers itself)
from .base import GGAMOutput
from .blocks import guide_block
from .explain import Explanation, explain
from .functional import cam
from .head import GGAMHead
from .integrations import create_model, replace_head
from .losses import GGAMLoss, GGAMLossParts

if TYPE_CHECKING:
    from .hub import HubModel as HubModel
    from .tasks import GGAMTask as GGAMTask

if checks.TRITON_AVAILABLE:
    from .backends import triton as _triton  # noqa: F401  (registers the backend and its operators)

__all__ = [
    "Explanation", "GGAMHead", "GGAMLoss", "GGAMLossParts", "GGAMOutput", "cam", "create_model", "explain",
    "functional", "guide_block", "presets", "reference", "replace_head",
]  # fmt: skip
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """What needs another library is imported when it is asked for, and is not in `__all__`."""
    if name == "GGAMTask":
        from .tasks import GGAMTask

        return GGAMTask
    if name == "HubModel":
        from .hub import HubModel

        return HubModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
