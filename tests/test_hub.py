"""`HubModel`: what save_pretrained writes into a folder is what from_pretrained builds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ggam_fast

pytest.importorskip("timm")
pytest.importorskip("huggingface_hub")
safetensors = pytest.importorskip("safetensors.torch")

NAMES = ("blue", "green", "red")
OPTIONS: dict[str, Any] = {"hidden_size": 16, "rd_ratio": 0.25}


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return ggam_fast.HubModel("test_resnet", classes=NAMES, **OPTIONS, **options)


def test_there_and_back(tmp_path: Path) -> None:
    model = build(cam_norm="standardized", cam_temperature=0.5, spatial_norm="sum")
    x, y = torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    ggam_fast.GGAMLoss(0.1)(model(x, y), y).backward()  # moves the running statistics
    model.eval().save_pretrained(tmp_path / "colours")
    config = json.loads((tmp_path / "colours" / "config.json").read_text())
    assert config == {
        "name": "test_resnet", "num_classes": 3, "classes": list(NAMES), "cam_norm": "standardized",
        "cam_temperature": 0.5, "spatial_norm": "sum", **OPTIONS,
    }  # fmt: skip
    assert "library_name: ggam_fast" in (tmp_path / "colours" / "README.md").read_text()

    torch.manual_seed(1)
    same = ggam_fast.HubModel.from_pretrained(tmp_path / "colours")
    assert not same.training
    assert same.classes == NAMES
    out, expected = same(x, y), model(x, y)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    found = ggam_fast.explain(same, x)
    assert found.cam.shape == (3, 2, 2)
    torch.testing.assert_close(found.logits, same(x))
    assert same.forward_features(x).shape == (3, same.get_classifier().in_features, 2, 2)


def test_tuples_and_timm_options(tmp_path: Path) -> None:
    model = ggam_fast.HubModel(
        "test_vit", 4, img_size=(32, 48), pool_type="flatten", feat_size=(2, 3), **OPTIONS
    )
    model.eval().save_pretrained(tmp_path)
    same = ggam_fast.HubModel.from_pretrained(str(tmp_path))
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(same(x), model(x))
    assert same.classes is None


def test_timms_weights_are_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = ggam_fast.hub.create_model

    def noted(name: str, num_classes: int, pretrained: bool = False, **options: Any) -> Any:
        asked.append(pretrained)
        return create(name, num_classes, False, **options)

    monkeypatch.setattr(ggam_fast.hub, "create_model", noted)
    build(pretrained=True).save_pretrained(tmp_path)
    ggam_fast.HubModel.from_pretrained(tmp_path)
    assert asked == [True, False]


def test_other_classes(tmp_path: Path) -> None:
    model = build()
    model.reset_classifier(5, "max")
    assert model.classes is None
    model.eval().save_pretrained(tmp_path)
    same = ggam_fast.HubModel.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    assert same(x).shape == (2, 5)
    assert torch.equal(same(x), model(x))


def test_weights_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    state = safetensors.load_file(path)
    del state["model.fc.fc1.weight"]
    safetensors.save_file(state, path)
    with pytest.raises(RuntimeError, match=r"fc1\.weight"):
        ggam_fast.HubModel.from_pretrained(tmp_path)
    # A head of other options, against the options in the weights.
    build(spatial_norm="sum").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "spatial_norm": "softmax"}))
    with pytest.raises(RuntimeError, match="saved with 'sum'"), pytest.warns(UserWarning, match="sum"):
        ggam_fast.HubModel.from_pretrained(tmp_path)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"act_layer must fit into the JSON of config.json; got type"):
        build(act_layer=nn.ReLU)
    with pytest.raises(TypeError, match=r"device must fit into.*\.to\(device, dtype\)"):
        build(device=torch.device("cpu"))
    with pytest.raises(ValueError, match="classes must be num_classes=2 names; got 3"):
        build(num_classes=2)
    with pytest.raises(TypeError, match="classes must be names"):
        ggam_fast.HubModel("test_resnet", classes="abc")
    with pytest.raises(ValueError, match="num_classes must be given, or classes"):
        ggam_fast.HubModel("test_resnet")
