"""The presets as keywords.  `test_release` compares RELEASE with the authors' script."""

import pytest

from ggam_fast import GGAMHead, presets
from tests.parity import C, K


def test_presets_name_every_choice_of_the_method() -> None:
    assert presets.RELEASE.keys() == presets.PAPER.keys()
    differing = {n for n in presets.PAPER if presets.PAPER[n] != presets.RELEASE[n]}
    assert differing == {
        "spatial_norm", "pool_type", "cam_at", "cam_class", "cam_norm", "divergence", "guidance_reduction",
    }  # fmt: skip
    with pytest.raises(TypeError):
        presets.PAPER["attention"] = "none"  # type: ignore[index]


@pytest.mark.parametrize("preset", [presets.PAPER, presets.RELEASE], ids=["paper", "release"])
def test_heads_of_the_presets(preset: dict[str, object]) -> None:
    head = GGAMHead(2 * C, K, **preset)
    for name in preset.keys() - {"rd_ratio"}:
        assert getattr(head, name) == preset[name], name
    assert head.rd_channels == 2 * C // 16
