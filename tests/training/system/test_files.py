"""Files are written whole or not at all, and one run at a time writes in a folder."""

import stat
import subprocess
import sys
from dataclasses import replace

import pytest

from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.train import train
from ggam_fast.training.system.files import (
    locked,
    output_folder,
    writable_folder,
    write_atomically,
    write_together,
)
from tests.training.conftest import CHECKOUT


def test_failed_write_keeps_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    write_atomically(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_what_a_killed_run_was_writing_goes(tiny_config, report):
    train(tiny_config, report)
    out = tiny_config.run.out
    for folder in (out, out / resume_state.FOLDER):
        (folder / ".part-killed").mkdir()
        (folder / ".part-killed" / "best.safetensors").write_bytes(b"half")
    train(replace(tiny_config, run=replace(tiny_config.run, resume=out)), report)
    assert not list(out.rglob(".*"))


def test_one_run_at_a_time_in_a_folder(tiny_config, report):
    with (
        output_folder(tiny_config.run.out, "photos"),
        pytest.raises(TrainError, match="another run is writing to it"),
    ):
        train(tiny_config, report)
    train(tiny_config, report)


def test_of_several_files_all_are_replaced_or_none(tmp_path):
    (tmp_path / "a").write_text("old")

    def full(part):
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainError, match=r"cannot write \S+/a, \S+/b: No space left on device"):
        write_together(tmp_path, {"a": lambda part: part.write_text("new"), "b": full})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}
    write_together(tmp_path, {name: lambda part: part.write_text("new") for name in "ab"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}


def test_a_folder_that_got_nothing_goes_again(tmp_path):
    with writable_folder(tmp_path / "new" / "out"):
        assert (tmp_path / "new" / "out").is_dir()
    assert list(tmp_path.iterdir()) == []
    with writable_folder(tmp_path / "new" / "out") as _:
        (tmp_path / "new" / "out" / "result").touch()
    assert (tmp_path / "new" / "out" / "result").exists()
    with (
        pytest.raises(TrainError, match=r"--out \S+ cannot be written: "),
        writable_folder(tmp_path / "new" / "out" / "result" / "below"),
    ):
        pass


def test_a_run_without_a_name_is_called_after_data_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with output_folder(None, "photos") as folder:
        assert folder.parts[0] == "runs"
        assert folder.name.startswith("photos-2")
        (folder / "result").touch()
    with pytest.raises(TrainError, match="is not empty"), output_folder(folder, "photos"):
        pass
    with output_folder(folder, "photos", overwrite=True) as same, output_folder(folder / "b", "photos"):
        assert same == folder


def test_one_process_after_the_other(tmp_path):
    path, seen = tmp_path / "maps.lock", []
    script = (
        "import sys, time, pathlib\n"
        "from ggam_fast.training.system.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), lambda: None):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
        "    pathlib.Path(sys.argv[1]).with_name('made').touch()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "held\n"

        def busy():
            seen.append((tmp_path / "made").exists())
            if len(seen) == 2:
                other.stdin.close()  # the other process now continues

        with locked(path, busy):
            assert (tmp_path / "made").exists()
            assert path.exists()
        assert seen[:2] == [False, False]
        assert other.wait(60) == 0
    finally:
        other.kill()
    assert [found.name for found in tmp_path.iterdir()] == ["made"]


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / ".lock"
    script = (
        "import sys, os, pathlib, signal\n"
        "from ggam_fast.training.system.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), lambda: None):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, path], cwd=CHECKOUT, check=False, timeout=120)
    assert path.exists()

    def busy():
        raise AssertionError("nobody holds it")

    with output_folder(tmp_path, "photos") as folder, locked(tmp_path / "other.lock", busy):
        assert folder == tmp_path  # a folder with only a lock does not hold a run
    assert not path.exists()
