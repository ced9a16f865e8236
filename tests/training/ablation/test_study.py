"""An ablation can be resumed cell by cell, and it chooses lambda on validation images."""

import json
from dataclasses import replace

import pytest

from ggam_fast.training.ablation import study as ablation
from ggam_fast.training.ablation.study import (
    Cell,
    StudyConfig,
    ablate,
    chosen_weight,
    plan,
    with_validation,
)
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.run.prepare import load_images


def cells(config):
    return {path.name: path.stat().st_mtime_ns for path in (config.study.out / "cells").iterdir()}


def result(attention, norm, weight, seed, val, test=0.5):
    return {
        "cell": vars(Cell(attention, norm, weight, seed)),
        "val": {"accuracy": val},
        "test": {"accuracy": test},
    }


def test_it_goes_on_where_it_was_interrupted(study, report, monkeypatch):
    run_cell, calls = ablation.run_cell, []

    def twice(*arguments):
        if len(calls) == 2:
            raise Interrupted
        calls.append(arguments)
        return run_cell(*arguments)

    monkeypatch.setattr(ablation, "run_cell", twice)
    assert not ablate(study, report, "the command")
    before = cells(study)
    assert len(before) == 2
    assert "Unfinished" in (study.study.out / "report.md").read_text()
    monkeypatch.setattr(ablation, "run_cell", run_cell)
    assert ablate(study, report, "the command")
    after = cells(study)
    # Four attentions, two lambdas, and the better lambda for the channel attention, with two seeds each.
    assert len(after) == 2 * (4 + 2 + 1)
    assert before.items() <= after.items()
    text = (study.study.out / "report.md").read_text()
    assert "Unfinished" not in text
    assert "the command" in text
    for name in ("report.json", "table.png", "sweep.png", "beta.png", "side_by_side.jpg"):
        assert (study.study.out / name).stat().st_size
    # One more seed adds its cells and does not train the others again.
    assert ablate(
        replace(study, study=replace(study.study, seeds=(0, 1, 2), attentions=("none",))), report, ""
    )
    assert len(cells(study)) == len(after) + 1


def test_cells_of_other_options_are_refused(study, report):
    short = replace(study, study=replace(study.study, attentions=("none",), seeds=(0,)))
    assert ablate(short, report, "")
    before = cells(study)
    with pytest.raises(TrainError, match="--epochs 1, not 2"):
        ablate(replace(short, study=replace(short.study, epochs=2)), report, "")
    with pytest.raises(TrainError, match="--norm-eps"):
        ablate(replace(short, study=replace(short.study, norm_eps=0.5)), report, "")
    path = study.study.out / "cells" / "none-unguided-seed0.json"
    assert cells(study) == before
    path.write_text("{")
    with pytest.raises(TrainError, match="not a finished cell"):
        ablate(short, report, "")


def test_the_same_seed_gives_the_same_cell(study, report, tmp_path):
    found = []
    for name in ("a", "b"):
        short = replace(study.study, attentions=("channel_spatial",), seeds=(3,), out=tmp_path / name)
        assert ablate(replace(study, study=short), report, "")
        path = tmp_path / name / "cells" / "channel_spatial-sigmoid-1-seed3.json"
        found.append(json.loads(path.read_text()))
    for key in ("val", "test", "beta", "pictures"):
        assert found[0][key] == found[1][key]


def test_every_cell_trains_the_last_layers_anew(study, report, tmp_path):
    found = {}
    for out, seeds in (("two", (0, 1)), ("one", (1,)), ("frozen", (1,))):
        tuned = {} if out == "frozen" else {"finetune_from": "layer4", "backbone_lr": 1e-2}
        short = replace(study.study, attentions=("spatial",), seeds=seeds, out=tmp_path / out, epochs=2)
        short = replace(study, study=replace(short, **tuned))
        assert ablate(short, report, "")
        cell = json.loads((tmp_path / out / "cells" / "spatial-unguided-seed1.json").read_text())
        found[out] = (
            [{**epoch, "images_per_second": 0} for epoch in cell["epochs"]],
            [cell[key] for key in ("val", "test", "beta", "pictures")],
        )
    assert found["two"] == found["one"] != found["frozen"]
    assert found["one"][0][-1]["loss"] != found["frozen"][0][-1]["loss"]
    assert "fine-tuned from layer4 on" in (tmp_path / "one" / "report.md").read_text()
    frozen = replace(study.study, attentions=("spatial",), seeds=(1,), out=tmp_path / "one", epochs=2)
    with pytest.raises(TrainError, match="--finetune-from layer4, not None"):
        ablate(replace(study, study=frozen), report, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "--seeds must be one or more different values"),
        ({"seeds": (1, 1)}, "--seeds must be one or more different values"),
        ({"guidance_weights": (0.1, 0.0)}, "--guidance-weights must be above 0"),
        ({"epochs": 0}, "--epochs must be 1 or more"),
        ({"thresholds": 0}, "--thresholds must be from 1 to 1000"),
        ({"finetune_from": "layer9"}, "--finetune-from layer9 cannot be used"),
    ],
)
def test_bad_choices_are_named(study, report, change, message):
    with pytest.raises(TrainError, match=message):
        ablate(replace(study, study=replace(study.study, **change)), report, "")
    assert not study.study.out.exists()


