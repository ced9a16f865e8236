"""In the pictures of an ablation each seed is a point. A picture without data is not drawn."""

import pytest
from matplotlib.figure import Figure

from ggam_fast.training.ablation import plots
from ggam_fast.training.ablation.group import Group


def group(attention, guidance, weight, *accuracies):
    cells = [
        {
            "cell": {"seed": seed},
            "val": {"accuracy": value, "nll": 1 - value},
            "test": {"accuracy": value, "nll": 1 - value},
            "mechanism": {when: dict.fromkeys(MECHANISM, value) for when in ("before", "after")},
        }
        for seed, value in enumerate(accuracies)
    ]
    return Group(attention, guidance, weight, cells)


MECHANISM = ("s_beta", "t_class_map", "s_entropy", "t_entropy")


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
    rows = [group("none", "none", 0.0, 0.5, 0.7), group("channel_spatial", "paper", 0.1, 0.6, 0.8)]
    assert plots.draw_table(tmp_path / "table.png", rows)
    axes, likelihood = figures[0].axes  # no localisation was measured
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata().tolist() for line in points] == [[50, 70], [60, 80]]
    assert likelihood.get_xlabel() == "negative log likelihood, nats"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["none", "channel-spatial + the paper's"]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_choice_needs_guided_cells(tmp_path, figures):
    plain = group("channel_spatial", "none", 0.0, 0.5)
    assert not plots.draw_choice(tmp_path / "choice.png", [plain])
    assert not (tmp_path / "choice.png").exists()
    guided = [group("channel_spatial", "paper", weight, value) for weight, value in ((0.1, 0.6), (0.01, 0.9))]
    assert plots.draw_choice(tmp_path / "choice.png", [plain, *guided])
    assert figures[0].axes[0].get_xscale() == "log"
    (line,) = figures[0].axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([90, 60])  # in the order of lambda, not of the cells


def test_rows_with_attention_have_a_mechanism(tmp_path, figures):
    assert not plots.draw_mechanism(tmp_path / "mechanism.png", [group("none", "none", 0.0, 0.5)])
    rows = [group("none", "none", 0.0, 0.5), group("spatial", "positions", 1.0, 0.25, 0.75)]
    assert plots.draw_mechanism(tmp_path / "mechanism.png", rows)
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["spatial + positions"]
    assert figures[0].axes[1].lines[0].get_xdata() == pytest.approx([0.25, 0.75])
