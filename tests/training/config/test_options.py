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
