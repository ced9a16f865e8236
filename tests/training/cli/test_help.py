"""The help of every command fits a screen and names every option."""

import re

import pytest

from ggam_fast.training.ablation.study import AblateConfig
from ggam_fast.training.cli import main
from ggam_fast.training.cli.commands import COMMANDS
from ggam_fast.training.config.options import TrainConfig


def test_help_of_every_command_fits_a_screen_and_shows_an_example(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert f"ggam-fast {name}" in overview
        assert main([name, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 100
        assert any(line.strip().startswith(f"ggam-fast {name} ") for line in lines)


@pytest.mark.parametrize("name", ["train", "data"])
def test_all_help_has_the_full_text(name, run_command):
    done = run_command(name, "--help-all")
    assert (done.returncode, done.stderr) == (0, "")
    assert "By default $XDG_CACHE_HOME" in " ".join(done.stdout.replace("│", " ").split())


@pytest.mark.parametrize(("command", "config"), [("train", TrainConfig), ("ablate", AblateConfig)])
def test_help_names_every_option_and_its_default(capsys, command, config):
    assert main([command, "--help"]) == 0
    shown = "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("  --"))
    sections = [vars(section) for section in vars(config()).values()]
    for name, value in [option for section in sections for option in section.items()]:
        found = re.search(rf"--(\[no-\])?{name.replace('_', '-')}(?= |$)(.*)", shown, re.MULTILINE)
        assert found is not None
        assert bool(found[1]) == (value is True)
        if isinstance(value, str | float | int) and not isinstance(value, bool):
            default = f"{value:g}" if isinstance(value, float) else str(value)
            assert re.match(rf" ({re.escape(default)}( |$)|.*\(default {re.escape(default)}[;)])", found[2])
