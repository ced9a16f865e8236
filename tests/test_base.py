"""The common base of head and reference: parameters, state, repr, and the authors' checkpoints."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput
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


# Options in the state dict


@KINDS
@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ({"spatial_norm": "sigmoid"}, {}, "spatial_norm='softmax', saved with 'sigmoid'"),
        ({}, {"pool_type": "max"}, "pool_type='max', saved with 'avg'"),
        ({"act_layer": nn.ReLU}, {}, "act_layer='ELU', saved with 'ReLU'"),
    ],
)
def test_other_logits_are_an_error(
    saved: dict[str, Any], own: dict[str, Any], message: str, kind: type[GGAMHeadBase]
) -> None:
    source, head = (kind(C, K, rd_channels=4, **options) for options in (saved, own))
    state = {f"head.{name}": x for name, x in source.state_dict().items()}
    model = nn.ModuleDict({"head": head})
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(RuntimeError, match=rf"Unexpected key.*head._extra_state \({message}"),
    ):
        model.load_state_dict(state)
    with pytest.warns(UserWarning, match=message):
        model.load_state_dict(state, strict=False)
    assert torch.equal(head.fc1.weight, source.fc1.weight)


@KINDS
def test_other_guidance_is_a_warning(kind: type[GGAMHeadBase]) -> None:
    source = kind(C, K, rd_channels=4, cam_norm="softmax", cam_temperature=0.5, norm_eps=0.1)
    head = kind(C, K, rd_channels=4)
    with pytest.warns(UserWarning, match="other options than its state dict") as caught:
        head.load_state_dict(source.state_dict())
    assert len(caught) == 1
    for text in (
        "cam_norm='sigmoid', saved with 'softmax'",
        "cam_temperature=1.0, saved with 0.5",
        "norm_eps=1e-05, saved with 0.1",
    ):
        assert text in str(caught[0].message)
    with pytest.warns(UserWarning, match="cam_norm='sigmoid', saved with 'softmax'"):
        head.set_extra_state(source.get_extra_state())


@KINDS
@pytest.mark.filterwarnings("error")
def test_equal_options_and_older_files_load_in_silence(kind: type[GGAMHeadBase]) -> None:
    options: dict[str, Any] = {"cam_norm": "softmax", "spatial_norm": "sum", "ignore_index": -1}
    source, head = (kind(C, K, rd_channels=4, **options) for _ in range(2))
    state = source.state_dict()
    head.load_state_dict(state)
    assert torch.equal(head.fc1.weight, source.fc1.weight)
    del state["_extra_state"]  # as saved before the options were
    head.load_state_dict(state)
    nn.ModuleDict({"head": head}).load_state_dict({f"head.{name}": x for name, x in state.items()})
    # A custom classifier has an activation and norms of its own.
    custom = kind(C, K, rd_channels=4, classifier=nn.Linear(C, K), **options)
    custom.load_state_dict(kind(C, K, rd_channels=4, hidden_size=0, **options).state_dict() | {
        f"classifier.{name}": x for name, x in custom.classifier.state_dict().items()
    })  # fmt: skip


def test_options_that_cannot_be_read_are_a_warning() -> None:
    head = GGAMHead(C, K, rd_channels=4)
    state = head.state_dict() | {"_extra_state": torch.tensor([1, 2], dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="the saved options cannot be read"):
        head.load_state_dict(state)


@pytest.mark.filterwarnings("error")
def test_the_options_are_a_tensor_like_any_other(tmp_path: Path) -> None:
    """What averages, files and functional calls do with a state dict."""
    head, other = (GGAMHead(C, K, rd_channels=4) for _ in range(2))
    state = head.state_dict()
    other.load_state_dict({name: (x + x) / 2 for name, x in state.items() if name != "unit_mean"} | {
        "unit_mean": state["unit_mean"]
    })  # fmt: skip
    torch.save(state, tmp_path / "head.pt")
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True), assign=True)
    x = torch.rand(2, C, 3, 3)
    out = torch.func.functional_call(head.eval(), head.state_dict(), (x,))
    assert torch.equal(out, head(x))
    assert GGAMHead(C, K, device="meta").state_dict()["_extra_state"].device.type == "cpu"
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(head, str(tmp_path / "head.safetensors"))
    safetensors.load_model(other, str(tmp_path / "head.safetensors"))
    ema = pytest.importorskip("timm.utils").ModelEmaV3(head, decay=0.5)
    ema.update(other)
    other.load_state_dict(ema.module.state_dict())


# What transformers' Trainer does with an output


def test_an_output_is_rebuilt_from_one_iterable() -> None:
    head, target = GGAMHead(C, K, rd_channels=4), torch.tensor([0, 1])
    out = head(torch.rand(2, C, 3, 3), target)
    detached = type(out)(x.detach() for x in out)
    assert isinstance(detached, GGAMOutput)
    assert all(torch.equal(a, b) for a, b in zip(detached, out, strict=True))
    logits, s, t, beta, guidance = detached
    assert detached._replace(logits=beta).logits is beta
    assert GGAMOutput(logits, s, t, cam_weights=beta, guidance_loss=guidance) == detached
    for wrong in ((), (logits,), (logits, s)):
        with pytest.raises(TypeError, match="missing"):
            GGAMOutput(*wrong)
    pickled = pickle.loads(pickle.dumps(detached))
    assert type(pickled) is GGAMOutput


@pytest.mark.slow
def test_the_trainer_of_transformers_evaluates(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.loss_fn = GGAMHead(C, K, rd_channels=4, hidden_size=0), GGAMLoss(0.1)

        def forward(self, maps: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, GGAMOutput]:
            out = self.head(maps, labels)
            return self.loss_fn(out, labels), out

    torch.manual_seed(0)
    maps, labels = torch.rand(10, C, 3, 3), torch.arange(10) % K
    rows = [{"maps": m, "labels": y} for m, y in zip(maps, labels, strict=True)]
    model, seen = Model(), []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.logits.argmax(1) == prediction.label_ids).mean())}

    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, per_device_train_batch_size=5, max_steps=2,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, settings, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
    )
    trainer.train()
    found = trainer.evaluate()
    with torch.no_grad():
        expected = model.eval()(maps, labels)[1]
    predictions = seen[-1].predictions
    assert isinstance(predictions, GGAMOutput)
    for name in ("logits", "channel_attention", "spatial_attention", "cam_weights"):
        torch.testing.assert_close(torch.tensor(getattr(predictions, name)), getattr(expected, name))
    assert len(predictions.guidance_loss) == 3  # one number a batch
    assert found["eval_accuracy"] == pytest.approx(
        float((expected.logits.argmax(1) == labels).float().mean())
    )


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
