"""`ggam-fast compare` groups runs by their options, and tests differences of runs with the same seed."""

import json

import pytest
import yaml

from ggam_fast.training.cli import main


@pytest.fixture
def runs(tmp_path):
    """A function that writes what a finished run leaves."""

    def write(name, seed, accuracy, support=(5, 5), classes=("a", "b"), **options):
        folder = tmp_path / name
        folder.mkdir()
        options = {"seed": seed, "out": str(folder), "attention": "channel_spatial", "lr": 1e-3, **options}
        (folder / "options.yaml").write_text(yaml.safe_dump(options))
        test = {"accuracy": accuracy, "balanced_accuracy": accuracy, "macro_f1": accuracy, "support": support}
        epochs = [{"epoch": e, "cross_entropy": 1 / e, "accuracy": accuracy} for e in (1, 2)]
        (folder / "metrics.json").write_text(json.dumps({"test": test, "classes": classes, "epochs": epochs}))
        return str(folder)

    return write


def three_groups(runs):
    plain = [runs(f"plain-{s}", s, 0.70 + 0.01 * s) for s in range(3)]
    better = [runs(f"spatial-{s}", s, 0.75 + 0.012 * s, attention="spatial") for s in range(3)]
    other = [runs("other-7", 7, 0.9, lr=1e-2)]
    return plain + better + other


def test_groups_are_compared_with_the_first(runs, tmp_path, capsys):
    assert main(["compare", *three_groups(runs), "--out", str(tmp_path / "compared")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "71.0 ± 2.5" in shown
    assert "attention spatial, lr 0.001 minus attention channel_spatial, lr 0.001" in shown
    assert "fewer than two common seeds" in shown
    found = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert [len(group["runs"]) for group in found["groups"]] == [3, 3, 1]
    first, second = found["differences"]
    assert first["mean"] == pytest.approx(0.052)
    assert first["seeds"] == 3
    assert first["holm"] == pytest.approx(first["p"])  # the other has no test
    assert second["holm"] is None
    assert (tmp_path / "compared" / "curves.png").stat().st_size > 1000


def test_holms_correction(runs, tmp_path):
    names = [runs(f"a-{s}", s, 0.70 + 0.010 * s) for s in range(3)]
    names += [runs(f"b-{s}", s, 0.75 + 0.012 * s, attention="spatial") for s in range(3)]
    names += [runs(f"c-{s}", s, 0.71 + 0.030 * s, attention="none") for s in range(3)]
    assert main(["compare", *names, "--out", str(tmp_path / "out")]) == 0
    smaller, larger = json.loads((tmp_path / "out" / "compare.json").read_text())["differences"]
    assert smaller["p"] < larger["p"]
    assert smaller["holm"] == pytest.approx(2 * smaller["p"])
    assert larger["holm"] == pytest.approx(max(larger["p"], smaller["holm"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support": (4, 6)}, "has other test images than"),
        ({"classes": ("a", "c")}, "has other classes than"),
        ({"seed": 0}, "has the options and the seed of another run"),
    ],
)
def test_what_does_not_compare_is_one_line(runs, capsys, change, message):
    names = [runs("first", 0, 0.5), runs("second", **{"seed": 1, "accuracy": 0.6, **change})]
    assert main(["compare", *names]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_what_is_no_finished_run_is_one_line(runs, tmp_path, capsys):
    first = runs("first", 0, 0.5)
    assert main(["compare", first]) == 2
    assert "needs two runs or more; got 1" in capsys.readouterr().err
    assert main(["compare", first, str(tmp_path)]) == 2
    assert "is not the folder of a finished run: it has no options.yaml" in capsys.readouterr().err
    broken = runs("broken", 1, 0.5)
    (tmp_path / "broken" / "metrics.json").write_text("{")
    assert main(["compare", first, broken]) == 2
    assert "the results of" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text("mine")
    assert main(["compare", first, runs("second", 1, 0.6), "--out", str(tmp_path / "out")]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
