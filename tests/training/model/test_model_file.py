"""A saved classifier gives the same bits. Any other file gives an error of one line."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from ggam_fast.training import load_checkpoint
from ggam_fast.training.config.options import HeadConfig, TrainConfig
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model import model_file
from ggam_fast.training.model.backbones import create_backbone
from ggam_fast.training.model.classifier import GGAMClassifier, create_head

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def classifier(head: HeadConfig) -> GGAMClassifier:
    torch.manual_seed(0)
    backbone = create_backbone("test_resnet", pretrained=False, image_size=64)
    model = GGAMClassifier(backbone, create_head(backbone, 3, head))
    model.train()(IMAGES)  # changes the statistics of batch norm
    return model.eval()


def save(folder, model: GGAMClassifier, head: HeadConfig):
    config = replace(TrainConfig(), head=head)
    rows = torch.arange(3)
    files = tuple(folder / f"{name}.png" for name in "abc")
    splits = {"train": rows, "test": rows}
    images = ImageSet("three", files, rows, ("a", "b", "c"), splits, ((),), ())
    description = model_file.describe(model, images, config)
    return model_file.save_checkpoint(folder, model, description)


@pytest.mark.parametrize(
    "head",
    [
        HeadConfig(),
        HeadConfig(hidden_size=0, pool_type="flatten", attention="spatial"),
        HeadConfig(attention_scale="printed", norm_eps=0.5),
        HeadConfig.from_preset("release"),
    ],
)
def test_round_trip_gives_the_same_bits(tmp_path, head):
    model = classifier(head)
    path = save(tmp_path, model, head)
    loaded = load_checkpoint(tmp_path)
    assert loaded.classes == ("a", "b", "c")
    assert not loaded.model.training
    target = torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert loaded.model(IMAGES).equal(model(IMAGES))
        for ours, theirs in zip(loaded.model(IMAGES, target), model(IMAGES, target), strict=True):
            assert ours.equal(theirs)
        assert load_checkpoint(path).model(IMAGES).equal(model(IMAGES))


@pytest.mark.parametrize("forgotten", ["the description", "the weights", "both"])
def test_file_from_before_the_scale_and_eps_could_be_chosen(tmp_path, forgotten):
    from safetensors.torch import load_file, save_file

    model = classifier(HeadConfig(attention_scale="printed", norm_eps=1e-5))
    path = save(tmp_path, model, HeadConfig(attention_scale="printed", norm_eps=1e-5))
    tensors, description = load_file(path), json.loads((tmp_path / "config.json").read_text())
    if forgotten != "the weights":
        del description["head"]["attention_scale"], description["head"]["norm_eps"]
    if forgotten != "the description":
        del tensors["head.unit_mean"]
    save_file(tensors, path, {"ggam_fast": json.dumps(description)})
    loaded = load_checkpoint(path)
    assert loaded.model.head.attention_scale == "printed"
    assert loaded.model.head.classifier[0].eps == 1e-5
    assert loaded.model.head.classifier[0].eps != HeadConfig().norm_eps
    assert loaded.description["head"]["attention_scale"] == "printed"
    assert loaded.description["head"]["norm_eps"] == 1e-5
    with torch.no_grad():
        assert loaded.model(IMAGES).equal(model(IMAGES))


def test_json_says_what_the_weights_file_carries(tmp_path):
    path = save(tmp_path, classifier(HeadConfig()), HeadConfig())
    with safe_open(path, framework="pt") as stored:
        carried = json.loads(stored.metadata()["ggam_fast"])
    assert json.loads((tmp_path / "config.json").read_text()) == carried
    for name in ("cam_norm", "attention_scale", "norm_eps"):
        assert carried["head"][name] == getattr(HeadConfig(), name)
    assert carried["optim"]["seed"] == 0


@pytest.mark.parametrize("where", ["weights", "class name", "checksum"])
def test_a_flipped_bit_is_noticed(tmp_path, where):
    path = save(tmp_path, classifier(HeadConfig()), HeadConfig())
    content = bytearray(path.read_bytes())
    place = {
        "weights": len(content) - 100,
        "class name": content.index(b"classes") + 14,
        "checksum": content.index(b"sha256") + 20,
    }
    content[place[where]] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrainError, match=r"checkpoint \S+model\.safetensors is damaged: its bytes are not"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_what_is_no_checkpoint_is_one_line(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainError, match=r"model\.safetensors") as raised:
        load_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"classes": ["a", "b"]},
        {"head": {"hidden_size": 7}},
        {"head": {"attention": "sideways"}},
        {"head": {"of_a_later_version": 1}},
        {"backbone": {"name": "test_vit", "image_size": 160, "resize": 160}},
        {"backbone": {"name": "nonesuch", "image_size": 64, "resize": 64}},
        {"backbone": None},
        {"head": None},
    ],
)
def test_weights_of_another_architecture_are_one_line(tmp_path, changed):
    from safetensors.torch import load_file, save_file

    path = save(tmp_path, classifier(HeadConfig()), HeadConfig())
    description = json.loads((tmp_path / "config.json").read_text()) | changed
    description = {name: value for name, value in description.items() if value is not None}
    save_file(load_file(path), path, {"ggam_fast": json.dumps(description)})
    with pytest.raises(TrainError, match=r"model\.safetensors is of another architecture") as raised:
        load_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_weights_of_another_program_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(TrainError, match="must be a checkpoint written by ggam_fast"):
        load_checkpoint(tmp_path)
