"""Learning curves show every number of every epoch, and the best epoch."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from ggam_fast.training.show.curves import draw_curves

EPOCH = {"loss": 2.1, "cross_entropy": 0.1, "guidance": 2000.0, "accuracy": 0.9}
VALIDATION = {"val_loss": 0.3, "val_accuracy": 0.8}
LAST = {"val_loss_last": 0.4, "val_accuracy_last": 0.7}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw curves and return {label: (epochs, values)} of each panel."""

    def draw(*arguments):
        found = []
        save = Figure.savefig

        def kept(figure, *rest, **options):
            for axes in figure.axes:
                assert (axes.get_xlabel(), axes.get_ylabel()) != ("", "")
                assert axes.get_legend() is not None
                lines = {line.get_label(): line.get_data() for line in axes.get_lines()}
                found.append({name: (list(x), list(y)) for name, (x, y) in lines.items()})
            save(figure, *rest, **options)

        monkeypatch.setattr(Figure, "savefig", kept)
        path = draw_curves(tmp_path / "curves.png", *arguments)
        with Image.open(path) as image:
            assert image.width > 800
        return found

    return draw


def test_all_numbers_of_all_epochs(drawn):
    history = [{"epoch": n, **EPOCH, **VALIDATION, **LAST} for n in (1, 2, 3)]
    losses, accuracies = drawn(history, 1, 1e-3)
    assert losses["training, cross entropy"] == ([1, 2, 3], [0.1] * 3)
    assert losses["training, lambda x guidance"] == ([1, 2, 3], [2.0] * 3)
    assert losses["validation, cross entropy"] == ([1, 2, 3], [0.3] * 3)
    assert losses["validation, last weights"] == ([1, 2, 3], [0.4] * 3)
    assert accuracies["training"] == ([1, 2, 3], [0.9] * 3)
    assert accuracies["validation"] == ([1, 2, 3], [0.8] * 3)
    assert accuracies["validation, last weights"] == ([1, 2, 3], [0.7] * 3)
    assert losses["best epoch"][0] == accuracies["best epoch"][0] == [2, 2]


def test_the_position_loss_is_weighted(drawn):
    losses, _ = drawn([{"epoch": 1, **EPOCH, "positions": 0.5}], 0, 0.0, 3.0)
    assert losses["training, weighted position loss"] == ([1], [1.5])


def test_one_epoch_without_validation_or_guidance(drawn):
    losses, accuracies = drawn([{"epoch": 1, **EPOCH}], 0, 0.0)
    assert losses.keys() == {"training, cross entropy", "best epoch"}
    assert accuracies.keys() == {"training", "best epoch"}


def test_epochs_of_an_older_version_lack_numbers(drawn):
    old = {"epoch": 1, "loss": 2.1, "guidance": 2000.0, "accuracy": 0.9, "val_accuracy": 0.5}
    losses, accuracies = drawn([old, {"epoch": 2, **EPOCH, **VALIDATION}], 0, 1e-3)
    assert losses["validation, cross entropy"] == ([2], [0.3])
    assert accuracies["validation"] == ([1, 2], [0.5, 0.8])
