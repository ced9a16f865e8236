"""Text is printed unchanged. Without a terminal, a progress bar becomes a line from time to time."""

import logging

import pytest
import torch

from ggam_fast.training.measure.classification import classification_metrics
from ggam_fast.training.show import console
from tests.training.runs import said


def test_square_brackets_are_text(report):
    report.note("left out [red]/1.png[/red]")
    assert said(report) == "left out [red]/1.png[/red]\n"


@pytest.mark.parametrize(("seconds", "lines"), [(1000.0, 1), (0.0, 3)])
def test_without_a_terminal_the_last_count_is_always_said(report, monkeypatch, seconds, lines):
    monkeypatch.setattr(console, "_PLAIN_SECONDS", seconds)
    with report.bar("training", 6) as bar:
        for _ in range(3):
            bar.advance(2, "loss 0.5", "epoch 1/1")
    found = said(report).splitlines()
    assert len(found) == lines
    assert found[-1].startswith("epoch 1/1: 6/6  loss 0.5  0 s left")


def test_the_table_names_the_class_that_is_most_often_confused(report):
    labels = torch.tensor([0, 0, 0, 1, 2])
    guesses = torch.tensor([1, 1, 2, 1, 2])
    metrics = classification_metrics(torch.nn.functional.one_hot(guesses, 4).float(), labels)
    report.table(metrics, ("crow", "[b]duck[/b]", "tit", "owl"), "test")
    rows = {line.split()[1]: line for line in said(report).splitlines() if line.startswith("│")}
    assert "[b]duck[/b] (2)" in rows["crow"]
    assert rows["[b]duck[/b]"].split()[-2] == "-"
    assert rows["owl"].split()[3:] == ["0", "│", "-", "│", "-", "│"]
    assert "always the commonest class: 0.600" in said(report)


def test_the_loss_is_shown_as_the_sum_that_it_is(report):
    numbers = {"epoch": 1, "loss": 2.127, "cross_entropy": 0.04, "guidance": 2087.0, "accuracy": 0.9}
    numbers |= {"images_per_second": 800.0}
    report.epoch(numbers, 6, (1e-3, 1.0))
    report.epoch({**numbers, "loss": 0.04, "val_loss": 0.1, "val_accuracy": 0.8}, 6, (0.0, 1.0))
    report.epoch({**numbers, "val_loss": 0.1, "val_accuracy": 0.8, "val_accuracy_last": 0.7}, 6, (1e-3, 1.0))
    report.epoch({**numbers, "loss": 3.627, "positions": 0.5}, 6, (1e-3, 3.0))
    first, second, third, fourth = said(report).splitlines()
    assert (
        "loss 3.627 = cross entropy 0.04 + guidance 2.087 (0.001 x 2087) + positions 1.5 (3 x 0.5)" in fourth
    )
    assert first == (
        "epoch 1/6  loss 2.127 = cross entropy 0.04 + guidance 2.087 (0.001 x 2087)"
        "  training accuracy 0.900  800 images/s"
    )
    assert "loss: cross entropy 0.04  training accuracy 0.900" in second
    assert "validation loss 0.1  validation accuracy 0.800  800" in second
    assert "validation accuracy 0.800 (averaged weights; last weights 0.700)" in third


def test_a_silent_report_prints_nothing(capsys):
    report = console.Report.silent()
    report.note("anything")
    with report.bar("training", 1) as bar:
        bar.advance(1)
    assert capsys.readouterr().out == ""


def test_what_the_package_logs_is_a_line_of_the_report(report):
    logger = logging.getLogger("ggam_fast.training.anywhere")
    logger.info("one image is [bold]")
    with report.listening():  # nested blocks print each line once
        logger.warning("running eagerly")
    logger.debug("not for users")
    logging.getLogger("another.library").warning("not ours")
    assert said(report) == "one image is [bold]\nrunning eagerly\n"


def test_who_no_longer_listens_hears_nothing(capsys):
    package = logging.getLogger("ggam_fast.training")
    before = (list(package.handlers), package.level)
    with console.Report().listening():
        logging.getLogger("ggam_fast.training.run").info("heard")
    logging.getLogger("ggam_fast.training.run").info("not heard")
    assert capsys.readouterr().out == "heard\n"
    assert (list(package.handlers), package.level) == before
