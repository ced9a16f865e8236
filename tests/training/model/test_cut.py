"""A backbone in two parts computes what the whole computes, in training too."""

import copy

import pytest
import torch

from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.backbones import create_backbone
from ggam_fast.training.model.cut import cut, with_last


def backbone(name):
    torch.manual_seed(0)
    found = create_backbone(name, pretrained=False, image_size=None if "swin" in name else 64)
    with torch.no_grad():  # statistics unlike the initial ones
        found.train()(torch.randn(4, 3, found.image_size, found.image_size))
    return found


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("test_resnet", "layer4"),
        ("resnet18", "layer4.1"),
        ("test_efficientnet", "blocks.3"),
        ("mobilenetv3_small_100", "blocks.4"),
        ("test_convnext", "stages.3"),
        ("regnetx_002", "s4"),
        ("vgg11", "features.8"),
        ("test_vit", "blocks.3"),
        ("test_maxvit", "stages.2"),
        ("xcit_nano_12_p16_224", "blocks.9"),
        ("swin_tiny_patch4_window7_224", "layers.3"),
    ],
)
def test_the_parts_are_the_whole(name, before):
    whole = backbone(name)
    first, last = cut(whole.eval(), before)
    images = torch.randn(2, 3, whole.image_size, whole.image_size)
    entered = []
    hook = whole.model.get_submodule(before).register_forward_pre_hook(
        lambda _, given: entered.append(given[0])
    )
    with torch.no_grad():
        expected = whole(images)
        hook.remove()
        maps = first(images)
        assert maps.equal(entered[0])
        assert maps.shape[1:] == first.map_shape
        assert last(maps).equal(expected)
    names = {f"model.{before}.{name}" for name, _ in whole.model.get_submodule(before).named_parameters()}
    trained = dict(last.layers.named_parameters())
    assert names <= trained.keys()
    assert not trained.keys() & dict(first.layers.named_parameters()).keys()
    weights = dict(whole.named_parameters())
    assert all(weights[name] is value for name, value in trained.items())


def test_a_trained_copy_of_the_last_layers_makes_a_whole_backbone():
    whole = backbone("test_resnet").eval()
    before = copy.deepcopy(whole.state_dict())
    first, last = cut(whole, "layer4")
    copied = copy.deepcopy(last).train()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        maps = first(images)
        copied(maps)  # statistics of batch norm
        for value in copied.parameters():
            value.mul_(1.1)
        joined = with_last(whole, copied).eval()
        assert joined(images).equal(copied.eval()(maps))
    assert all(value.equal(before[name]) for name, value in whole.state_dict().items())
    moved = {name for name, value in joined.state_dict().items() if not value.equal(before[name])}
    assert moved
    assert all(name.startswith("model.layer4.") for name in moved)


def test_the_fingerprint_is_that_of_the_first_layers_and_the_place():
    whole = backbone("test_resnet").eval()
    one, last = cut(whole, "layer4")
    other, _ = cut(whole, "layer3")
    found = {one.fingerprint(), other.fingerprint(), whole.fingerprint()}
    assert len(found) == 3
    with torch.no_grad():
        next(last.parameters()).mul_(2)
        assert one.fingerprint() in found
        next(one.parameters()).mul_(2)
    assert one.fingerprint() not in found


@pytest.mark.parametrize(
    ("name", "before", "reason"),
    [
        ("test_resnet", "layer9", "there is no such module"),
        ("test_resnet", "", "there is no such module"),
        ("test_resnet", "global_pool", "it is not run to compute feature maps"),
        ("test_resnet", "layer2.0.conv2", "data pass it by, as inside a residual block"),
        ("test_resnet", "conv1", "nothing comes before it, and --finetune trains everything"),
        ("test_resnet", "layer4.0.act2", "it has no weights, and nor does what follows"),
        ("hrnet_w18_small", "stage4", "it does not take one tensor"),
    ],
)
def test_modules_that_cannot_be_used_are_named_with_those_that_can(name, before, reason):
    with pytest.raises(
        TrainError, match=rf"^--finetune-from {before} cannot be used, because {reason};"
    ) as raised:
        cut(backbone(name), before)
    usable = "bn1, layer1, layer2, layer3, layer4" if name == "test_resnet" else "bn1, conv2"
    assert f"modules of {name} that can be used: {usable}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_modes_stay_as_they_were():
    """Random parts of a network, such as dropped paths, are recorded as modules with a mode of their own."""
    whole = backbone("test_vit")
    for training in (True, False):
        first, last = cut(whole.train(training), "blocks.3")
        modules = [*whole.modules(), *first.layers.model.modules(), *last.layers.model.modules()]
        assert {one.training for one in modules} == {training}
