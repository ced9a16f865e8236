"""The guidances that an ablation compares, and the controls beside them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Guidance(NamedTuple):
    """What guides S or T.  `head`: the head's options.  `control`: see `controls`."""

    label: str
    head: dict[str, Any]
    channels: bool = False  # lambda weighs the guidance of S
    positions: bool = False  # lambda weighs the guidance of T
    control: str = ""

    def suits(self, attention: str) -> bool:
        """Whether the guided attention exists."""
        has_channel = attention in ("channel", "channel_spatial")
        has_spatial = attention in ("spatial", "channel_spatial")
        return (has_channel or not self.channels) and (has_spatial or not self.positions)


_COMMENSURATE = {"cam_norm": "standardized_softmax", "divergence": "reverse"}

GUIDANCES: dict[str, Guidance] = {
    "none": Guidance("no guidance", {}),
    "paper": Guidance("the paper's", {"cam_norm": "sigmoid", "divergence": "symmetric"}, channels=True),
    "release": Guidance("the release's", {"cam_norm": "softmax", "divergence": "forward"}, channels=True),
    "standardized": Guidance(
        "standardized", {"cam_norm": "standardized", "divergence": "symmetric"}, channels=True
    ),
    "commensurate": Guidance("commensurate", _COMMENSURATE, channels=True),
    "positions": Guidance("positions", {"position_guidance": "relu"}, positions=True),
    "both": Guidance(
        "commensurate and positions", {**_COMMENSURATE, "position_guidance": "relu"}, channels=True,
        positions=True,
    ),
    "mean_activation": Guidance("control: mean activation", {}, positions=True, control="mean_activation"),
    "other_image": Guidance("control: another image's map", {}, positions=True, control="other_image"),
    "gaussian": Guidance("control: centred Gaussian", {}, positions=True, control="gaussian"),
}  # fmt: skip
