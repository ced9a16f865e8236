"""The two sources of the method, as keywords of `GGAMHead`: `GGAMHead(2048, 200, **presets.RELEASE)`.

Source of RELEASE: PRIS-CV/CAM-Guided-Attention, cars_sp_CAM.py at 9e7ac5f. It trains with the equivalent of
`GGAMLoss(guidance_weight=1.0)`. The script also leaves the gradients of the predicted logits in the
parameters, because its second zero_grad is commented out. This defect is not copied.
"""

from types import MappingProxyType
from typing import Any

PAPER: MappingProxyType[str, Any] = MappingProxyType(
    {
        "attention": "channel_spatial",
        "spatial_norm": "softmax",
        "rd_ratio": 1 / 16,
        "pool_type": "avg",
        "attention_scale": "printed",
        "hidden_size": 512,
        "cam_at": "features",
        "cam_class": "label",
        "cam_detach": True,
        "cam_norm": "sigmoid",
        "cam_temperature": 1.0,
        "divergence": "symmetric",
        "guidance_reduction": "mean",
    }
)
"""arXiv 2101.09666. The paper says "several FC layers" after the attention; pooling by mean is ours."""

RELEASE: MappingProxyType[str, Any] = MappingProxyType(
    {
        "attention": "channel_spatial",
        "spatial_norm": "sigmoid",
        "rd_ratio": 1 / 16,
        "pool_type": "max",
        "attention_scale": "printed",
        "hidden_size": 512,
        "cam_at": "attended",
        "cam_class": "predicted",
        "cam_detach": True,
        "cam_norm": "softmax",
        "cam_temperature": 1.0,
        "divergence": "forward",
        "guidance_reduction": "sum",
    }
)
"""The authors' released guided script for ResNet-50: KL summed over the batch, weight 1."""
