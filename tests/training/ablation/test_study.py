"""An ablation can be resumed cell by cell, and it chooses lambda on validation images."""

import json
import logging
from dataclasses import replace

import pytest

from ggam_fast.training.ablation import study as ablation
from ggam_fast.training.ablation.study import (
    AblateConfig,
    Cell,
    StudyConfig,
    ablate,
    chosen_weight,
    few_shot,
    plan,
    planned,
    with_validation,
)
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.run.prepare import load_images


def cells(config):
    return {path.name: path.stat().st_mtime_ns for path in (config.study.out / "cells").iterdir()}


def of(config, **changes):
    return replace(config, study=replace(config.study, **changes))


def result(attention, guidance, weight, seed, val, nll=1.0, test=0.5):
    return {
        "cell": vars(Cell(attention, guidance, weight, seed)),
        "val": {"accuracy": val, "nll": nll},
        "test": {"accuracy": test},
    }


def test_it_goes_on_where_it_was_interrupted(study, report, monkeypatch, caplog):
    run_cell, calls = ablation.run_cell, []

    def twice(*arguments):
        if len(calls) == 2:
            raise Interrupted
        calls.append(arguments)
        return run_cell(*arguments)

    monkeypatch.setattr(ablation, "run_cell", twice)
    with caplog.at_level(logging.INFO):
        assert not ablate(study, report, "the command")
    assert "8 cells left, about" in caplog.text
    assert "7 cells left, about" not in caplog.text
    before = cells(study)
    assert len(before) == 2
    assert "Unfinished: 2 of 10 cells" in (study.study.out / "report.md").read_text()
    monkeypatch.setattr(ablation, "run_cell", run_cell)
    assert ablate(study, report, "the command")
    after = cells(study)
    # Two lambdas with one seed; then three attentions without guidance and one with, with two seeds each.
    assert len(after) == planned(study) == 2 + 2 * 4
    assert before.items() <= after.items()
    text = (study.study.out / "report.md").read_text()
    assert "Unfinished" not in text
    assert "the command" in text
    for name in ("report.json", "table.png", "choice.png", "mechanism.png", "side_by_side.jpg"):
        assert (study.study.out / name).stat().st_size
    # One more seed adds its cells and does not train the others again.
    assert ablate(of(study, seeds=(1, 2, 3), attentions=("none",)), report, "")
    assert len(cells(study)) == len(after) + 1


def test_cells_of_other_options_are_refused(study, report):
    short = of(study, attentions=("none",), seeds=(1,))
    assert ablate(short, report, "")
    before = cells(study)
    with pytest.raises(TrainError, match="--epochs 1, not 2"):
        ablate(of(short, epochs=2), report, "")
    with pytest.raises(TrainError, match="--norm-eps"):
        ablate(of(short, norm_eps=0.5), report, "")
    path = study.study.out / "cells" / "none-none-seed1.json"
    assert cells(study) == before
    older = json.loads(path.read_text())
    del older["options"]["layer_decay"]
    path.write_text(json.dumps(older))
    assert ablate(short, report, "")  # an option that came later has its default
    del older["options"]["norm_eps"]
    path.write_text(json.dumps(older))
    with pytest.raises(TrainError, match="--norm-eps"):
        ablate(of(short, norm_eps=0.5), report, "")
    path.write_text("{")
    with pytest.raises(TrainError, match="not a finished cell"):
        ablate(short, report, "")


def test_the_same_seed_gives_the_same_cell(study, report, tmp_path):
    found = []
    for name in ("a", "b"):
        short = of(study, attentions=("spatial",), guidances=("positions",), seeds=(3,), out=tmp_path / name)
        assert ablate(short, report, "")
        path = tmp_path / name / "cells" / "spatial-positions-1-seed3.json"
        found.append(json.loads(path.read_text()))
    for key in ("val", "test", "mechanism", "pictures"):
        assert found[0][key] == found[1][key]


def test_every_cell_trains_the_last_layers_anew(study, report, tmp_path):
    found = {}
    for out, seeds in (("two", (1, 2)), ("one", (2,)), ("frozen", (2,))):
        tuned = {} if out == "frozen" else {"finetune_from": "layer4", "backbone_lr": 1e-2}
        short = of(study, attentions=("spatial",), seeds=seeds, out=tmp_path / out, epochs=2, **tuned)
        assert ablate(short, report, "")
        cell = json.loads((tmp_path / out / "cells" / "spatial-none-seed2.json").read_text())
        found[out] = (
            [{**epoch, "images_per_second": 0} for epoch in cell["epochs"]],
            [cell[key] for key in ("val", "test", "mechanism", "pictures")],
        )
    assert found["two"] == found["one"] != found["frozen"]
    assert found["one"][0][-1]["loss"] != found["frozen"][0][-1]["loss"]
    assert "fine-tuned from layer4 on" in (tmp_path / "one" / "report.md").read_text()
    frozen = of(study, attentions=("spatial",), seeds=(2,), out=tmp_path / "one", epochs=2)
    with pytest.raises(TrainError, match="--finetune-from layer4, not None"):
        ablate(frozen, report, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "--seeds must be one or more different values"),
        ({"seeds": (1, 1)}, "--seeds must be one or more different values"),
        ({"seeds": (0, 1)}, "--seeds and --choice-seeds must differ; both have 0"),
        ({"choice_seeds": ()}, "--choice-seeds must not be empty"),
        ({"guidance_weights": (0.1, 0.0)}, "--guidance-weights must be above 0"),
        ({"position_weights": (-1.0,)}, "--position-weights must be above 0"),
        (
            {"attentions": ("none",), "guidances": ("paper",)},
            "--guidances paper do not suit --attentions none",
        ),
        ({"train_per_class": 0}, "--train-per-class must be 1 or more"),
        ({"epochs": 0}, "--epochs must be 1 or more"),
        ({"thresholds": 0}, "--thresholds must be from 1 to 1000"),
        ({"finetune_from": "layer9"}, "--finetune-from layer9 cannot be used"),
    ],
)
def test_bad_choices_are_named(study, report, change, message):
    with pytest.raises(TrainError, match=message):
        ablate(of(study, **change), report, "")
    assert not study.study.out.exists()


