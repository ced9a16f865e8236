"""Checks return normalised arguments.  `test_errors` tests bad arguments."""

from enum import Enum

import pytest
import torch

from ggam_fast import checks


class Format(str, Enum):
    """As timm's."""

    NCHW = "NCHW"


def test_an_enum_of_strings_is_its_string() -> None:
    assert checks.one_of("input_fmt", Format.NCHW, checks.INPUT_FMT) == "NCHW"


def test_reduction_follows_the_divergence() -> None:
    assert [checks.reduction("r", None, d) for d in checks.DIVERGENCE] == ["mean", "sum", "mean"]
    assert checks.reduction("r", "sum", "symmetric") == "sum"


@pytest.mark.parametrize("value", [7, (7, 7), [7, 7], torch.Size([7, 7])])
def test_feature_size(value: object) -> None:
    assert checks.feat_size(value) == (7, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
def test_only_an_int_is_an_int(value: object) -> None:
    with pytest.raises(TypeError, match="n must be an int; got"):
        checks.positive_int("n", value)


@pytest.mark.parametrize(
    ("input_fmt", "shape", "spatial"),
    [("NCHW", (2, 3, 4, 5), (4, 5)), ("NHWC", (2, 4, 5, 3), (4, 5)), ("NLC", (2, 20, 3), (20,))],
)
def test_features_as_a_map(input_fmt: str, shape: tuple[int, ...], spatial: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    found = checks.feature_map(x, input_fmt, in_features=3)
    assert found.features.shape == (2, 3, 20)
    assert found.spatial_shape == spatial
    assert found.features.data_ptr() == x.data_ptr()
    back = checks.like_input(found.features, spatial, input_fmt)
    assert torch.equal(back, x)


def test_probabilities_and_labels(device: torch.device) -> None:
    soft, hard = torch.rand(2, 5, device=device), torch.tensor([0, 4], device=device)
    assert torch.equal(checks.target(soft, 2, 5), soft)
    assert torch.equal(checks.target(hard, 2, 5), hard)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((-1.0, 0.0), "guidance_weight must be finite and not negative; got -1.0"),
        ((float("inf"), 0.0), "guidance_weight must be finite"),
        ((1.0, 1.5), r"label_smoothing must be in \[0, 1\]; got 1.5"),
    ],
)
def test_weights_out_of_range(weights: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.loss_weights(*weights)
