"""The charts show the numbers that they are given, and say what their axes are."""

import base64

import pytest

from ggam_fast.training.measure.intervals import wilson
from ggam_fast.training.show.charts import faithfulness_curves, learning_curves, reliability_diagram, svg


def lines(axes):
    return {line.get_label(): [list(values) for values in line.get_data()] for line in axes.get_lines()}


def test_reliability_has_the_bins_and_their_intervals():
    bins = [None, {"images": 10, "confidence": 0.3, "accuracy": 0.2}, None, None]
    bins.append({"images": 4, "confidence": 0.95, "accuracy": 1.0})
    above, below = reliability_diagram(bins).axes
    [bars] = above.containers
    assert [list(values) for values in bars[0].get_data()] == [[30, 95], [20, 100]]
    [[_, low, _], [_, high, _]] = [[0, *segment[:, 1]] for segment in bars[2][0].get_segments()]
    assert low == pytest.approx(100 * wilson(2, 10)[0])
    assert high == pytest.approx(100 * wilson(4, 4)[0])
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in below.patches] == [
        (30, 10),
        (90, 4),
    ]
    assert (above.get_ylabel(), below.get_ylabel()) == ("right, %", "images")
    assert below.get_xlabel() == "probability of the prediction, %"


def test_faithfulness_of_each_map():
    curve = {"curve": [0.0, 0.5, 1.0], "area": 0.5}
    found = {"attention": {"insertion": curve, "deletion": {"curve": [1.0, 0.2, 0.1], "area": 0.375}}}
    for kind, values, words in (("insertion", [0, 0.5, 1], "shown"), ("deletion", [1, 0.2, 0.1], "blanked")):
        [axes] = faithfulness_curves(found, kind).axes
        area = found["attention"][kind]["area"]
        assert lines(axes) == {f"attention (area {area:.3f})": [[0, 50, 100], values]}
        assert (axes.get_xlabel(), axes.get_ylabel()) == (
            f"pixels {words}, %",
            "probability of the prediction",
        )


def test_curves_of_the_training_are_two_figures():
    history = [{"epoch": n, "cross_entropy": 1 / n, "guidance": 2.0, "accuracy": 0.5} for n in (1, 2)]
    losses, accuracies = learning_curves(history, 1, {"guidance": 0.5})
    assert lines(losses.axes[0])["training, cross entropy"] == [[1, 2], [1, 0.5]]
    assert lines(losses.axes[0])["training, lambda x guidance"] == [[1, 2], [1, 1]]
    assert lines(accuracies.axes[0])["training"] == [[1, 2], [0.5, 0.5]]
    kind, data = svg(accuracies).split(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data).startswith(b"<?xml")
