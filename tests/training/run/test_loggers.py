"""A stopped and resumed run is one series for every logger, and a missing package is one line."""

import csv
import importlib.util
import json
import sys
from dataclasses import replace

import pytest

from ggam_fast.training.cli import main
from ggam_fast.training.cli.commands import parse_train
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import loggers, loop
from ggam_fast.training.run.log import RunLog
from ggam_fast.training.run.loggers import Logger, check_loggers
from ggam_fast.training.run.train import train
from tests.training.run.stopped import Stopped, stop_after
from tests.training.runs import said


@pytest.fixture
def logged(tiny_config, report, monkeypatch):
    """Train with loggers, stop after step 9, resume from step 6, and return the folder of the run."""

    def run(*names, stop=9, save_every=5):
        monkeypatch.setattr(loop, "_READ_EVERY", 1)
        config = replace(tiny_config, run=replace(tiny_config.run, save_every=save_every, log_to=names))
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Stopped):
                train(config, report)
        train(replace(config, run=replace(config.run, resume=config.run.out)), report)
        return config.run.out

    return run


STEPS = list(range(1, 25))
EPOCHS = [6, 12, 18, 24]


def test_csv_files_are_those_of_a_run_without_a_stop(logged):
    out = logged("csv")
    assert not (out / "tensorboard").exists()
    assert {path.name for path in (out / "csv").iterdir()} == {"train.csv", "epoch.csv", "test.csv"}
    found = {}
    for part in ("train", "epoch", "test"):
        with (out / "csv" / f"{part}.csv").open(newline="") as file:
            found[part] = list(csv.DictReader(file))
    assert [int(row["step"]) for row in found["train"]] == STEPS
    assert [int(row["step"]) for row in found["epoch"]] == EPOCHS
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for part, rows in found.items():
        for row, line in zip(rows, [one for one in lines if one["part"] == part], strict=True):
            assert {name: float(value) for name, value in row.items()} == {
                name: value for name, value in line.items() if name != "part"
            }


def test_a_new_number_is_a_new_column(tmp_path):
    with RunLog(tmp_path, None, ["csv"]) as log:
        log.numbers("train", 1, {"loss": 2.0})
        log.numbers("train", 2, {"loss": 1.0, "lr": 0.5})
    path = tmp_path / "csv" / "train.csv"
    assert path.read_text().splitlines() == ["step,loss,lr", "1,2.0,", "2,1.0,0.5"]
    path.write_text(path.read_text() + "3,0")  # the rest was not written
    with RunLog(tmp_path, 2, ["csv"]) as log:
        log.numbers("train", 3, {"loss": 0.5, "lr": 0.5})
    assert path.read_text().splitlines() == ["step,loss,lr", "1,2.0,", "2,1.0,0.5", "3,0.5,0.5"]


def test_options_are_hyper_parameters_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    with RunLog(tmp_path, options={"lr": 0.5, "root": tmp_path, "log_to": ("csv",), "patience": None}):
        pass
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    content = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["lr"].number_value == 0.5
    assert found["root"].string_value == str(tmp_path)
    assert found["log_to"].string_value == "csv"


