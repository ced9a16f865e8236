"""Names of any length and script become text that a figure can draw."""

import logging
import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib.font_manager import FontEntry, findfont

from ggam_fast.training.show import lettering
from ggam_fast.training.show.figures import new_figure
from ggam_fast.training.show.lettering import drawable, fitted, literal, width


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is known of the fonts, and what a test adds to them is gone afterwards."""
    with matplotlib.rc_context():
        monkeypatch.setattr(lettering, "_said", [])
        lettering._font_of.cache_clear()
        yield
        lettering._font_of.cache_clear()


def test_names_are_drawn_as_text():
    figure = new_figure(2, 1)
    label = figure.text(0, 0, literal("$5 and $6_$"))
    figure.canvas.draw()
    assert label.get_text() == r"\$5 and \$6_\$"
    assert literal("a\udc80b\nc") == "a?b c"


def test_letters_without_a_font_become_latin_with_one_line(caplog):
    with caplog.at_level(logging.INFO, "ggam_fast.training"):
        names = [drawable(name) for name in ("北京 cat", "猫", "plain", "мир")]
    assert names == ["BeiJing cat", "Mao", "plain", "мир"]
    [message] = caplog.messages
    assert message.startswith("no font of this machine has the letter 北, so figures write it as Bei")
    figure = new_figure(2, 1)
    figure.text(0, 0, names[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()


def test_a_font_that_has_the_letters_is_used(monkeypatch, caplog):
    """The fonts of matplotlib stand for those of a machine: DejaVu Sans lacks a letter that STIX has."""
    stix = next(
        one
        for one in lettering.fontManager.ttflist
        if (one.name, one.style, one.weight) == ("STIXGeneral", "normal", 400)
    )
    dejavu = lettering._letters(findfont("DejaVu Sans"))
    letter = chr(min(code for code in lettering._letters(stix.fname) - dejavu if chr(code).isalpha()))
    monkeypatch.setattr(lettering.fontManager, "ttflist", [stix])
    with caplog.at_level(logging.INFO, "ggam_fast.training"):
        assert drawable(letter) == letter
    assert caplog.messages == []
    assert matplotlib.rcParams["font.family"] == ["sans-serif", "STIXGeneral"]
    figure = new_figure(2, 1)
    figure.text(0, 0, letter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()


def test_a_damaged_font_has_no_letters(tmp_path, monkeypatch):
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    bad = FontEntry(fname=str(tmp_path / "bad.ttf"), name="Bad Sans", style="normal", weight=400)
    monkeypatch.setattr(lettering.fontManager, "ttflist", [bad])
    assert drawable("猫") == "Mao"


@pytest.mark.parametrize("name", ["W" * 200, "the one " * 30 + "end", "a" * 90 + " " + "b" * 90, "猫" * 100])
@pytest.mark.parametrize("lines", [1, 2])
def test_what_does_not_fit_is_left_out_in_the_middle(name, lines):
    shown = fitted(name, 2.0, 9, lines=lines)
    assert shown.count("\n") < lines
    assert all(width(line, 9) <= 2.0 for line in shown.split("\n"))
    assert sum(width(line, 9) for line in shown.split("\n")) > 1.5 * lines
    plain = drawable(name)
    head, tail = shown.replace("\n", "").split("…")
    assert plain.replace(" ", "").startswith(head.replace(" ", ""))
    assert plain.replace(" ", "").endswith(tail.replace(" ", ""))


def test_what_fits_stays():
    assert fitted("red", 2.0, 9) == "red"
    assert fitted("", 2.0, 9) == ""
    assert fitted("$1", 2.0, 9) == r"\$1"
    assert fitted("great blue heron", 0.8, 9, lines=2) == "great blue\nheron"
    assert width("red", 9, "bold") > width("red", 9) > 0


def test_the_fonts_of_matplotlib_are_there():
    assert Path(findfont("DejaVu Sans")).is_file()