def test_a_folder_of_something_else_is_left_alone(study, report):
    study.study.out.mkdir()
    (study.study.out / "thesis.txt").write_text("mine")
    with pytest.raises(TrainError, match="it holds other files"):
        ablate(study, report, "")
    assert [path.name for path in study.study.out.iterdir()] == ["thesis.txt"]


def test_the_default_table_has_fifteen_rows():
    config = AblateConfig()
    pairs = config.pairs()
    assert len(pairs) == 15
    assert [guidance for attention, guidance in pairs if attention == "none"] == ["none"]
    assert [guidance for attention, guidance in pairs if attention == "spatial"] == ["none", "positions"]
    assert "both" not in [guidance for attention, guidance in pairs if attention == "channel"]
    every = list(plan(config, lambda *pair: 0.5))
    assert len(every) == planned(config) == 11 * 4 * 2 + 15 * 5
    assert len({cell.name for cell in every}) == len(every)
    for cell in every:
        training = config.training(cell)
        training.check()
        assert bool(training.optim.guidance_weight) == (cell.guidance not in ("none", "positions"))
        guides_t = cell.guidance in ("positions", "both")
        assert not guides_t or training.optim.position_weight == cell.weight
        assert training.head.position_guidance == ("relu" if guides_t else "none")


def test_a_single_lambda_is_not_tried():
    config = AblateConfig(study=StudyConfig(guidances=("positions",), position_weights=(3.0,)))
    assert {cell.seed for cell in plan(config, lambda *pair: 3.0)} == set(config.study.seeds)
    assert chosen_weight([], "spatial", "positions", (3.0,)) == 3.0


def test_lambda_is_chosen_on_validation_images_alone():
    results = [
        result("channel_spatial", "paper", 0.1, 0, 0.6, test=0.9),
        result("channel_spatial", "paper", 0.1, 1, 0.6, test=0.9),
        result("channel_spatial", "paper", 1.0, 0, 0.5, test=0.1),
        result("channel_spatial", "paper", 1.0, 1, 0.8, test=0.1),
        result("channel_spatial", "paper", 3.0, 0, 0.65, nll=0.9),
        result("channel_spatial", "release", 3.0, 0, 0.9),
        result("channel", "paper", 5.0, 0, 0.95),
    ]
    weights = (0.1, 1.0, 3.0, 5.0)
    assert chosen_weight(results, "channel_spatial", "paper", weights) == 3.0  # by its likelihood
    assert chosen_weight(results[:4], "channel_spatial", "paper", weights) == 1.0
    assert chosen_weight(results, "channel", "paper", weights) == 5.0


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


def test_few_images_of_each_class(study):
    images = load_images(study.data)
    few = few_shot(images, 2)
    assert images.labels[few.splits["train"]].bincount().tolist() == [2, 2, 2]
    assert set(few.splits["train"].tolist()) < set(images.splits["train"].tolist())
    assert few.splits["test"] is images.splits["test"]
    assert "at most 2 of each class" in few.notes[-1]


def test_the_command(run_command, photos, tmp_path):
    done = run_command(
        "ablate", "--data", "folder", "--root", photos, "--image-size", "64", "--enlarge", "--out", "found",
        *("--backbone", "test_resnet", "--no-pretrained", "--epochs", "1", "--batch-size", "8"),
        *("--attentions", "none", "spatial", "--guidances", "none", "mean_activation"),
        *("--seeds", "1", "--choice-seeds", "0", "--position-weights", "1"),
        *("--finetune-from", "layer4", "--no-compile", "--no-pictures"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "found" / "report.md").read_text()
    assert "fine-tuned from layer4 on" in text
    assert "control: mean activation" in text
    assert not (tmp_path / "found" / "side_by_side.jpg").exists()
    assert "side_by_side" not in text
    wrong = run_command("ablate", "--seeds", "0", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_cells_of_other_images_are_refused(study, report, photos):
    short = of(study, attentions=("none",), seeds=(1,))
    assert ablate(short, report, "")
    (photos / "red" / "0.png").unlink()
    with pytest.raises(TrainError, match="cells of other images"):
        ablate(short, report, "")


def test_unreadable_images_are_left_out(study, report, photos):
    (photos / "red" / "0.png").write_bytes(b"no image")
    short = of(study, attentions=("none",), seeds=(1,))
    assert ablate(replace(short, data=replace(short.data, skip_bad_images=True)), report, "")