def test_a_folder_of_something_else_is_left_alone(study, report):
    study.study.out.mkdir()
    (study.study.out / "thesis.txt").write_text("mine")
    with pytest.raises(TrainError, match="it holds other files"):
        ablate(study, report, "")
    assert [path.name for path in study.study.out.iterdir()] == ["thesis.txt"]


def test_rows_without_channel_attention_have_no_guidance():
    study = StudyConfig(seeds=(0,), guidance_weights=(0.1, 1.0))
    planned = list(plan(study, lambda: 0.1))
    assert {cell.attention for cell in planned if cell.weight} == {"channel", "channel_spatial"}
    assert [cell.weight for cell in planned if cell.attention == "channel"] == [0.0, 0.1]
    assert len({cell.name for cell in planned}) == len(planned) == 4 + 3 * 2 + 1


def test_lambda_is_chosen_on_validation_images_alone():
    results = [
        result("channel_spatial", "sigmoid", 0.0, 0, 0.99),
        result("channel_spatial", "sigmoid", 0.1, 0, 0.6, test=0.9),
        result("channel_spatial", "sigmoid", 0.1, 1, 0.6, test=0.9),
        result("channel_spatial", "sigmoid", 1.0, 0, 0.5, test=0.1),
        result("channel_spatial", "sigmoid", 1.0, 1, 0.8, test=0.1),
        result("channel_spatial", "softmax", 3.0, 0, 0.9),
        result("channel", "sigmoid", 5.0, 0, 0.95),
    ]
    assert chosen_weight(results, "sigmoid") == 1.0
    assert chosen_weight(results, "standardized") is None


def test_every_fifth_training_image_stands_in_for_validation(study):
    images = load_images(study.data)
    train = images.splits["train"]
    held = with_validation(images)
    assert with_validation(held) is held
    assert len(held.splits["val"]) == sum(
        (images.labels[train] == label).sum().item() // 5 for label in range(3)
    )
    assert set(held.splits["val"].tolist()) | set(held.splits["train"].tolist()) == set(train.tolist())
    assert "validation split" in held.notes[-1]


def test_the_command(run_command, photos, tmp_path):
    done = run_command(
        "ablate", "--data", "folder", "--root", photos, "--image-size", "64", "--enlarge", "--out", "found",
        *("--backbone", "test_resnet", "--no-pretrained", "--epochs", "1", "--batch-size", "8"),
        *("--attentions", "none", "spatial", "--seeds", "0", "--no-compile", "--no-pictures"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found" / "report.md").is_file()
    assert not (tmp_path / "found" / "side_by_side.jpg").exists()
    assert "side_by_side" not in (tmp_path / "found" / "report.md").read_text()
    wrong = run_command("ablate", "--seeds", "0", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_cells_of_other_images_are_refused(study, report, photos):
    short = replace(study, study=replace(study.study, attentions=("none",), seeds=(0,)))
    assert ablate(short, report, "")
    (photos / "red" / "0.png").unlink()
    with pytest.raises(TrainError, match="cells of other images"):
        ablate(short, report, "")


def test_unreadable_images_are_left_out(study, report, photos):
    (photos / "red" / "0.png").write_bytes(b"no image")
    short = replace(study, study=replace(study.study, attentions=("none",), seeds=(0,)))
    assert ablate(replace(short, data=replace(short.data, skip_bad_images=True)), report, "")
