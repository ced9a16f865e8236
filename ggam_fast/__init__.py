"""ggam_fast: Grad-CAM guided channel-spatial attention (arXiv 2101.09666), fused."""

from . import checks, functional, presets, reference
from . import differentiable as _differentiable  # noqa: F401  (registers itself)
from .base import GGAMOutput
from .functional import cam
from .head import GGAMHead
from .integrations import create_model, replace_head
from .losses import GGAMLoss, GGAMLossParts

if checks.TRITON_AVAILABLE:
    from .backends import triton as _triton  # noqa: F401  (registers the backend and its operators)

__all__ = [
    "GGAMHead", "GGAMLoss", "GGAMLossParts", "GGAMOutput", "cam", "create_model", "functional", "presets",
    "reference", "replace_head",
]  # fmt: skip
__version__ = "0.2.0"
