"""Rates, optimizers and schedules are those that the options name."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from ggam_fast.training.config.options import OptimConfig, check_optimizer
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.classifier import LastClassifier
from ggam_fast.training.model.cut import cut
from ggam_fast.training.run.optimizer import create_optimizer, create_schedule, parameter_groups
from ggam_fast.training.run.prepare import create_classifier


def rates_of(optim, epochs, length, base=0.5):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=base)
    schedule = create_schedule(optimizer, optim, epochs, length)
    rates = []
    for _ in range(epochs * length):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_falls_from_the_highest_rate_to_nothing():
    rates = rates_of(OptimConfig(schedule="cosine"), 1, 10)
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("warmup", [None, 0.1])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_a_schedule_of_any_length(steps, warmup, schedule):
    rates = rates_of(OptimConfig(schedule=schedule, warmup_epochs=warmup), 1, steps, 0.1)
    assert 0 < min(rates) <= max(rates) <= 0.1 + 1e-9


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_the_rate_rises_for_the_warm_up_and_then_falls(schedule):
    rates = rates_of(OptimConfig(schedule=schedule, epochs=5, warmup_epochs=1.5), 5, 8)
    top = rates.index(max(rates))
    assert abs(top - 12) <= 1
    assert rates[top] == pytest.approx(0.5)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] < 0.1


def test_earlier_layers_learn_more_slowly(tiny_config):
    model = create_classifier(tiny_config, 3)
    optim = replace(tiny_config.optim, layer_decay=0.5, backbone_lr=0.1, lr=1.0)
    groups = parameter_groups(model, optim, model.backbone.model)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert set(rates) == {id(p) for p in model.parameters()}
    assert {rates[id(p)] for p in model.head.parameters()} == {1.0}
    layers = [model.backbone.model.get_submodule(f"layer{n}.0") for n in (1, 2, 3, 4)]
    found = [{rates[id(p)] for p in layer.parameters()} for layer in layers]
    assert all(len(one) == 1 for one in found)
    order = [one.pop() for one in found]
    assert [later / earlier for earlier, later in pairwise(order)] == [2, 2, 2]
    assert max(rates[id(p)] for p in model.backbone.parameters()) <= 0.1
    model.requires_grad_(False)
    last = LastClassifier(cut(model.backbone, "layer4")[1], model.head).requires_grad_(True)
    with pytest.raises(TrainError, match=r"--layer-decay 0\.5 needs two or more trained layers"):
        parameter_groups(last, optim, model.backbone.model)


def known_optimizers():
    with pytest.raises(TrainError) as raised:
        check_optimizer("nonesuch")
    text = str(raised.value)
    assert text.startswith("--optimizer must be one of ")
    assert text.endswith("; got nonesuch")
    return text.removeprefix("--optimizer must be one of ").split("; got")[0].split(", ")


def test_every_optimizer_that_the_message_names_takes_a_step():
    names = known_optimizers()
    assert {"adamw", "sgd", "lion", "muon"} <= set(names)
    for name in names:
        check_optimizer(name)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
        groups = [{"params": list(part.parameters()), "lr": 0.1} for part in (model[:2], model[3])]
        optimizer = create_optimizer(groups, OptimConfig(optimizer=name, lr=0.1))
        schedule = create_schedule(optimizer, OptimConfig(schedule="cosine"), 1, 4)
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):
            model(torch.randn(8, 3, 4, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        moved = [not p.equal(old) for p, old in zip(model.parameters(), before, strict=True)]
        assert any(moved), name
        assert all(p.isfinite().all() for p in model.parameters()), name
        optimizer.load_state_dict(optimizer.state_dict())
