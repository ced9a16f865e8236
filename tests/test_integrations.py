"""`create_model` and `replace_head`: models of timm, of torchvision and of one's own."""

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ggam_fast
from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, integrations
from tests.parity import relative_error

timm = pytest.importorskip("timm")
optim = pytest.importorskip("timm.optim")
torchvision = pytest.importorskip("torchvision")

K = 7

# name: options, layout, prefix tokens, where the head stands, removed layers
TIMM: dict[str, tuple[dict[str, Any], str, int, str, tuple[str, ...]]] = {
    "test_resnet": ({}, "NCHW", 0, "fc", ()),
    "test_convnext": ({}, "NCHW", 0, "head", ()),
    "test_efficientnet": ({}, "NCHW", 0, "classifier", ()),
    "test_vit": ({"img_size": 32}, "NLC", 1, "head", ()),
    "test_vit3": ({"img_size": 32, "reg_tokens": 2}, "NLC", 2, "head", ("attn_pool",)),
    "regnetx_002": ({}, "NCHW", 0, "head", ()),
    "mobilenetv3_small_050": ({}, "NCHW", 0, "classifier", ("conv_head",)),
    "vgg11": ({}, "NCHW", 0, "head", ("pre_logits",)),
    "swin_s3_tiny_224": ({"img_size": 64, "window_size": 2}, "NHWC", 0, "head", ()),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32}, "NLC", 2, "head", ("head_dist",)),
    "hiera_tiny_224": ({"img_size": 64}, "NLC", 0, "head", ()),
}
SMALL = [name for name in TIMM if name.startswith("test_")]
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in TIMM if name not in SMALL]


def images(name: str, n: int = 3) -> Tensor:
    side = TIMM[name][0].get("img_size", 64) if name in TIMM else 64
    return torch.randn(n, 3, side, side)


def create(name: str, **options: Any) -> Any:
    return ggam_fast.create_model(
        name, K, **TIMM[name][0], **{"rd_ratio": 0.25, "hidden_size": 16, **options}
    )


def check_gradients(model: nn.Module, x: Tensor, target: Tensor) -> None:
    """A guided step in training mode reaches every parameter."""
    model.train()
    GGAMLoss(0.1)(model(x, target), target).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_timm(name: str) -> None:
    _, input_fmt, prefix, place, removed = TIMM[name]
    model, x, target = create(name), images(name), torch.tensor([0, 3, 6])
    head = model.get_classifier()
    assert head is getattr(model, place)
    assert isinstance(head, GGAMHead)
    assert (head.input_fmt, head.prefix_tokens, head.num_classes) == (input_fmt, prefix, K)
    assert isinstance(model, type(timm.create_model(name, num_classes=K, **TIMM[name][0])))
    assert all(isinstance(model.get_submodule(path), nn.Identity) for path in removed)
    check_gradients(model, x, target)

    # The same by hand: timm's model without pooling and classifier, and a head beside it.
    model.eval()
    features = model.forward_features(x)
    by_hand = GGAMHead(
        model.num_features, K, input_fmt=input_fmt, prefix_tokens=prefix, rd_ratio=0.25, hidden_size=16
    ).eval()
    by_hand.load_state_dict(head.state_dict())
    out, expected = model(x, target), by_hand(features, target)
    assert isinstance(out, GGAMOutput)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert torch.equal(model(x), expected.logits)
    assert model.forward_head(features, pre_logits=True).shape == (3, 16)

    again = create(name).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), out.logits)


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_what_timm_asks_of_its_models(name: str) -> None:
    original = timm.create_model(name, num_classes=K, **TIMM[name][0])
    model = create(name)
    for attribute in ("default_cfg", "pretrained_cfg", "num_features"):
        assert getattr(model, attribute, None) == getattr(original, attribute, None)
    if hasattr(original, "no_weight_decay"):
        assert model.no_weight_decay() == original.no_weight_decay()

    # Layer decay: the head is in the last group, which keeps the whole rate.
    groups = optim.param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scale[id(p)] for p in model.get_classifier().parameters()} == {1.0}
    assert min(scale.values()) < 0.5

    if name != "vgg11":  # timm's has none
        model.set_grad_checkpointing(True)
        check_gradients(model, images(name), torch.tensor([0, 3, 6]))
        model.set_grad_checkpointing(False)

    model.reset_classifier(4)
    assert model.num_classes == model.get_classifier().num_classes == 4
    assert model.eval()(images(name)).shape == (3, 4)
    model.reset_classifier(0, "max")
    assert model(images(name)).shape == (3, 16)
    with pytest.raises(ValueError, match="pool_type must be one of"):
        model.reset_classifier(4, "token")
    assert model.num_classes == 0


