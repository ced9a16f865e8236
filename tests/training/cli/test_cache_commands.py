"""`ggam-fast cache` lists, checks and prunes what runs have cached."""

import json
import os
import time

import pytest

from ggam_fast.training.cli import main
from ggam_fast.training.run.train import train


def run(capsys, what, folder, *arguments):
    """The exit code of `ggam-fast cache`, and what it printed on one line."""
    code = main(["cache", what, "--cache-dir", str(folder), *map(str, arguments)])
    return code, " ".join(capsys.readouterr().out.split())


@pytest.fixture
def folder(tiny_config, report):
    """The cache of a run: the maps of its training and of its test images."""
    train(tiny_config, report)
    return tiny_config.data.cache_dir


def test_list_says_what_is_cached(folder, photos, capsys):
    code, shown = run(capsys, "list", folder)
    assert code == 0
    assert "2 files and folders" in shown
    assert "feature maps of 48 images" in shown
    code, text = run(capsys, "list", folder, "--json")
    entries = json.loads(text)["entries"]
    assert {entry["path"] for entry in entries} == {str(path) for path in folder.iterdir()}
    assert {entry["images"] for entry in entries} == {str(photos)}
    assert [entry["shape"][0] for entry in entries if entry["bytes"] > 48 * 4 * 96 * 4] == [48]
    assert run(capsys, "list", folder / "nowhere")[0] == 0


def test_verify_finds_damage_and_prune_removes_it(folder, capsys):
    assert run(capsys, "verify", folder)[0] == 0
    damaged, sound = sorted(folder.iterdir())
    damaged.write_bytes(bytes(100) + damaged.read_bytes()[100:])
    code, shown = run(capsys, "verify", folder)
    assert code == 2
    assert "1 of 2 files and folders" in shown
    code, text = run(capsys, "verify", folder, "--json")
    assert (code, json.loads(text)["damaged"]) == (2, 1)
    assert [entry["problem"] for entry in json.loads(text)["entries"]] == ["its checksum differs", None]
    (folder / "film.part").touch()
    dead = folder / f"net-64-{'0' * 20}.maps.{2**22 + 1}.part"
    dead.touch()
    code, text = run(capsys, "prune", folder, "--json", "--dry-run")
    assert {one["path"] for one in json.loads(text)["removed"]} == {str(dead), str(damaged)}
    assert damaged.exists()
    assert run(capsys, "prune", folder)[0] == 0
    assert set(folder.iterdir()) == {sound, folder / "film.part"}
    assert run(capsys, "verify", folder)[0] == 0


def test_prune_removes_what_was_not_used(tiny_config, folder, report, capsys, elsewhere):
    old, new = sorted(folder.iterdir())
    for path in (old, new):
        os.utime(path, (time.time() - 9 * 86400,) * 2)
    train(elsewhere(tiny_config, "again"), report)
    os.utime(old, (time.time() - 9 * 86400,) * 2)
    capsys.readouterr()
    _, shown = run(capsys, "prune", folder, "--unused-days", 8)
    assert "not used for 9.0 days" in shown
    assert list(folder.iterdir()) == [new]
    run(capsys, "prune", folder, "--unused-days", 0)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "ggam-fast cache must be followed by list, prune or verify; got nothing"),
        (("prune", "--unused-days", "-1"), "--unused-days must be 0 or more; got -1.0"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    assert main(["cache", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
