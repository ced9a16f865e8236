import json
import shutil
from dataclasses import replace

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.config.options import TrainConfig
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import loop
from ggam_fast.training.run.train import create_classifier, image_batches, load_images, train
from ggam_fast.training.system.compiling import compile_or_eager


def said(report) -> str:
    return report.console.file.getvalue()


def numbers(folder) -> dict:
    results = json.loads((folder / "metrics.json").read_text())
    for epoch in results["epochs"]:
        del epoch["images_per_second"]
    return {"test": results["test"], "epochs": results["epochs"]}


def test_run_learns_and_leaves_all_its_results(tiny_config, report):
    # At the default rate 24 steps change little: what it then answers is chance.
    tiny_config = replace(tiny_config, optim=replace(tiny_config.optim, lr=3e-3))
    outcome = train(tiny_config, report)
    out = tiny_config.run.out
    names = {path.name for path in out.iterdir()}
    results = {"model.safetensors", "best.safetensors", "config.json", "metrics.json", "gallery.png"}
    assert names == results | {"options.yaml", "log.jsonl", "tensorboard", "snapshots"}
    assert any((out / "tensorboard").iterdir())
    epochs = numbers(out)["epochs"]
    assert len(epochs) == 4
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert outcome.metrics.accuracy == 1.0
    assert f"accuracy {outcome.metrics.accuracy:.3f}" in said(report)
    assert outcome.checkpoint == out / "model.safetensors"


def test_same_seed_same_numbers_and_weights(tiny_config, report, elsewhere):
    train(tiny_config, report)
    cached = elsewhere(tiny_config, "again")
    train(cached, report)  # its maps come from the cache
    other = elsewhere(tiny_config, "other")
    train(replace(other, optim=replace(other.optim, seed=1)), report)
    assert numbers(tiny_config.run.out) == numbers(cached.run.out)
    assert said(report).count("feature maps, ") == 2  # random weights differ with the seed
    first, second, third = (
        load_checkpoint(config.run.out).model.state_dict() for config in (tiny_config, cached, other)
    )
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert not all(tensor.equal(third[name]) for name, tensor in first.items())


def test_frozen_backbone_stays_as_it_was_and_fine_tuning_moves_it(tiny_config, report, elsewhere):
    before = create_classifier(tiny_config, 3)
    torch.manual_seed(tiny_config.optim.seed)
    before = create_classifier(tiny_config, 3).backbone.state_dict()
    train(tiny_config, report)
    frozen = load_checkpoint(tiny_config.run.out).model.backbone.state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in frozen.items())
    tuned = elsewhere(tiny_config, "tuned")
    tuned = replace(tuned, backbone=replace(tuned.backbone, finetune=True))
    train(tuned, report)
    moved = load_checkpoint(tuned.run.out).model.backbone.state_dict()
    assert not any(tensor.equal(before[name]) for name, tensor in moved.items() if name.endswith("weight"))


def test_reported_accuracy_is_that_of_the_reloaded_checkpoint(tiny_config, report):
    outcome = train(tiny_config, report)
    model = load_checkpoint(tiny_config.run.out).model
    images = load_images(tiny_config.data)
    batches = image_batches(images, model, tiny_config, torch.device("cpu"))
    logits, labels = loop.evaluate(model, batches["test"], torch.device("cpu"))
    assert (logits.argmax(1) == labels).float().mean().item() == outcome.metrics.accuracy


def test_validation_split_is_followed(tiny_config, report, photos):
    for split, share in (("train", slice(0, 6)), ("val", slice(6, 8)), ("test", slice(8, 10))):
        for name in ("red", "green", "blue"):
            for path in sorted((photos / name).iterdir())[share] if (photos / name).is_dir() else ():
                target = photos.parent / "split" / split / name
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    data = replace(tiny_config.data, root=photos.parent / "split")
    train(replace(tiny_config, data=data), report)
    epochs = numbers(tiny_config.run.out)["epochs"]
    assert all(0 <= epoch["val_accuracy"] <= 1 for epoch in epochs)