@pytest.mark.parametrize("name", ["test_vit", pytest.param("swin_s3_tiny_224", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [{}, {"pool_type": "max"}, {"pool_type": "flatten"}, {"cam_norm": "standardized", "cam_at": "attended"}],
)
def test_options_are_those_of_a_map(name: str, options: dict[str, Any]) -> None:
    """Tokens and NHWC maps give what the same features give as NCHW."""
    model, x, target = create(name, **options).eval(), images(name), torch.tensor([0, 3, 6])
    head, features = model.get_classifier(), model.forward_features(x)
    if features.dim() == 3:
        side = round((features.shape[1] - 1) ** 0.5)
        features = features[:, 1:].unflatten(1, (side, side))
    nchw = features.permute(0, 3, 1, 2)
    size = {"feat_size": tuple(nchw.shape[2:])} if "pool_type" in options else {}
    other = GGAMHead(head.in_features, K, rd_ratio=0.25, hidden_size=16, **{**options, **size}).eval()
    state = head.state_dict()
    del state["_extra_state"]  # prefix_tokens differ
    other.load_state_dict(state)
    for found, expected in zip(model(x, target), other(nchw, target), strict=True):
        assert relative_error(found, expected.reshape(found.shape)) < 1e-5


def test_a_norm_behind_pooling_moves_in_front_of_the_head(caplog: pytest.LogCaptureFixture) -> None:
    """timm's `fc_norm`, which would have no gradient."""
    model = timm.create_model("test_vit", img_size=32, global_pool="avg")
    fc_norm = model.fc_norm
    assert isinstance(model.norm, nn.Identity)
    with caplog.at_level(logging.INFO, "ggam_fast.integrations"):
        ggam_fast.replace_head(model, K)
    assert model.norm is fc_norm
    assert (
        "VisionTransformer: head (was Linear) is a GGAMHead of 7 classes on forward_features" in caplog.text
    )
    assert "prefix_tokens=1; fc_norm, which followed pooling, is now norm" in caplog.text
    check_gradients(model, images("test_vit"), torch.tensor([0, 3, 6]))


def test_timm_options_and_channels() -> None:
    model = ggam_fast.create_model(
        "test_resnet", K, in_chans=1, drop_path_rate=0.1, drop_rate=0.3, dtype=torch.float64, rd_channels=3
    )
    head = model.get_classifier()
    assert head.drop.p == 0.3
    assert head.rd_channels == 3
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.eval()(torch.randn(2, 1, 64, 64, dtype=torch.float64)).shape == (2, K)


def test_another_feature_layer_of_a_timm_model() -> None:
    model = ggam_fast.create_model("test_resnet", K, feature_layer="layer3", rd_ratio=0.25)
    assert isinstance(model.layer4, nn.Identity)
    x, target = images("test_resnet"), torch.tensor([0, 3, 6])
    check_gradients(model, x, target)
    model.eval()
    features = x
    for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"):
        features = getattr(model, name)(features)
    assert torch.equal(model(x), model.fc(features))


# name: feature layer, where the head stands
TORCHVISION = {
    "resnet18": ("layer4", "fc"),
    "vgg11": ("features", "classifier"),
    "convnext_tiny": ("features", "classifier"),
    "mobilenet_v3_small": ("features", "classifier"),
    "swin_t": ("permute", "head"),
    "vit_b_16": ("encoder", "heads"),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "resnet18" else pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION],
)
def test_torchvision(name: str) -> None:
    layer, place = TORCHVISION[name]
    sized = {"image_size": 32} if name == "vit_b_16" else {}
    model = torchvision.models.get_model(name, num_classes=3, **sized)
    names = {n for n, _ in model.named_parameters() if not n.startswith(place)}
    model = ggam_fast.replace_head(model, K, cam_norm="standardized", hidden_size=16)
    head = model.get_classifier()
    assert head is getattr(model, place)
    assert model._ggam.feature_layer == layer
    assert {n for n, _ in model.named_parameters() if not n.startswith(place)} == names
    side = 32 if name == "vit_b_16" else 64
    x, target = torch.randn(3, 3, side, side), torch.tensor([0, 3, 6])
    check_gradients(model, x, target)

    model.eval()
    captured: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda *a: captured.append(a[2]), prepend=True)
    out = model(x, target)
    hook.remove()
    assert torch.equal(out.logits, head(captured[0]))
    assert torch.equal(model(x), out.logits)
    assert head.prefix_tokens == (1 if name == "vit_b_16" else 0)
    model.reset_classifier(2)
    assert model(x).shape == (3, 2)


