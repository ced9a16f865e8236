"""The targets of Mixup and CutMix are the shares of the mixed images."""

import pytest
import torch

from ggam_fast.training.data.mixing import Mix, hard


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


def test_tokens_are_mixed_as_maps_are():
    tokens = torch.arange(4.0).view(4, 1, 1).expand(4, 5, 8)
    mixed, targets = Mix(4, mixup=1.0)(tokens, torch.arange(4))
    assert mixed.shape == tokens.shape
    assert mixed[:, 0, 0].allclose(targets @ torch.arange(4.0))


def test_without_mixing_a_batch_stays_as_it_is():
    inputs, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    assert Mix(4)(inputs, labels) == (inputs, labels)
    assert hard(labels) is labels