def test_a_missing_package_is_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    hidden = ("wandb", "mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    out = tmp_path / "out"
    assert main(["train", "--log-to", "csv", "wandb", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "ggam-fast: --log-to wandb needs the package wandb: pip install wandb\n"
    with pytest.raises(TrainError, match=r"pip install mlflow$"):
        check_loggers(["mlflow"])
    assert not out.exists()


def test_packages_are_imported_when_asked_for(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    with RunLog(tmp_path, None, ["csv"]) as log:
        log.numbers("train", 1, {"loss": 2.0})
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "csv"}
    for name in ("wandb", "mlflow"):
        with pytest.raises(TrainError, match=f"--log-to {name} cannot start: .*import"):
            RunLog(tmp_path, None, [name])


class Service(Logger):
    """A service that keeps what it gets, and can be made to fail."""

    service = True
    kept: list = []  # noqa: RUF012
    fails: str | None = None

    def __init__(self, folder, steps, options, id):
        if self.fails == "start":
            raise RuntimeError("no key\nmore")
        self.id = id or "a-run"
        self.kept.append(("start", self.id, id is not None))

    def numbers(self, part, step, numbers):
        if self.fails == "numbers":
            raise ConnectionError("the server is gone")
        self.kept.append((part, step))

    def close(self, finished):
        self.kept.append(("close", finished))


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(Service, "kept", [])
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Service)
    return Service


@pytest.mark.parametrize("stop", [9, 3])
def test_a_service_gets_every_step_once(logged, service, stop):
    """After 3 steps the only snapshot is that of the beginning."""
    logged("wandb", stop=stop, save_every=0)
    assert [step for part, step, *_ in service.kept if part == "train"] == STEPS
    assert [step for part, step, *_ in service.kept if part == "epoch"] == EPOCHS
    assert [one[1:] for one in service.kept if one[0] == "start"] == [("a-run", False), ("a-run", True)]
    assert [one[1] for one in service.kept if one[0] == "close"] == [False, True]


def test_a_service_that_does_not_start_leaves_the_older_run(tiny_config, report, service, monkeypatch):
    train(tiny_config, report)
    before = {path: path.stat().st_mtime_ns for path in tiny_config.run.out.rglob("*") if path.is_file()}
    monkeypatch.setattr(service, "fails", "start")
    config = replace(tiny_config, run=replace(tiny_config.run, log_to=("wandb",), overwrite=True))
    with pytest.raises(TrainError, match=r"--log-to wandb cannot start: no key$"):
        train(config, report)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    new = replace(config.run, out=config.run.out.parent / "new")
    with pytest.raises(TrainError):
        train(replace(config, run=new), report)
    assert not new.out.exists()


def test_a_service_that_fails_does_not_end_the_run(tiny_config, report, service, monkeypatch):
    monkeypatch.setattr(service, "fails", "numbers")
    train(replace(tiny_config, run=replace(tiny_config.run, log_to=("csv", "wandb"))), report)
    assert (
        said(report).count("--log-to wandb failed, and the run goes on without it: the server is gone") == 1
    )
    assert (tiny_config.run.out / "csv" / "test.csv").is_file()


def test_one_or_several_on_the_command_line_and_in_a_file(tmp_path):
    assert parse_train([]).run.log_to == ("tensorboard",)
    assert parse_train(["--log-to", "csv", "mlflow", "--epochs", "2"]).run.log_to == ("csv", "mlflow")
    assert parse_train(["--log-to", "--epochs", "2"]).run.log_to == ()
    (tmp_path / "a.yaml").write_text("log_to: [csv, wandb]\n")
    assert parse_train(["--config", str(tmp_path / "a.yaml")]).run.log_to == ("csv", "wandb")
    with pytest.raises(SystemExit):
        parse_train(["--log-to", "cvs"])


def wandb_rows(path):
    """The rows of a .wandb file, a log of LevelDB: blocks of 32 KB, chunks with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, found, part = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole of a record, or its end
            record, part = Record.FromString(part), b""
            if record.HasField("history"):
                found.append(
                    {
                        (one.key or "/".join(one.nested_key)): json.loads(one.value_json)
                        for one in record.history.item
                    }
                )
    return found


def test_wandb_offline(logged, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = logged("wandb")
    wandb.teardown()  # its own process may still be writing
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    [name] = {path.name for path in files}
    assert json.loads((out / "log-ids.json").read_text()) == {"wandb": name[4:-6]}
    rows = [row for path in files for row in wandb_rows(path)]
    assert [row["_step"] for row in rows if "train/loss" in row] == STEPS
    assert [row["_step"] for row in rows if "epoch/loss" in row] == EPOCHS
    assert sum("test/accuracy" in row for row in rows) == sum("gallery/path" in row for row in rows) == 1


def test_mlflow_in_a_local_store(logged, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    out = logged("mlflow")
    client = mlflow.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert json.loads((out / "log-ids.json").read_text()) == {"mlflow": run.info.run_id}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "out")
    assert run.data.params["lr"] == "0.0003"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == STEPS
    assert [point.step for point in client.get_metric_history(run.info.run_id, "epoch/loss")] == EPOCHS
    assert [one.path for one in client.list_artifacts(run.info.run_id)] == ["gallery.png"]
