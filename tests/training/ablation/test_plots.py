"""In the pictures of an ablation each seed is a point. A picture without data is not drawn."""

import pytest
from matplotlib.figure import Figure

from ggam_fast.training.ablation import plots
from ggam_fast.training.ablation.group import Group


def group(attention, weight, *accuracies):
    cells = [
        {"cell": {"seed": seed}, "val": {"accuracy": value}, "test": {"accuracy": value}}
        for seed, value in enumerate(accuracies)
    ]
    return Group(attention, "sigmoid", weight, cells)


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved, in that order."""
    kept: list[Figure] = []
    save = Figure.savefig

    def spy(figure, *arguments, **options):
        kept.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return kept


def test_each_seed_is_a_point_of_its_row(tmp_path, figures):
    rows = [group("none", 0.0, 0.5, 0.7), group("channel_spatial", 0.1, 0.6, 0.8)]
    assert plots.draw_table(tmp_path / "table.png", rows)
    (axes,) = figures[0].axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata().tolist() for line in points] == [[50, 70], [60, 80]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "channel-spatial + guidance"]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_needs_guided_cells(tmp_path, figures):
    plain = group("channel_spatial", 0.0, 0.5)
    assert not plots.draw_sweep(tmp_path / "sweep.png", [plain], ["sigmoid"])
    assert not (tmp_path / "sweep.png").exists()
    guided = [group("channel_spatial", 0.1, 0.6), group("channel_spatial", 0.01, 0.9)]
    assert plots.draw_sweep(tmp_path / "sweep.png", [plain, *guided], ["sigmoid"])
    assert figures[0].axes[0].get_xscale() == "log"
    (line,) = [line for line in figures[0].axes[0].lines if line.get_label() == "sigmoid"]
    assert list(line.get_ydata()) == pytest.approx([90, 60])  # in the order of lambda, not of the cells


def test_beta_needs_the_weight_that_was_chosen(tmp_path):
    guided = [group("channel_spatial", 0.1, 0.6)]
    assert not plots.draw_beta(tmp_path / "beta.png", guided, ["sigmoid"], {"sigmoid": None})
    assert not (tmp_path / "beta.png").exists()
