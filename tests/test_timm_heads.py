"""The head where timm puts its own: timm's `reset_classifier` calls the head's `reset`, in every family."""

import inspect
from typing import Any

import pytest
import torch

from ggam_fast import GGAMHead
from ggam_fast.reference import GGAMHeadReference

timm = pytest.importorskip("timm")

# A small model of every family whose `reset_classifier` calls `head.reset`, and what makes it take 64 x 64.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "byobnet": ("test_byobnet", {}),
    "convnext": ("test_convnext", {}),
    "cpubone": ("cpubone_nano", {}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": ("davit_tiny", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {"img_size": 64}),
    "hieradet_sam2": ("sam2_hiera_tiny", {}),
    "inception_next": ("inception_next_atto", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("test_coatnet", {"img_size": 64}),
    "nextvit": ("nextvit_small", {}),
    "nfnet": ("test_nfnet", {}),
    "rdnet": ("rdnet_tiny", {}),
    "regnet": ("regnetx_002", {}),
    "resnetv2": ("resnetv2_18", {}),
    "rexnet": ("rexnet_100", {}),
    "sequencer": ("sequencer2d_s", {}),
    "swin_transformer": ("swin_s3_tiny_224", {"img_size": 64, "window_size": 2}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 2}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {"img_size": 64, "window_size": 2}),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tresnet": ("tresnet_m", {}),
    "vgg": ("vgg11", {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"img_size": 64}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception_aligned": ("xception41", {}),
}


def test_every_family_is_here() -> None:
    modules = {name: module for name, module in vars(timm.models).items() if inspect.ismodule(module)}
    calling = {name for name, module in modules.items() if "self.head.reset(" in inspect.getsource(module)}
    assert len(calling) > 20
    assert calling <= FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_reset_classifier_resets_the_head(family: str) -> None:
    name, options = FAMILIES[family]
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = timm.create_model(name, num_classes=7, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        shape = model.forward_features(images).shape
        input_fmt = "NLC" if len(shape) == 3 else "NCHW" if shape[1] == model.num_features else "NHWC"
        kind = GGAMHeadReference if family == "convnext" else GGAMHead
        if family == "vgg":
            model.pre_logits = torch.nn.Identity()  # stands between the map and the head
        model.head = head = kind(model.num_features, 7, input_fmt=input_fmt).eval()
        model.reset_classifier(3)
        assert model.head is head
        assert model(images).shape == (2, 3)
        assert model.head_hidden_size == head.num_features == 512
        pool = "avg" if family == "cpubone" else "max"  # it takes no other
        model.reset_classifier(0, pool)
        assert head.pool_type == pool
        assert model(images).shape == (2, 512)
        if "reset_other" in inspect.signature(model.reset_classifier).parameters:
            model.reset_classifier(5, reset_other=True)
            assert isinstance(head.classifier, torch.nn.Linear)
            assert model(images).shape == (2, 5)
    assert not any(module.training for module in head.modules())
