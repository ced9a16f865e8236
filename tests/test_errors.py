"""Bad input: one error that names the argument, what came and what is expected."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ggam_fast import GGAMHead, GGAMLoss, cam, functional
from ggam_fast.reference import GGAMHeadReference

C, K, N, H, W = 16, 5, 2, 3, 4

CONSTRUCTOR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"attention": "both"}, ValueError, r"attention must be one of 'channel_spatial', .*; got 'both'"),
    (
        {"spatial_norm": "l2"},
        ValueError,
        r"spatial_norm must be one of 'softmax', 'sum', 'sigmoid'; got 'l2'",
    ),
    ({"pool_type": "catavgmax"}, ValueError, r"pool_type must be one of .*; got 'catavgmax'"),
    ({"pool_type": None}, ValueError, r"pool_type must be one of .*; got None"),
    ({"cam_at": "logits"}, ValueError, r"cam_at must be one of 'features', 'attended'; got 'logits'"),
    ({"cam_class": "second"}, ValueError, r"cam_class must be one of 'label', 'predicted'; got 'second'"),
    ({"cam_norm": "relu"}, ValueError, r"cam_norm must be one of .*; got 'relu'"),
    (
        {"divergence": "js"},
        ValueError,
        r"divergence must be one of 'symmetric', 'forward', 'reverse'; got 'js'",
    ),
    (
        {"guidance_reduction": "max"},
        ValueError,
        r"guidance_reduction must be one of 'mean', 'sum', 'none'; got 'max'",
    ),
    ({"input_fmt": "NCL"}, ValueError, r"input_fmt must be one of 'NCHW', 'NHWC', 'NLC'; got 'NCL'"),
    ({"prefix_tokens": -1}, ValueError, r"prefix_tokens must be at least 0; got -1"),
    ({"prefix_tokens": True}, TypeError, r"prefix_tokens must be an int; got True"),
    (
        {"prefix_tokens": 1},
        ValueError,
        r"prefix_tokens=1 needs input_fmt=\"NLC\"; got input_fmt='NCHW'",
    ),
    ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto', 'triton', 'torch'; got 'cuda'"),
    ({"rd_ratio": 2.0}, ValueError, r"rd_ratio must be in \(0, 1\]; got 2.0"),
    ({"rd_ratio": 0.0}, ValueError, r"rd_ratio must be in \(0, 1\]; got 0.0"),
    ({"rd_ratio": 0.01}, ValueError, r"rd_ratio=0.01 leaves no hidden channel of 16"),
    ({"rd_channels": C + 1}, ValueError, r"rd_channels must be between 1 and in_features=16; got 17"),
    ({"rd_channels": 0}, ValueError, r"rd_channels must be at least 1; got 0"),
    ({"rd_channels": 2.0}, TypeError, r"rd_channels must be an int; got 2.0"),
    ({"hidden_size": -1}, ValueError, r"hidden_size must be at least 0; got -1"),
    ({"cam_temperature": 0.0}, ValueError, r"cam_temperature must be positive and finite; got 0.0"),
    ({"cam_temperature": float("nan")}, ValueError, r"cam_temperature must be positive and finite; got nan"),
    ({"drop_rate": 1.0}, ValueError, r"drop_rate must be in \[0, 1\); got 1.0"),
    ({"drop_rate": float("nan")}, ValueError, r"drop_rate must be in \[0, 1\); got nan"),
    ({"drop_rate": "a"}, TypeError, r"drop_rate must be a number; got 'a'"),
    ({"cam_temperature": "a"}, TypeError, r"cam_temperature must be a number; got 'a'"),
    ({"rd_ratio": None}, TypeError, r"rd_ratio must be a number; got None"),
    ({"classifier": "x"}, TypeError, r"classifier must be an nn.Module; got str"),
    ({"feat_size": 2.5}, TypeError, r"feat_size must be an int; got 2.5"),
    ({"feat_size": (7,)}, ValueError, r"feat_size must be \(H, W\); got \(7,\)"),
    ({"feat_size": (7, 0)}, ValueError, r"feat_size must be at least 1; got 0"),
    ({"pool_type": "flatten"}, ValueError, r'pool_type="flatten" needs feat_size=\(H, W\)'),
    (
        {"pool_type": ""},
        ValueError,
        r'pool_type="" hands the attended map to your own module: give classifier=',
    ),
    ({"in_features": 0}, ValueError, r"in_features must be at least 1; got 0"),
    ({"in_features": 16.0}, TypeError, r"in_features must be an int; got 16.0"),
    ({"num_classes": -1}, ValueError, r"num_classes must be at least 0; got -1"),
    ({"num_classes": True}, TypeError, r"num_classes must be an int; got True"),
    ({"cam_detach": "no"}, TypeError, r"cam_detach must be True or False; got 'no'"),
    ({"act_layer": None}, TypeError, r"act_layer must make a layer when called; got None"),
]


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTOR)
def test_constructor(
    kind: type[nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**{"in_features": C, "num_classes": K, **options})


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        (
            {},
            (N, C),
            r'num_classes=0, global_pool="", .* torchvision model to ggam_fast.replace_head',
        ),
        ({}, (N, H * W, C), r'For tokens \(N, L, C\) give input_fmt="NLC", and prefix_tokens='),
        ({}, (N, H, W, C), r"must have 16 channels .* if its layout is NHWC, give input_fmt='NHWC'"),
        ({"input_fmt": "NHWC"}, (N, C, H, W), r"if its layout is NCHW, give input_fmt='NCHW'"),
        ({"input_fmt": "NLC"}, (N, C, H, W), r'For a map give input_fmt="NCHW" or "NHWC"'),
        (
            {"input_fmt": "NLC", "prefix_tokens": 2},
            (N, 2, C),
            r"tokens \(N, L, C\) beside the prefix_tokens=2; got shape \(2, 2, 16\)",
        ),
    ],
)
def test_features_of_another_form_say_what_to_do(
    kind: type[nn.Module], options: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(C, K, **options)(torch.rand(shape))


def test_a_bad_option_is_refused_even_where_it_has_no_say() -> None:
    with pytest.raises(ValueError, match="spatial_norm"):
        GGAMHead(C, K, attention="none", spatial_norm="l2")


GOOD = torch.rand(N, C, H, W)
LABELS = torch.tensor([0, 4])
FORWARD: list[tuple[Any, Any, type[Exception], str]] = [
    ([1.0], LABELS, TypeError, r"features must be a tensor; got list"),
    (GOOD.long(), LABELS, TypeError, r"features must be float32, .* or float64; got torch.int64"),
    (GOOD.bool(), LABELS, TypeError, r"features must be float32, .* or float64; got torch.bool"),
    (GOOD[0], LABELS, ValueError, r"features must be \(N, C, H, W\), 4-dimensional; got shape \(16, 3, 4\)"),
    (GOOD.flatten(2), LABELS, ValueError, r"features must be \(N, C, H, W\), 4-dimensional; got shape"),
    (
        GOOD[:, :7],
        LABELS,
        ValueError,
        r"features must have 16 channels \(NCHW\); got 7 in shape \(2, 7, 3, 4\)",
    ),
    (
        GOOD[:, :, :0],
        LABELS,
        ValueError,
        r"features must have channels and positions; got shape \(2, 16, 0, 4\)",
    ),
    (GOOD, [0, 4], TypeError, r"target must be a tensor; got list"),
    (GOOD, LABELS.int(), TypeError, r"target must be int64 class indices .* got torch.int32"),
    (GOOD, LABELS.bool(), TypeError, r"target must be int64 class indices .* got torch.bool"),
    (GOOD, torch.eye(N, K).long(), TypeError, r"torch.int64 of shape \(2, 5\): call .float\(\) on"),
    (GOOD, torch.eye(N, K).bool(), TypeError, r"got torch.bool of shape \(2, 5\): .* or .argmax\(1\)"),
    (GOOD, LABELS[:1], ValueError, r"target with class indices must be \(N,\) = \(2,\); got \(1,\)"),
    (
        GOOD,
        LABELS.unsqueeze(1),
        ValueError,
        r"target with class indices must be \(N,\) = \(2,\); got \(2, 1\)",
    ),
    (GOOD, torch.tensor([0, 5]), ValueError, r"target must be in \[0, 5\); got 0 to 5"),
    (GOOD, torch.tensor([-100, 1]), ValueError, r"target must be in \[0, 5\); got -100 to 1"),
    (
        GOOD,
        LABELS.float(),
        ValueError,
        r"target with class probabilities must be \(N, K\) = \(2, 5\); got \(2,\)",
    ),
    (GOOD, torch.rand(N, K + 1), ValueError, r"target with class probabilities must be \(N, K\)"),
]


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
@pytest.mark.parametrize(("features", "target", "error", "message"), FORWARD)
def test_forward(
    kind: type[nn.Module], features: Any, target: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(C, K, rd_channels=2)(features, target)


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"input_fmt": "NLC"}, (N, H, W, C), r"features must be \(N, L, C\), 3-dimensional"),
        ({"input_fmt": "NHWC"}, (N, C, H, W), r"features must have 16 channels \(NHWC\); got 4"),
        (
            {"pool_type": "flatten", "feat_size": (H, W)},
            (N, C, W, H),
            r"size feat_size=\(3, 4\) .* got \(4, 3\)",
        ),
        (
            {"pool_type": "flatten", "feat_size": 3, "input_fmt": "NLC"},
            (N, 8, C),
            r"feat_size=\(9,\) .* got \(8,\)",
        ),
    ],
)
def test_formats_and_sizes(
    kind: type[nn.Module], options: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(C, K, rd_channels=2, **options)(torch.rand(shape))


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_requests_that_exclude_each_other(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="pre_logits=True returns features"):
        kind(C, K, rd_channels=2)(GOOD, LABELS, pre_logits=True)
    with pytest.raises(ValueError, match="num_classes=0"):
        kind(C, 0, rd_channels=2)(GOOD, LABELS)


def test_nothing_moves_when_the_input_is_refused() -> None:
    head = GGAMHead(C, K, rd_channels=2).train()
    with pytest.raises(ValueError, match="target"):
        head(GOOD, torch.tensor([0, 5]))
    assert head.classifier[0].num_batches_tracked == 0


def test_a_custom_classifier_of_another_width() -> None:
    head = GGAMHead(C, K, rd_channels=2, classifier=nn.Linear(C, K + 2))
    with pytest.raises(
        ValueError, match=r"classifier must return scores \(N, num_classes\) = \(2, 5\); got \(2, 7\)"
    ):
        head(GOOD, LABELS)


def test_triton_takes_no_float64() -> None:
    with pytest.raises(
        TypeError, match=r'backend="triton" takes float32, bfloat16 and float16 features; got float64'
    ):
        GGAMHead(C, K, rd_channels=2, backend="triton").double()(GOOD.double())


LOSS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: GGAMLoss(-0.1), ValueError, r"guidance_weight must be finite and not negative; got -0.1"),
    (lambda: GGAMLoss(float("inf")), ValueError, r"guidance_weight must be finite and not negative; got inf"),
    (lambda: GGAMLoss(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
    (lambda: GGAMLoss(weight=[1.0]), TypeError, r"weight must be a floating-point tensor \(K,\).*; got list"),
    (lambda: GGAMLoss(weight=torch.ones(K, 1)), ValueError, r"weight must be \(K,\).*; got shape \(5, 1\)"),
    (
        lambda: GGAMLoss(0, weight=torch.ones(3))(torch.rand(N, K), LABELS),
        ValueError,
        r"weight must be \(K,\) = \(5,\); got \(3,\)",
    ),
    (lambda: GGAMLoss(reduction="sum"), ValueError, r"reduction must be one of 'mean', 'none'; got 'sum'"),
    (
        lambda: GGAMLoss(reduction="none")(GGAMHead(C, K)(torch.rand(N, C, 2, 2), LABELS), LABELS),
        ValueError,
        r'reduction="none" needs guidance_weight=0, or a head with guidance_reduction="none".*=0.001',
    ),
    (lambda: GGAMLoss()("logits", LABELS), TypeError, r"out must be .*GGAMOutput.*; got str"),
    (lambda: GGAMLoss()(torch.rand(N), LABELS), ValueError, r"out must be .*\(N, K\).*; got shape \(2,\)"),
    (lambda: GGAMLoss()(torch.rand(N, K), torch.tensor([0, 5])), ValueError, r"target must be in \[0, 5\)"),
    (lambda: GGAMLoss()(torch.rand(N, K), torch.rand(N, 2)), ValueError, r"target with class probabilities"),
    (lambda: GGAMLoss()(torch.rand(N, K), LABELS[:1]), ValueError, r"target with class indices"),
]


@pytest.mark.parametrize(("call", "error", "message"), LOSS)
def test_loss(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


S = torch.rand(N, C).softmax(1)
WEIGHTS = {
    "fc1_weight": torch.rand(2, C),
    "fc1_bias": torch.rand(2),
    "fc2_weight": torch.rand(C, 2),
    "fc2_bias": torch.rand(C),
}
FUNCTIONAL: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: functional.ggam_attention(GOOD, **{**WEIGHTS, "fc1_weight": [1.0]}),
        TypeError,
        r"fc1_weight must be a floating-point tensor \(C/r, C\); got list",
    ),
    (
        lambda: functional.ggam_attention(GOOD, **{**WEIGHTS, "fc1_weight": torch.rand(0, C)}),
        ValueError,
        r"fc1_weight must have at least one row; got shape \(0, 16\)",
    ),
    (
        lambda: functional.channel_sum(GOOD, S[:1]),
        ValueError,
        r"channel_weights must be \(N, C\) = \(2, 16\); got \(1, 16\)",
    ),
    (
        lambda: functional.channel_sum(GOOD, S.long()),
        TypeError,
        r"channel_weights must be a floating-point tensor",
    ),
    (lambda: functional.channel_sum(GOOD.int(), S), TypeError, r"features must be float32"),
    (lambda: functional.channel_sum(GOOD, S, input_fmt="HWC"), ValueError, r"input_fmt must be one of"),
    (lambda: functional.channel_sum(GOOD, S, backend="gpu"), ValueError, r"backend must be one of"),
    (
        lambda: functional.spatial_sum(GOOD, GOOD[:, 0].flatten(1)),
        ValueError,
        r"spatial_weights must be .* \(2, 3, 4\); got \(2, 12\)",
    ),
    (
        lambda: functional.spatial_sum(GOOD, 1.0),
        TypeError,
        r"spatial_weights must be a floating-point tensor .*; got float",
    ),
    (
        lambda: functional.ggam_attention(GOOD),
        ValueError,
        r"needs fc1_weight, fc1_bias, fc2_weight and fc2_bias",
    ),
    (
        lambda: functional.ggam_attention(GOOD, **{**WEIGHTS, "fc1_weight": torch.rand(2, C + 1)}),
        ValueError,
        r"fc1_weight must be \(C/r, C\) = \(2, 16\); got \(2, 17\)",
    ),
    (
        lambda: functional.ggam_attention(GOOD, **{**WEIGHTS, "fc2_bias": torch.rand(C).long()}),
        TypeError,
        r"fc2_bias must be a floating-point tensor",
    ),
    (
        lambda: functional.ggam_attention(GOOD, **{**WEIGHTS, "fc2_weight": torch.rand(2, C)}),
        ValueError,
        r"fc2_weight must be \(C, C/r\) = \(16, 2\); got \(2, 16\)",
    ),
    (
        lambda: functional.ggam_attention(GOOD, attention="spatial", pool_type="mean"),
        ValueError,
        r"pool_type must be one of",
    ),
    (
        lambda: functional.ggam_attention(GOOD, attention="spatial", spatial_norm="max"),
        ValueError,
        r"spatial_norm must be one of",
    ),
    (
        lambda: functional.grad_cam_weights(GOOD, S[:, :3], **WEIGHTS),
        ValueError,
        r"grad_attended must be \(N, C\) = \(2, 16\); got \(2, 3\)",
    ),
    (
        lambda: functional.grad_cam_weights(GOOD, S, **WEIGHTS, pool_type="flatten"),
        ValueError,
        r"grad_attended must be \(N, C\*L\) = \(2, 192\)",
    ),
    (
        lambda: functional.grad_cam_weights(GOOD, S, **WEIGHTS, pool_type=""),
        ValueError,
        r"grad_attended must be the map's shape",
    ),
    (
        lambda: functional.grad_cam_weights(GOOD, S, **WEIGHTS, cam_at="logits"),
        ValueError,
        r"cam_at must be one of",
    ),
    (
        lambda: functional.grad_cam_means(GOOD, GOOD[:1]),
        ValueError,
        r"grad must be the shape of features = .*; got \(1, 16, 3, 4\)",
    ),
    (
        lambda: functional.grad_cam_means(GOOD, GOOD, S),
        ValueError,
        r"spatial_attention must be \(N, H, W\) = \(2, 3, 4\); got \(2, 16\)",
    ),
    (
        lambda: functional.guidance_loss([0.5], S),
        TypeError,
        r"channel_attention must be a floating-point tensor .*; got list",
    ),
    (
        lambda: functional.guidance_loss(S[0], S),
        ValueError,
        r"channel_attention must be \(N, C\); got shape \(16,\)",
    ),
    (
        lambda: functional.guidance_loss(S, S[:1]),
        ValueError,
        r"cam_weights must be \(N, C\) = \(2, 16\); got \(1, 16\)",
    ),
    (lambda: functional.guidance_loss(S, S, cam_norm="tanh"), ValueError, r"cam_norm must be one of"),
    (
        lambda: functional.guidance_loss(S, S, cam_temperature=-1.0),
        ValueError,
        r"cam_temperature must be positive",
    ),
    (lambda: functional.guidance_loss(S, S, divergence="kl"), ValueError, r"divergence must be one of"),
    (lambda: functional.guidance_loss(S, S, reduction="all"), ValueError, r"reduction must be one of"),
    (lambda: cam(GOOD, S[:, 1:]), ValueError, r"channel_weights must be \(N, C\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), FUNCTIONAL)
def test_functional(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_tensors_of_another_device(backend: str) -> None:
    """A kernel would take their addresses."""
    x, target = torch.rand(2, 8, 3, 3), torch.tensor([0, 1])
    head = GGAMHead(8, 4, rd_channels=2, backend=backend)
    for call, argument in (
        (lambda: head(x, target.to("meta")), "target"),
        (lambda: functional.fused_ggam_loss(head, x, target.to("meta")), "target"),
        (lambda: GGAMLoss()(head(x), target.to("meta")), "target"),
        (lambda: functional.channel_sum(x, torch.rand(2, 8, device="meta")), "channel_weights"),
        (lambda: functional.spatial_sum(x, torch.rand(2, 3, 3, device="meta")), "spatial_weights"),
        (lambda: functional.grad_cam_means(x, x.to("meta")), "grad"),
    ):
        with pytest.raises(ValueError, match=f"{argument} must be on the device of the features, cpu"):
            call()
