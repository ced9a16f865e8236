"""Flags override the file, which overrides the preset, which overrides the recipe."""

from dataclasses import replace
from pathlib import Path

import pytest

import ggam_fast
from ggam_fast.training.cli import main
from ggam_fast.training.cli.commands import _parsed, parse_train
from ggam_fast.training.config.config_file import config_text
from ggam_fast.training.config.options import TrainConfig
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run.artifacts import OPTIONS
from ggam_fast.training.run.train import train
from ggam_fast.training.use.evaluate import EvaluateConfig
from ggam_fast.training.use.explain import ExplainConfig


def test_preset_fills_in_and_options_beside_it_win():
    config = parse_train(["--preset", "release", "--pool-type", "avg", "--epochs", "3"])
    keywords = config.head.keywords()
    assert {name: keywords[name] for name in ggam_fast.presets.RELEASE} == {
        **ggam_fast.presets.RELEASE,
        "pool_type": "avg",
    }
    assert (keywords["attention_scale"], keywords["norm_eps"]) == ("printed", 1e-5)
    assert parse_train(["--preset", "paper", "--norm-eps", "0.5"]).head.norm_eps == 0.5
    assert config.optim.epochs == 3
    assert parse_train([]).head.preset is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "epochs: 3\nlr: 0.01\nfinetune: true\ncompile: false\nroot: photos\ncam-norm: softmax\n"),
        ("a.toml", 'epochs = 3\nlr = 1e-2\nfinetune = true\ncompile = false\nroot = "photos"\n'
                   'cam_norm = "softmax"\n'),
    ],
)  # fmt: skip
def test_file_sets_options_and_flags_win(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    config = parse_train(["--config", str(path), "--epochs", "5"])
    assert (config.optim.epochs, config.optim.lr) == (5, 0.01)
    assert (config.backbone.finetune, config.run.compile) == (True, False)
    assert (config.data.root, config.head.cam_norm) == (Path("photos"), "softmax")
    assert config.optim.batch_size == TrainConfig().optim.batch_size


def test_recipe_preset_file_and_flags_in_that_order(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("recipe: paper\nepochs: 7\npool_type: flatten\n")
    config = parse_train(["--config", str(path), "--preset", "release", "--weight-decay", "0.5"])
    assert (config.optim.optimizer, config.data.image_size, config.data.resize) == ("sgd", 448, 600)
    assert config.optim.backbone_lr == pytest.approx(config.optim.lr / 10)
    assert config.optim.epochs == 7
    assert (config.head.pool_type, config.head.spatial_norm) == ("flatten", "sigmoid")
    assert config.optim.weight_decay == 0.5


def test_options_saved_with_a_run_repeat_it(tiny_config, report, tmp_path):
    train(tiny_config, report)
    again = parse_train(["--config", str(tiny_config.run.out / OPTIONS), "--out", str(tmp_path / "b")])
    assert again == replace(tiny_config, run=replace(tiny_config.run, out=tmp_path / "b"))


def test_what_is_told_by_its_place_can_stand_in_a_file_too(tmp_path):
    """The path of a run or of images has no flag. On the command line it overrides the file."""
    (tmp_path / "a.yaml").write_text("run: runs/a\nsteps: 3\n")
    for given, run in (((), "runs/a"), (("runs/b",), "runs/b")):
        config = _parsed("evaluate", EvaluateConfig(), ["--config", str(tmp_path / "a.yaml"), *given])
        assert (config.run, config.insertion_steps) == (Path(run), 3)
    (tmp_path / "b.toml").write_text('run = "runs/a"\nimages = ["a.png", "b.png"]\n')
    config = _parsed("explain", ExplainConfig(), ["--config", str(tmp_path / "b.toml")])
    assert (config.run, config.images) == (Path("runs/a"), (Path("a.png"), Path("b.png")))
    (tmp_path / "c.yaml").write_text("run: runs/a\nimages: a.png\n")
    config = _parsed("explain", ExplainConfig(), ["--config", str(tmp_path / "c.yaml")])
    assert config.images == (Path("a.png"),)


def test_a_recipe_that_a_whole_file_undoes_is_refused(tmp_path):
    (tmp_path / "options.yaml").write_text(config_text(parse_train([]).values()))
    for flags in (["--recipe", "paper"], ["--preset", "release"]):
        with pytest.raises(TrainError, match=f"{flags[0]} {flags[1]} means"):
            parse_train(["--config", str(tmp_path / "options.yaml"), *flags])
    assert parse_train(["--preset", "None"]).head.preset is None


def test_options_of_another_run_are_refused(tiny_config, report, capsys):
    train(tiny_config, report)
    out = str(tiny_config.run.out)
    capsys.readouterr()
    assert main(["train", "--resume", out, "--epochs", "3"]) == 2
    assert "there --epochs is 4" in capsys.readouterr().err
    assert main(["train", "--resume", out + "-not"]) == 2
    assert "--resume must name the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(("length", "words"), [(-30, "is cut off"), (0, "is empty"), (20, "is cut off")])
def test_a_run_without_all_its_options_is_refused(tiny_config, report, capsys, length, words):
    """The missing options would silently have their defaults."""
    train(tiny_config, report)
    path = tiny_config.run.out / OPTIONS
    text = path.read_text()
    path.write_text(text[:length])
    capsys.readouterr()
    assert main(["train", "--resume", str(tiny_config.run.out)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    path.write_text(text)
    assert main(["train", "--resume", str(tiny_config.run.out)]) == 0


@pytest.mark.parametrize(
    "given", [["--recipe", "paper"], ["--preset", "release"], ["--config", "x.yaml"], ["--out", "elsewhere"]]
)
def test_options_that_a_resumed_run_would_ignore_are_refused(tiny_config, report, capsys, given):
    train(tiny_config, report)
    capsys.readouterr()
    assert main(["train", "--resume", str(tiny_config.run.out), *given]) == 2
    assert f"{given[0]}" in capsys.readouterr().err


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch, capsys):
    """A shell replaces ~ neither in a file nor behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("root: ~/photos\ncache_dir: ~/\nout: ~nobody-of-that-name/out\n")
    config = parse_train(["--config=~/a.yaml"])
    assert (config.data.root, config.data.cache_dir) == (tmp_path / "photos", tmp_path)
    assert config.run.out == Path("~nobody-of-that-name/out")
    assert parse_train(["--root=~/b"]).data.root == tmp_path / "b"
    config = _parsed("explain", ExplainConfig(), ["~/a.png", "b.png", "--run=~/run"])
    assert (config.images, config.run) == ((tmp_path / "a.png", Path("b.png")), tmp_path / "run")
    assert main(["train", "--resume", "~/gone"]) == 2
    assert f"{tmp_path}/gone has no options.yaml" in capsys.readouterr().err
    assert main(["data", "check", "--data", "folder", "--root", "~/gone"]) == 2
    assert f"--root {tmp_path}/gone is not a folder" in capsys.readouterr().err
