"""Options are read back as they were written. A bad file gives an error of one line."""

import pytest

from ggam_fast.training.cli import main
from ggam_fast.training.cli.commands import parse_train
from ggam_fast.training.config.config_file import config_text, read_config_file
from ggam_fast.training.config.options import TrainConfig
from ggam_fast.training.errors import TrainError


def test_written_options_are_read_back(tmp_path):
    config = parse_train(["--recipe", "paper", "--preset", "paper", "--root", "here", "--lr", "1e-5"])
    (tmp_path / "options.yaml").write_text(config_text(config.values()))
    assert parse_train(["--config", str(tmp_path / "options.yaml")]) == config


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "options.yaml"
    known = TrainConfig().values()
    text = config_text({**known, "epochs": 12, "seed": 34})
    path.write_text(text)
    whole = read_config_file(path, known)
    for length in range(1, len(text) - 1):  # without the last line feed it is whole
        path.write_text(text[:length])
        with pytest.raises(TrainError, match="is cut off: it must end with the line"):
            read_config_file(path, known)
    path.write_text("epochs: 12\n")  # no file of ours
    assert read_config_file(path, known) == {"epochs": 12}
    path.write_text(text[:-1])
    assert read_config_file(path, known) == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "unknown option epoch; the nearest is epochs"),
        ("guidance-wieght: 3", "the nearest is guidance_weight"),
        ("optim:\n  epochs: 3", "unknown option optim"),
        ("epochs: {a: 3}", "epochs must be one value"),
        ("- epochs", "must hold options"),
        ("epochs: [3", "not YAML"),
    ],
)
def test_bad_file_is_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_missing_file_and_bad_toml(tmp_path):
    with pytest.raises(TrainError, match="cannot be read"):
        read_config_file(tmp_path / "none.yaml", ["epochs"])
    (tmp_path / "a.toml").write_text("epochs 3")
    with pytest.raises(TrainError, match="not TOML"):
        read_config_file(tmp_path / "a.toml", ["epochs"])


def test_wrong_type_in_a_file_is_code_2(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("epochs: many\n")
    with pytest.raises(SystemExit) as exit:
        main(["train", "--config", str(path)])
    assert exit.value.code == 2
    assert "many" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text"), [("a.toml", "epochs = 3\n"), ("a.yaml", "epochs: 3\n")])
def test_a_byte_order_mark_is_read_over(tmp_path, name, text):
    (tmp_path / name).write_bytes("\ufeff".encode() + text.encode())
    assert read_config_file(tmp_path / name, ["epochs"]) == {"epochs": 3}
