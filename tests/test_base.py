"""The common base of head and reference: parameters, state, repr, and the authors' checkpoints."""

import pytest
import torch

from ggam_fast import GGAMHead
from ggam_fast.base import GGAMHeadBase
from ggam_fast.reference import GGAMHeadReference
from tests.parity import C, K

KINDS = pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])


@pytest.mark.parametrize("options", [{}, {"hidden_size": 0}, {"attention": "spatial"}, {"num_classes": 0}])
def test_both_heads_have_the_same_state(options: dict[str, object]) -> None:
    arguments = {"num_classes": K, "rd_channels": 4, **options}
    states = [kind(C, **arguments).state_dict() for kind in (GGAMHead, GGAMHeadReference)]
    shapes = [{name: (x.shape, x.dtype) for name, x in state.items()} for state in states]
    assert shapes[0] == shapes[1]
    assert ("fc1.weight" in shapes[0]) == ("attention" not in options)


@KINDS
def test_the_scale_is_part_of_the_state(kind: type[GGAMHeadBase]) -> None:
    head, other = (kind(C, K, rd_channels=4) for _ in range(2))
    head.attention_scale = "printed"
    assert not head.unit_mean
    other.load_state_dict(head.state_dict())
    assert other.attention_scale == "printed"
    with pytest.raises(ValueError, match="attention_scale must be one of"):
        head.attention_scale = "half"


@KINDS
def test_files_from_before_the_scale_load_as_printed(kind: type[GGAMHeadBase]) -> None:
    head = kind(C, K, rd_channels=4)
    state = head.state_dict()
    del state["unit_mean"]
    head.load_state_dict(state)
    assert head.attention_scale == "printed"


def test_representation_names_the_options() -> None:
    text = repr(GGAMHead(C, K, rd_channels=4, cam_norm="softmax"))
    assert text.startswith(f"GGAMHead(\n  {C}, {K}, attention='channel_spatial'")
    assert "cam_norm='softmax'" in text


@KINDS
def test_a_release_checkpoint_that_does_not_fit(kind: type[GGAMHeadBase]) -> None:
    """Everything that is wrong is named, and nothing is loaded."""
    head = kind(C, K, rd_channels=4, hidden_size=0)
    before = {name: x.clone() for name, x in head.state_dict().items()}
    state = {"module.se_module.fc1.weight": torch.ones(4, C + 1, 1, 1), "module.other": torch.ones(1)}
    with pytest.raises(ValueError, match="state_dict does not fit this head") as raised:
        head.load_release_state_dict(state)
    for problem in ("missing fc2.weight", "unexpected other", f"fc1.weight is (4, {C + 1}), expected"):
        assert problem in str(raised.value)
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())
