"""Stored files are whole, damage is found, and what killed processes left is removed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ggam_fast.training.system import cache
from tests.training.conftest import CHECKOUT

NAME = f"net-64-{'0a' * 10}.maps"
FOLDER = f"birds-{'0b' * 10}"


@pytest.fixture
def stored(tmp_path):
    cache.store_file(tmp_path / NAME, [b"one", memoryview(b"twothree")], {"kind": "feature maps"})
    return tmp_path / NAME


@pytest.fixture
def folder(tmp_path):
    def fill(part):
        (part / "a").mkdir()
        (part / "a" / "0.jpg").write_bytes(b"zero")
        (part / "1.jpg").write_bytes(b"one")

    cache.store_folder(tmp_path / FOLDER, fill, {"kind": "birds"})
    return tmp_path / FOLDER


def test_the_bytes_come_first_and_the_description_behind_them(stored, tmp_path):
    assert stored.read_bytes().startswith(b"onetwothree")
    assert cache.problem(stored) is None
    found = cache.about(stored)
    assert (found["kind"], found["bytes"]) == ("feature maps", 11)
    assert cache.entries(tmp_path) == [stored]
    assert cache.size(stored) == stored.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("place", range(11))
def test_every_changed_byte_is_found(stored, place):
    content = bytearray(stored.read_bytes())
    content[place] ^= 1
    stored.write_bytes(content)
    assert cache.problem(stored) == "its checksum differs"


@pytest.mark.parametrize(
    "damage", [lambda all_of_it: all_of_it[:-1], lambda all_of_it: all_of_it[:11], lambda _: b"", bytes.upper]
)
def test_a_file_that_is_cut_off_has_no_checksum(stored, damage):
    stored.write_bytes(damage(stored.read_bytes()))
    assert "no checksum" in cache.problem(stored)
    assert cache.about(stored) is None


def test_damage_in_a_folder_is_found(folder):
    assert cache.problem(folder) is None
    assert cache.size(folder) > 7
    (folder / "a" / "0.jpg").write_bytes(b"zerO")
    assert cache.problem(folder) == "the checksum of a/0.jpg differs"
    (folder / "a" / "0.jpg").unlink()
    assert "cannot be read" in cache.problem(folder)
    (folder / cache.CHECKSUMS).write_text("{")
    assert "no checksum" in cache.problem(folder)


def test_an_older_folder_is_replaced(folder):
    cache.store_folder(folder, lambda part: (part / "2.jpg").write_bytes(b"two"), {})
    assert {path.name for path in folder.iterdir()} == {"2.jpg", cache.CHECKSUMS}


def test_a_failure_leaves_nothing(tmp_path):
    def chunks():
        yield b"one"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.store_file(tmp_path / NAME, chunks(), {})
    with pytest.raises(FileNotFoundError):
        cache.store_folder(tmp_path / FOLDER, lambda part: (part / "no" / "0.jpg").touch(), {})
    assert list(tmp_path.iterdir()) == []


def test_parts_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom ggam_fast.training.system import cache\n"
        "def chunks():\n    yield b'one'\n    print('begun', flush=True)\n    time.sleep(600)\n"
        "cache.store_file(Path(sys.argv[1]), chunks(), {})\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / NAME)],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert writer.stdout.readline() == "begun\n"
        [part] = tmp_path.glob("*.part")
        assert cache.remove_dead_parts(tmp_path) == []
        assert part.exists()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert cache.remove_dead_parts(tmp_path) == [part]
    assert list(tmp_path.iterdir()) == []


def test_parts_without_a_lock_are_judged_by_their_process(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive, far = (
        tmp_path / f"{NAME}.{process}.part" for process in (gone.pid, os.getpid(), f"elsewhere.{gone.pid}")
    )
    stranger = tmp_path / "film.part"
    for path in (dead, alive, far, stranger):
        path.touch()
    assert cache.remove_dead_parts(tmp_path) == [dead]
    old = time.time() - 7200
    os.utime(far, (old, old))
    assert cache.remove_dead_parts(tmp_path) == [far]
    assert alive.exists()
    assert stranger.exists()
    assert cache.remove_dead_parts(tmp_path / "nowhere") == []
