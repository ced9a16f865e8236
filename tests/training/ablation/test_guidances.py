"""Each guidance makes a head, and suits the attentions that it can guide."""

from typing import get_args

import pytest

from ggam_fast import GGAMHead
from ggam_fast.training.ablation.guidances import GUIDANCES
from ggam_fast.training.ablation.study import GuidanceName


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_guidance_suits_the_heads_that_can_be_built(name):
    guidance = GUIDANCES[name]
    for attention in ("none", "channel", "spatial", "channel_spatial"):
        if guidance.suits(attention):
            GGAMHead(16, 3, attention=attention, **guidance.head)
        elif "position_guidance" in guidance.head or guidance.head.get("divergence") == "reverse":
            with pytest.raises(ValueError, match="attention="):
                GGAMHead(16, 3, attention=attention, **guidance.head)


def test_the_option_has_every_guidance():
    assert get_args(GuidanceName) == tuple(GUIDANCES)


def test_what_suits_what():
    suits = {
        name: [a for a in ("none", "channel", "spatial", "channel_spatial") if guidance.suits(a)]
        for name, guidance in GUIDANCES.items()
    }
    assert len(suits["none"]) == 4
    assert suits["paper"] == suits["commensurate"] == ["channel", "channel_spatial"]
    assert suits["positions"] == suits["gaussian"] == ["spatial", "channel_spatial"]
    assert suits["both"] == ["channel_spatial"]
