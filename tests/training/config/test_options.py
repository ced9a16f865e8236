"""A message names the option that is out of range."""

from dataclasses import replace

import pytest

from ggam_fast.training.config.options import TrainConfig
from ggam_fast.training.errors import TrainError
from tests.training.runs import with_


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ema": 1.0}, "--ema must be 0 or more and below 1; got 1.0"),
        ({"label_smoothing": -0.1}, "--label-smoothing"),
        ({"accumulate": 0}, "--accumulate"),
        ({"cutmix": 1.0}, "--cutmix pastes patches of images"),
        ({"layer_decay": 0.0}, "--layer-decay must be above 0 and at most 1; got 0.0"),
        ({"layer_decay": 0.7}, "--layer-decay 0.7 needs a trained backbone"),
        ({"freeze_epochs": 1}, "--freeze-epochs 1 needs a trained backbone"),
        ({"warmup_epochs": 4.0}, "--warmup-epochs must be below --epochs 4; got 4"),
        ({"rand_augment": 31}, "--rand-augment must be 0 or more and below 31; got 31"),
        ({"color_jitter": 1.5}, "--color-jitter must be 0 or more and below 1; got 1.5"),
        (
            {"rand_augment": 9},
            "--rand-augment changes images, but .* use --finetune or --mixup; got",
        ),
        ({"color_jitter": 0.2}, "--color-jitter changes images"),
        ({"random_erasing": 0.2}, "--random-erasing changes images"),
        ({"balanced_sampling": True, "class_weights": "balanced"}, "leave out one"),
        ({"optimizer": "nonesuch"}, "--optimizer must be one of .*lion, .*muon.*; got nonesuch"),
        ({"position_weight": -1.0}, "--position-weight must be 0 or more; got -1.0"),
        ({"position_weight": 3.0}, "--position-weight needs --position-guidance relu"),
    ],
)
def test_options_out_of_range(tiny_config, options, words):
    with pytest.raises(TrainError, match=words):
        with_(tiny_config, **options).check()


def test_default_configuration_is_valid():
    TrainConfig().check()


@pytest.mark.parametrize("name", ["image_size", "resize"])
def test_images_larger_than_any_memory_are_refused(tiny_config, name):
    config = replace(tiny_config, data=replace(tiny_config.data, **{name: 1_000_000}))
    with pytest.raises(TrainError, match=r"--[a-z-]+ must be \d+ or more and below 8193; got 1000000"):
        config.check()