@pytest.mark.parametrize(
    ("part", "option", "words"),
    [
        ("optim", {"epochs": 0}, "--epochs"),
        ("optim", {"batch_size": 1}, "--batch-size"),
        ("optim", {"lr": float("nan")}, "--lr"),
        ("optim", {"guidance_weight": -1.0}, "--guidance-weight"),
        ("head", {"rd_ratio": 7.0}, "rd_ratio"),
        ("head", {"drop_rate": 1.5}, "drop_rate"),
        ("run", {"device": "abacus"}, "--device"),
        ("backbone", {"backbone": "nonesuch"}, "--backbone"),
    ],
)
def test_bad_option_leaves_nothing_behind(tiny_config, report, part, option, words):
    config = replace(tiny_config, **{part: replace(getattr(tiny_config, part), **option)})
    with pytest.raises(TrainError, match=words) as raised:
        train(config, report)
    assert "\n" not in str(raised.value)
    assert not config.run.out.exists()


def test_unreadable_image_leaves_nothing_behind(tiny_config, report, photos):
    (photos / "red" / "3.png").write_bytes(b"broken")
    with pytest.raises(TrainError, match=r"3\.png"):
        train(tiny_config, report)
    assert not tiny_config.run.out.exists()


def test_folder_of_an_earlier_run_is_not_overwritten(tiny_config, report):
    tiny_config.run.out.mkdir()
    (tiny_config.run.out / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match="--overwrite"):
        train(tiny_config, report)
    assert [path.name for path in tiny_config.run.out.iterdir()] == ["notes.txt"]


def test_what_cannot_be_compiled_runs_eagerly_and_says_so(monkeypatch):
    def no_compiler(function, **options):
        def compiled(*arguments):
            module(torch.ones(2, 3))  # moves the statistics of batch norm
            raise RuntimeError("\nNo working C++ compiler found\nand a long story")

        return compiled

    module = torch.nn.BatchNorm1d(3)
    monkeypatch.setattr(torch, "compile", no_compiler)
    notes: list[str] = []
    step = compile_or_eager(module, module, lambda f: f(torch.ones(2, 3)), notes.append)
    assert step is module
    assert len(notes) == 1
    assert "No working C++ compiler found" in notes[0]
    assert "\n" not in notes[0]
    assert module.num_batches_tracked == 0
    assert module.running_mean.eq(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("finetune", [False, True])
def test_compiled_step_follows_the_eager_one(tiny_config, report, elsewhere, finetune):
    tiny_config = replace(
        tiny_config,
        backbone=replace(tiny_config.backbone, finetune=finetune),
        optim=replace(tiny_config.optim, epochs=2),
    )
    compiled = elsewhere(tiny_config, "compiled")
    compiled = replace(compiled, run=replace(compiled.run, compile=True))
    train(tiny_config, report)
    torch._dynamo.utils.counters.clear()
    train(compiled, report)
    assert "running eagerly" not in said(report)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1  # one shape, compiled once
    for ours, theirs in zip(
        numbers(compiled.run.out)["epochs"], numbers(tiny_config.run.out)["epochs"], strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_default_configuration_is_valid():
    TrainConfig().check()


def test_diverged_run_is_an_error(tiny_config, report):
    with pytest.raises(TrainError, match=r"training loss of epoch \d is (nan|inf)"):
        train(replace(tiny_config, optim=replace(tiny_config.optim, lr=1e30)), report)
    assert not (tiny_config.run.out / "metrics.json").exists()


def test_dollar_signs_are_drawn(tiny_config, report, photos):
    (photos / "red").rename(photos / "$_$")
    (photos / "blue").rename(photos / "$5 #1")
    outcome = train(tiny_config, report)
    assert outcome.gallery is not None


def test_maps_that_were_enlarged_do_not_hide_small_images(tiny_config, report, elsewhere):
    larger = replace(tiny_config, data=replace(tiny_config.data, image_size=256))
    train(larger, report)
    strict = replace(elsewhere(larger, "strict"), data=replace(larger.data, enlarge=False))
    with pytest.raises(TrainError, match="smaller than the crop"):
        train(strict, report)


def test_overwriting_removes_what_was_made_of_the_older_run(tiny_config, report):
    train(tiny_config, report)
    (tiny_config.run.out / "evaluation.json").write_text("{}")
    train(replace(tiny_config, run=replace(tiny_config.run, overwrite=True)), report)
    assert not (tiny_config.run.out / "evaluation.json").exists()
