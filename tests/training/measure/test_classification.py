"""Metrics agree with values worked out by hand."""

import pytest
import torch

from ggam_fast.training.measure.classification import classification_metrics, confused_with


def test_numbers_worked_out_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 0, 0, 1, 1, 0, 2])
    metrics = classification_metrics(torch.nn.functional.one_hot(predicted, 3).float(), labels)
    assert metrics.images == 8
    assert metrics.majority == pytest.approx(5 / 8)
    assert metrics.accuracy == pytest.approx(6 / 8)
    assert metrics.recall == pytest.approx([4 / 5, 1 / 2, 1])
    assert metrics.balanced_accuracy == pytest.approx((4 / 5 + 1 / 2 + 1) / 3)
    # For each class, F1 = 2 TP / (2 TP + FP + FN).
    assert metrics.f1 == pytest.approx([8 / 10, 2 / 4, 1])
    assert metrics.macro_f1 == pytest.approx((8 / 10 + 2 / 4 + 1) / 3)
    assert metrics.precision == pytest.approx([4 / 5, 1 / 2, 1])
    assert metrics.confusion == [[4, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert metrics.support == [5, 2, 1]


def test_class_that_is_only_predicted_has_no_recall():
    labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 1])
    metrics = classification_metrics(torch.eye(3)[predicted], labels)
    assert metrics.balanced_accuracy == pytest.approx((1 / 2 + 1) / 2)
    assert metrics.macro_f1 == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_class_without_images_does_not_count_against_the_mean():
    labels = torch.tensor([0, 0, 2])
    metrics = classification_metrics(torch.eye(3)[labels], labels)
    assert metrics.balanced_accuracy == pytest.approx(1)
    assert metrics.macro_f1 == pytest.approx(1)


def test_the_class_that_is_most_often_confused():
    confusion = [[9, 1, 2], [0, 3, 0], [2, 2, 0]]
    names = ("crow", "duck", "tit")
    assert [confused_with(confusion, index, names) for index in range(3)] == ["tit (2)", "-", "crow (2)"]
