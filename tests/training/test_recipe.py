"""Options of the training recipe, each seen to do what it says."""

import copy
from dataclasses import replace

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.cli.commands import parse_train
from ggam_fast.training.config.options import OptimConfig
from ggam_fast.training.data.batches import Order, _Seeded
from ggam_fast.training.data.mixing import Mix, hard
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run.loop import Fit, _schedule
from ggam_fast.training.run.train import train
from ggam_fast.training.system.distributed import World


def with_(config, **options):
    return replace(config, optim=replace(config.optim, **options))


def test_paper_recipe_runs_on_a_small_model(photos, tmp_path, report):
    arguments = ["--recipe", "paper", "--preset", "paper", "--data", "folder", "--root", str(photos)]
    arguments += ["--backbone", "test_resnet", "--no-pretrained", "--image-size", "64", "--resize", "72"]
    arguments += [
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--no-compile",
        "--enlarge",
        "--out",
        str(tmp_path / "out"),
    ]
    config = parse_train([*arguments, "--hidden-size", "16"])
    outcome = train(config, report)
    assert outcome.metrics is not None
    backbone = load_checkpoint(tmp_path / "out").model.backbone
    assert (backbone.image_size, backbone.resize) == (64, 72)


def test_cosine_falls_from_the_highest_rate_to_nothing():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    schedule = _schedule(optimizer, OptimConfig(schedule="cosine"), 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def fitted(head, batches, **options) -> Fit:
    optim = OptimConfig(epochs=1, schedule="cosine", optimizer="sgd", lr=0.1, weight_decay=0, **options)
    fit = Fit(head, [{"params": list(head.parameters()), "lr": 0.1}], optim, 3, torch.device("cpu"))
    fit.run(batches, None)
    return fit


@pytest.fixture
def maps():
    from ggam_fast.training.data.batches import MapBatches

    features = torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(16) % 3
    return lambda size: MapBatches(features, labels, size, torch.device("cpu"), shuffle_seed=0)


def new_head(hidden_size=0):
    import ggam_fast

    torch.manual_seed(0)
    return ggam_fast.GGAMHead(8, 3, hidden_size=hidden_size, rd_channels=4)


@pytest.mark.parametrize("targets", ["labels", "mixed"])
@pytest.mark.parametrize("whole", [False, True], ids=["head", "classifier"])
@pytest.mark.parametrize("detach", [True, False], ids=["fused", "second order"])
def test_a_step_is_that_of_the_loss_in_two_parts(targets, whole, detach):
    import ggam_fast
    from ggam_fast.training.model.backbones import create_backbone
    from ggam_fast.training.model.classifier import GGAMClassifier, GuidedLoss

    torch.manual_seed(0)
    backbone = create_backbone("test_resnet", pretrained=False, image_size=64)
    head = ggam_fast.GGAMHead(
        backbone.num_features, 3, hidden_size=8, rd_channels=4, cam_detach=detach, cam_norm="standardized"
    )
    model = GGAMClassifier(backbone, head) if whole else head
    twin = copy.deepcopy(model)
    inputs = torch.randn(6, 3, 64, 64) if whole else torch.randn(6, backbone.num_features, 2, 2).relu()
    labels = torch.arange(6) % 3
    target = torch.rand(6, 3).softmax(1) if targets == "mixed" else labels

    step = GuidedLoss(model, 0.5, 0.1, torch.device("cpu"), torch.float32)
    loss, numbers = step(inputs, target)
    loss.backward()
    out = twin(inputs, target)
    expected = ggam_fast.GGAMLoss(0.5, label_smoothing=0.1)(out, target)
    expected.backward()
    right = (out.logits.argmax(1) == hard(target)).float().mean()
    torch.testing.assert_close(numbers, torch.stack([expected, out.guidance_loss, right]).detach())
    assert not numbers.requires_grad
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("finetune", [False, True])
def test_training_takes_the_fused_loss(tiny_config, report, monkeypatch, finetune):
    from ggam_fast import GGAMHead

    forward = GGAMHead.forward

    def without_target(head, features, target=None, pre_logits=False):
        assert target is None or not head.training
        return forward(head, features, target, pre_logits)

    monkeypatch.setattr(GGAMHead, "forward", without_target)
    config = replace(tiny_config, backbone=replace(tiny_config.backbone, finetune=finetune))
    assert train(with_(config, mixup=0.5), report).metrics is not None


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
    # Of as many batches as it has: one batch alone is a step like any other.
    alone = fitted(new_head(), maps(16), accumulate=4)
    for ours, theirs in zip(
        alone.trained.parameters(), fitted(new_head(), maps(16)).trained.parameters(), strict=True
    ):
        assert ours.equal(theirs)


def test_batches_of_all_processes_larger_than_the_split_are_refused():
    assert len(Order(16, 8, 0, World(1, 2))) == 1
    assert len(Order(16, 9, None, World(1, 2))) == 1
    with pytest.raises(TrainError, match=r"--batch-size must be at most 8 for 16 .* on 2 processes"):
        Order(16, 9, 0, World(1, 2))


@pytest.mark.parametrize("seed", [None, 3])
def test_processes_share_the_rows_of_an_epoch(seed):
    parts = [Order(24, 4, seed, World(rank, 3)).batches(5) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sorted(torch.cat([torch.cat(part) for part in parts]).tolist()) == list(range(24))


def test_average_is_the_running_one(maps):
    states = []

    class Recorded(Fit):
        def _step(self):
            super()._step()
            states.append(copy.deepcopy(self.trained.state_dict()))

    head = new_head(hidden_size=4)  # with batch norm, whose statistics are averaged too
    optim = OptimConfig(epochs=1, ema=0.75)
    fit = Recorded(head, [{"params": list(head.parameters()), "lr": 0.1}], optim, 3, torch.device("cpu"))
    fit.run(maps(4), None)
    # torch's first update copies.
    for name, found in fit.result.state_dict().items():
        if not found.is_floating_point():
            continue
        expected = states[0][name]
        for state in states[1:]:
            expected = 0.75 * expected + 0.25 * state[name]
        torch.testing.assert_close(found, expected)
    assert fit.result is not head


def test_gradients_are_clipped(maps):
    before = new_head()
    fit = fitted(new_head(), maps(16), clip_grad=1e-3)
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(fit.trained.parameters(), before.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(0.1 * 1e-3, rel=0.05)


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_mixed_targets_are_the_shares_of_what_was_mixed(options):
    inputs = torch.zeros(6, 3, 32, 32)
    inputs[:, 0] = torch.arange(6.0).view(6, 1, 1) % 3  # an image of class k is k in channel 0
    mixed, targets = Mix(3, **options)(
        inputs.contiguous(memory_format=torch.channels_last), torch.arange(6) % 3
    )
    assert targets.shape == (6, 3)
    assert targets.sum(1).allclose(torch.ones(6))
    assert mixed[:, 0].mean((1, 2)).allclose(targets @ torch.arange(3.0), atol=1e-5)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert hard(targets).equal(targets.argmax(1))


def test_without_mixing_a_batch_stays_as_it_is():
    inputs, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    assert Mix(4)(inputs, labels) == (inputs, labels)
    assert hard(labels) is labels


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ema": 1.0}, "--ema must be 0 or more and below 1; got 1.0"),
        ({"label_smoothing": -0.1}, "--label-smoothing"),
        ({"accumulate": 0}, "--accumulate"),
        ({"cutmix": 1.0}, "--cutmix pastes patches of images"),
    ],
)
def test_options_out_of_range(tiny_config, options, words):
    with pytest.raises(TrainError, match=words):
        with_(tiny_config, **options).check()


def test_crop_larger_than_the_resized_image(tiny_config, report):
    config = replace(tiny_config, data=replace(tiny_config.data, resize=32))
    with pytest.raises(TrainError, match="--resize"):
        train(config, report)


def test_half_precision_backbone_on_the_cpu(tiny_config, report):
    config = replace(tiny_config, run=replace(tiny_config.run, precision="bfloat16"))
    assert train(config, report).metrics is not None
    [maps] = {path.suffix for path in tiny_config.data.cache_dir.iterdir()}
    assert maps == ".maps"


@pytest.mark.parametrize("steps", range(1, 12))
def test_one_cycle_of_any_length(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = _schedule(optimizer, OptimConfig(), steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert 0 < min(rates) <= max(rates) <= 0.1


def test_augmentation_is_that_of_seed_epoch_and_row():
    class Noise:
        def __getitem__(self, row):
            return torch.rand(4), row

    def drawn(seed, epoch, row):
        return _Seeded(Noise(), seed)[epoch, row][0]

    before = torch.get_rng_state()
    first = drawn(0, 1, 2)
    assert torch.get_rng_state().equal(before)
    assert drawn(0, 1, 2).equal(first)
    assert not any(drawn(*other).equal(first) for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))
