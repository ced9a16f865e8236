"""Each option of the training loop does what its help says."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3

from ggam_fast.training import load_checkpoint
from ggam_fast.training.config.options import OptimConfig
from ggam_fast.training.data.balance import class_weights, row_weights
from ggam_fast.training.data.batches import MapBatches
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.batch_statistics import settled
from ggam_fast.training.run.loop import Trainer
from ggam_fast.training.run.prepare import image_batches, load_images
from ggam_fast.training.run.train import train
from tests.training.run.stopped import Stopped, stop_after
from tests.training.runs import numbers, said, with_


def fitted(head, batches, **options) -> Trainer:
    optim = OptimConfig(epochs=1, schedule="cosine", optimizer="sgd", lr=0.1, weight_decay=0, **options)
    fit = Trainer(head, [{"params": list(head.parameters()), "lr": 0.1}], optim, 3, torch.device("cpu"))
    fit.run(batches, None)
    return fit


@pytest.fixture
def maps():
    features = torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(16) % 3
    return lambda size: MapBatches(features, labels, size, torch.device("cpu"), shuffle_seed=0)


def new_head(hidden_size=0, classes=3):
    import ggam_fast

    torch.manual_seed(0)
    return ggam_fast.GGAMHead(8, classes, hidden_size=hidden_size, rd_channels=4)


def test_accumulated_gradients_are_those_of_one_batch(maps):
    whole = fitted(new_head(), maps(8))
    parts = fitted(new_head(), maps(2), accumulate=4)
    assert whole.steps == parts.steps == 2
    for ours, theirs in zip(parts.trained.parameters(), whole.trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_left_over_of_an_epoch_is_a_step_of_its_own(maps):
    fit = fitted(new_head(), maps(4), accumulate=3)
    assert fit.steps == 2
    assert all(p.grad is None for p in fit.trained.parameters())
    # An epoch of a single batch, with accumulate above 1, takes one ordinary step.
    alone = fitted(new_head(), maps(16), accumulate=4)
    for ours, theirs in zip(
        alone.trained.parameters(), fitted(new_head(), maps(16)).trained.parameters(), strict=True
    ):
        assert ours.equal(theirs)


def test_average_is_the_running_one(maps):
    states = []

    class Recorded(Trainer):
        def _step(self):
            super()._step()
            states.append(copy.deepcopy(self.trained.state_dict()))

    head = new_head(hidden_size=4)  # with batch norm
    optim = OptimConfig(epochs=4, ema=0.6)
    fit = Recorded(head, [{"params": list(head.parameters()), "lr": 0.1}], optim, 3, torch.device("cpu"))
    fit.run(maps(4), None)
    assert settled(head, 16)
    weights, found = dict(head.named_parameters()), fit.result.state_dict()
    for name, value in found.items():
        expected = states[0][name]
        for step, state in enumerate(states[1:], 2):
            # The decay warms up as 1 - step^(-2/3), so the first weights are soon forgotten.
            decay = min(0.6, 1 - step ** (-2 / 3))
            expected = decay * expected + (1 - decay) * state[name] if name in weights else state[name]
        torch.testing.assert_close(value, expected)
    assert fit.last is head
    assert not all(value.equal(found[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    "options",
    [
        {"optim": {"ema": 0.999}},
        {"optim": {"ema": 0.999}, "backbone": {"finetune": True}},
        {"backbone": {"finetune": True}},
        {"optim": {"ema": 0.999}, "backbone": {"finetune_from": "layer4"}},
        {"head": {"attention_scale": "printed", "norm_eps": 1e-5}},
    ],
    ids=["average", "fine-tuned average", "fine-tuned", "last layers", "printed scale"],
)
def test_short_run_saves_a_classifier_as_good_as_it_was_in_training(tiny_config, report, options):
    """What is saved takes no first values along: neither weights nor statistics of batch norm."""
    config = with_(tiny_config, lr=3e-3)
    for part, values in options.items():
        config = replace(config, **{part: replace(getattr(config, part), **values)})
    assert train(config, report).metrics.accuracy == 1.0
    model = load_checkpoint(config.run.out).model
    images = load_images(config.data)
    batches = image_batches(images, model, config, torch.device("cpu"))["test"]
    inputs = torch.cat([some for some, _ in batches.epoch(0)])
    with torch.no_grad():
        tested = model(inputs).softmax(1).amax(1).mean()
        model.head.train()
        model.backbone.train(config.backbone.finetune)
        if config.backbone.finetune_from is not None:
            model.backbone.model.get_submodule(config.backbone.finetune_from).train()
        trained = model(inputs).softmax(1).amax(1).mean()
    assert tested.item() == pytest.approx(trained.item(), abs=0.1)


def test_averaged_and_last_weights_are_compared(tiny_config, report, elsewhere, monkeypatch):
    config = with_(tiny_config, lr=3e-3, ema=0.999)
    train(config, report)
    results = json.loads((config.run.out / "metrics.json").read_text())
    assert results["test"]["accuracy"] == results["test_last"]["accuracy"] == 1.0
    assert "test accuracy of the averaged weights 1.000, of the last 1.000" in said(report)
    monkeypatch.setattr(ModelEmaV3, "update", lambda average, model, step: None)
    config = elsewhere(config, "never")
    train(config, report)
    results = json.loads((config.run.out / "metrics.json").read_text())
    assert results["test"]["accuracy"] < results["test_last"]["accuracy"] == 1.0
    assert "a lower --ema than 0.999 may help" in said(report)


@pytest.mark.parametrize("how", ["plain", "class weights", "balanced sampling"])
def test_a_rare_class_counts_as_much_as_a_frequent_one(how):
    """Of images that look all the same, a classifier learns how often each class counts."""
    labels = torch.tensor([0] * 14 + [1] * 2)
    features = torch.ones(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    device, head = torch.device("cpu"), new_head(classes=2)
    rows = row_weights(labels) if how == "balanced sampling" else None
    classes = class_weights(labels, 2) if how == "class weights" else None
    optim = OptimConfig(epochs=60, lr=0.1, weight_decay=0, guidance_weight=0)
    groups = [{"params": list(head.parameters()), "lr": 0.1}]
    fit = Trainer(head, groups, optim, 2, device, class_weights=classes)
    fit.run(MapBatches(features, labels, 16, device, shuffle_seed=0, weights=rows), None)
    rare = head.eval()(features[:1]).softmax(1)[0, 1].item()
    assert rare == pytest.approx(1 / 8 if how == "plain" else 1 / 2, abs=0.1)


@pytest.mark.parametrize("finetune", [False, True])
def test_options_for_rare_classes_reach_the_loop(tiny_config, report, monkeypatch, photos, finetune):
    for index in range(3, 10):
        (photos / "red" / f"{index}.png").unlink()
    seen = []

    def stop(trainer, batches, *_, **__):
        seen.append((trainer, batches))
        raise Stopped

    monkeypatch.setattr(Trainer, "run", stop)
    tuned = replace(tiny_config, backbone=replace(tiny_config.backbone, finetune=finetune))
    for options in {"class_weights": "balanced"}, {"balanced_sampling": True}:
        config = with_(replace(tuned, run=replace(tuned.run, overwrite=True)), **options)
        with pytest.raises(Stopped):
            train(config, report)
    (weighted, shuffled), (plain, drawn) = seen
    images = load_images(tiny_config.data)
    counts = images.labels[images.splits["train"]].bincount()
    assert (weighted._class_weights * counts).allclose(torch.full((3,), counts.sum() / 3))
    assert plain._class_weights is shuffled.order.weights is None
    assert len(drawn.order.weights) == counts.sum() * (1 if finetune else len(images.flips))
    assert drawn.order.weights.sum().item() == pytest.approx(3)


def test_gradients_are_clipped(maps):
    before = new_head()
    fit = fitted(new_head(), maps(16), clip_grad=1e-3)
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(fit.trained.parameters(), before.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(0.1 * 1e-3, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [{}, {"finetune": True}, {"finetune_from": "layer4"}])
def test_compiled_step_follows_the_eager_one(tiny_config, report, elsewhere, tuned):
    tiny_config = replace(
        tiny_config,
        backbone=replace(tiny_config.backbone, **tuned),
        optim=replace(tiny_config.optim, epochs=2),
    )
    compiled = elsewhere(tiny_config, "compiled")
    compiled = replace(compiled, run=replace(compiled.run, compile=True))
    train(tiny_config, report)
    torch._dynamo.utils.counters.clear()
    train(compiled, report)
    assert "running eagerly" not in said(report)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1  # one shape, compiled once
    for ours, theirs in zip(
        numbers(compiled.run.out)["epochs"], numbers(tiny_config.run.out)["epochs"], strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_diverged_run_is_an_error(tiny_config, report):
    with pytest.raises(TrainError, match=r"training loss of epoch \d is (nan|inf)"):
        train(replace(tiny_config, optim=replace(tiny_config.optim, lr=1e30)), report)
    assert not (tiny_config.run.out / "metrics.json").exists()


@pytest.mark.parametrize("tuned", [{"finetune": True}, {"finetune_from": "layer4"}])
def test_the_head_is_trained_alone_at_first(tiny_config, report, elsewhere, monkeypatch, tuned):
    config = replace(tiny_config, backbone=replace(tiny_config.backbone, **tuned))
    config = with_(config, freeze_epochs=2, lr=3e-3, ema=0.9)
    states = []
    run_epoch = Trainer._run_epoch

    def recorded(trainer, *arguments):
        before = copy.deepcopy(trainer.trained.backbone.state_dict())
        found = run_epoch(trainer, *arguments)
        after = trainer.trained.backbone.state_dict()
        states.append(all(value.equal(before[name]) for name, value in after.items()))
        with torch.no_grad():
            tested = trainer.last.backbone.state_dict()
        assert not states[-1] or all(value.equal(before[name]) for name, value in tested.items())
        return found

    monkeypatch.setattr(Trainer, "_run_epoch", recorded)
    train(config, report)
    assert states == [True, True, False, False]  # weights, and statistics of batch norm
    whole = numbers(config.run.out)
    stopped = elsewhere(config, "stopped")
    for killed_after in (3, 3):  # in the frozen epochs and after them
        with monkeypatch.context() as patch:
            stop_after(patch, killed_after * (2 if "finetune_from" in tuned else 1) + 2)
            with pytest.raises(Stopped):
                train(stopped, report)
        stopped = replace(stopped, run=replace(stopped.run, resume=stopped.run.out))
    train(stopped, report)
    assert numbers(stopped.run.out) == whole
