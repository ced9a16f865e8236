"""Insertion and deletion curves of a classifier whose probabilities are known."""

import torch

from ggam_fast.training.measure.faithfulness import area, deletion_curves, insertion_curves, ranks


def test_ranks_follow_the_heat_and_break_ties_at_random():
    heat = torch.tensor([[[0.0, 3.0], [2.0, 1.0]]])
    assert ranks(heat, torch.Generator().manual_seed(0)).tolist() == [[[3, 0], [1, 2]]]
    flat = ranks(torch.zeros(1, 8, 8), torch.Generator().manual_seed(0))
    assert sorted(flat.flatten().tolist()) == list(range(64))
    assert flat.flatten().tolist() != list(range(64))


def test_curves_of_a_classifier_that_sees_one_pixel():
    images = torch.zeros(2, 3, 16, 16)
    images[:, :, 4, 4] = 1.0

    def probability(shown):
        return shown[:, 0, 4, 4]

    hot, cold = torch.zeros(1, 16, 16), torch.ones(1, 16, 16)
    hot[0, 4, 4], cold[0, 4, 4] = 1, 0
    rank = ranks(torch.cat([hot, cold]), torch.Generator().manual_seed(0))
    gone = deletion_curves(probability, images, rank, 4)
    assert gone.tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert area(gone).tolist() == [0.125, 0.875]
    come = insertion_curves(probability, images, rank, 4)
    assert come[0, 0] == come[1, 0] < 0.1
    assert come[0, 1:].tolist() == [1] * 4
    assert come[1, 4] == 1
    assert come[1, 3] < 0.1