class Own(nn.Module):
    """A model of one's own: what stands between the layers is not a module."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, stride=4), nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU())
        self.top, self.in_place = nn.Linear(32, 5), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.mul_(2) if self.in_place else x * 2
        return self.top(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_of_ones_own(in_place: bool) -> None:
    model = Own(in_place)
    expected = model.body(model.stem(torch.ones(2, 3, 32, 32)) * 2)
    model = ggam_fast.replace_head(model, K, feature_layer="body", rd_ratio=0.25, input_size=(3, 32, 32))
    assert isinstance(model, Own)
    assert model.get_classifier() is model.top
    assert torch.equal(model.forward_features(torch.ones(2, 3, 32, 32)), expected)
    check_gradients(model, torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 6]))
    with pytest.raises(integrations.FeaturesReached, match="call the model, or its forward_features"):
        model.body(torch.ones(2, 16, 7, 7))


def test_a_chain_of_layers() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    model = ggam_fast.replace_head(layers, K, feature_layer="1", input_size=(3, 9, 9))
    assert model._ggam.chain == ("0", "1")
    assert isinstance(layers[4], GGAMHead)
    assert model(torch.randn(2, 3, 9, 9)).shape == (2, K)
    check_gradients(model, torch.randn(3, 3, 9, 9), torch.tensor([0, 3, 6]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layer", "prefix", "options"),
    [
        ("ResNet", "resnet.encoder.stages.3", 0, {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64],
                                                  "depths": [1, 1, 1, 1], "layer_type": "basic"}),
        ("ViT", "vit.layernorm", 1, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                                     "intermediate_size": 64, "image_size": 32, "patch_size": 8}),
    ],
)  # fmt: skip
def test_hugging_face(kind: str, layer: str, prefix: int, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(num_labels=3, **options)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    model = ggam_fast.replace_head(model, K, feature_layer=layer, rd_ratio=0.25)
    assert model.get_classifier() is model.classifier
    assert model.classifier.prefix_tokens == prefix
    x = torch.randn(3, 3, 32, 32)
    check_gradients(model, x, torch.tensor([0, 3, 6]))
    base = getattr(model, kind.lower())
    with pytest.raises(integrations.FeaturesReached):
        base(x)
    assert model.eval()(x).shape == (3, K)


class MakesFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 16, 3, stride=2), nn.Linear(16, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))


@pytest.fixture(params=["features", "layer"])
def guided(request: pytest.FixtureRequest) -> Any:
    if request.param == "features":
        return ggam_fast.replace_head(MakesFeatures(), K)
    return ggam_fast.replace_head(Own(), K, feature_layer="body", rd_ratio=0.25)


def test_a_copy_and_a_pickle_are_whole(guided: Any) -> None:
    x = torch.randn(2, 3, 32, 32)
    expected = guided.eval()(x)
    file = io.BytesIO()
    torch.save(guided, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(guided), pickle.loads(pickle.dumps(guided)), loaded):
        assert type(twin) is type(guided)
        assert torch.equal(twin(x), expected)
        assert twin.get_classifier() is not guided.get_classifier()
    target = torch.tensor([0, 3])
    assert torch.equal(copy.deepcopy(guided)(x, target).logits, expected)


def test_compiles_without_a_break(guided: Any) -> None:
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    guided.eval()
    compiled = torch.compile(guided, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), guided(x)) < 1e-5
    for found, expected in zip(compiled(x, target), guided(x, target), strict=True):
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("by_layer", [False, True])
def test_exports(by_layer: bool) -> None:
    if by_layer:
        model = ggam_fast.replace_head(torchvision.models.resnet18(), K).eval()
    else:
        model = create("test_vit").eval()
    x = torch.randn(2, 3, 64, 64) if by_layer else images("test_vit")
    exported = torch.export.export(model, (x,))
    assert relative_error(exported.module()(x), model(x)) < 1e-5


def test_the_modes_and_statistics_of_the_model_stay() -> None:
    model = torchvision.models.resnet18()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: x.clone() for name, x in model.state_dict().items()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    integrations._trace(model, "layer4", (3, 64, 64))
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    ggam_fast.replace_head(model, K)
    assert not model.layer1[0].training
    assert model.fc.training


class Lists(MakesFeatures):
    def forward_features(self, x: Tensor) -> Any:
        return [self.body(x)]


class Pooled(MakesFeatures):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


class ClassTokens(MakesFeatures):
    num_prefix_tokens = 1

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3)).unsqueeze(1)


BODY = {"feature_layer": "body"}


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        ("resnet18", {}, TypeError, "model must be an nn.Module; got str"),
        (nn.DataParallel(Own()), {}, TypeError, "itself; got DataParallel: replace the head first, and wrap"),
        (torch.compile(Own()), {}, TypeError, "must be the module itself; got OptimizedModule"),
        (Own(), {}, ValueError, r"has no forward_features.*the last that gives one is 'body', of shape"),
        (Own(), {"feature_layer": "bodi"}, ValueError, "got 'bodi'; the nearest: body"),
        (Own(), {"feature_layer": 3}, ValueError, "feature_layer must be the name of a layer"),
        (Own(), {"feature_layer": "top"}, ValueError, r"got shape \(2, 5\): name a layer before pooling"),
        (Own(), {**BODY, "num_classes": -1}, ValueError, "num_classes must be at least 0"),
        (Own(), {**BODY, "pool_type": "l2"}, ValueError, "pool_type must be one of"),
        (Own(), {**BODY, "in_features": 8}, ValueError, "in_features must be the model's 32"),
        (Own(), {**BODY, "input_size": (32,)}, ValueError, r"input_size must be \(channels, "),
        (Own(), {**BODY, "input_size": (1, 32, 32)}, ValueError, r"does not take images \(1, 32, 32\)"),
        (Own(), {**BODY, "hiden": 1}, TypeError, "hiden"),
        (Lists(), {}, ValueError, "must be one tensor; got list: name another feature_layer="),
        (Pooled(), {}, ValueError, r"got shape \(2, 16\): name a layer before pooling as feature_layer="),
        (ClassTokens(), {}, ValueError, "prefix_tokens=1 leaves no patch"),
        (nn.Flatten(), {}, ValueError, "has no layer that gives a feature map"),
    ],
)  # fmt: skip
def test_what_cannot_work_says_so(
    model: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    kind = type(model)
    with pytest.raises(error, match=message):
        ggam_fast.replace_head(model, **{"num_classes": K, "rd_ratio": 0.25, **arguments})
    assert type(model) is kind
    if isinstance(model, nn.Module):
        assert dict(model.named_modules()) == before


@pytest.mark.slow
def test_parameters_of_another_output_are_named() -> None:
    model = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    with pytest.raises(ValueError, match=r"without a gradient: aux1\.conv\.conv\.weight, .* and 11 more"):
        ggam_fast.replace_head(model, K)
    model.aux1.requires_grad_(False)
    model.aux2.requires_grad_(False)
    ggam_fast.replace_head(model, K)


def test_a_sharded_model_is_refused() -> None:
    model: Any = MakesFeatures()
    model.body.weight.full_tensor = None  # what tells a DTensor from others
    with pytest.raises(TypeError, match=r"got body\.weight sharded: replace the head, then shard"):
        ggam_fast.replace_head(model, K)


def test_a_second_head_is_refused(guided: Any) -> None:
    with pytest.raises(ValueError, match=r"has a GGAM head already: model\.reset_classifier\(num_classes\)"):
        ggam_fast.replace_head(guided, K)


def test_names_that_timm_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"name must be a model of timm; got 'resnet5'; the nearest names: "):
        ggam_fast.create_model("resnet5", K)
    with pytest.raises(ValueError, match=r"must be one tensor; got list"):
        ggam_fast.create_model("crossvit_9_240", K)
