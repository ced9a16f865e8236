"""Exported files give the results of the eager classifier for any batch, without this package."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.cli import main
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run.train import train
from ggam_fast.training.use import export as exporting
from ggam_fast.training.use.export import Deployed, ExportConfig, difference, export_run
from tests.training.runs import said

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


needs_onnx = pytest.mark.skipif(not ONNX, reason="needs the export extra")


FORMATS = ["torch", pytest.param("onnx", marks=needs_onnx)]


@pytest.fixture
def run(tiny_config, report):
    config = replace(tiny_config, optim=replace(tiny_config.optim, epochs=1))
    train(config, report)
    return config.run.out


def reloaded(kind, path):
    if kind == "torch":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("maps", [False, True])
def test_same_outputs_for_any_batch(run, report, tmp_path, kind, maps):
    paths = export_run(ExportConfig(run, kind, maps, out=tmp_path / "there"))
    assert {path.name for path in (tmp_path / "there").iterdir()} == {path.name for path in paths}
    exported = reloaded(kind, paths[0])
    model = Deployed(load_checkpoint(run).model, maps)
    for size in (1, 3, 7):
        images = torch.randn(size, 3, 64, 64)
        with torch.no_grad():
            expected = model(images)
        for got, want in zip(exported(images), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    description = json.loads((tmp_path / "there" / "export.json").read_text())
    assert description["classes"] == ["blue", "green", "red"]
    assert description["outputs"] == (["logits", "attention", "grad_cam"] if maps else ["logits"])
    assert description["inputs"] == {"images": ["N", 3, 64, 64]}
    assert "largest difference from the eager model" in said(report)


@pytest.mark.parametrize("head", [{"attention": "channel"}, {"cam_at": "attended"}, {"pool_type": "flatten"}])
def test_every_head_with_its_maps(tiny_config, report, tmp_path, head):
    config = replace(
        tiny_config,
        head=replace(tiny_config.head, **head),
        optim=replace(tiny_config.optim, epochs=1, guidance_weight=0.0),
    )
    train(config, report)
    export_run(ExportConfig(config.run.out, "both" if ONNX else "torch", True))
    outputs = json.loads((config.run.out / "export.json").read_text())["outputs"]
    assert ("attention" in outputs) == (head.get("attention") != "channel")


def test_a_program_needs_torch_alone(run, report, tmp_path):
    export_run(ExportConfig(run, "torch", True, out=tmp_path / "there"))
    script = (
        "import sys, torch\n"
        "files = {'ggam_fast': ''}\n"
        "program = torch.export.load(sys.argv[1], extra_files=files).module()\n"
        "print([tuple(part.shape) for part in program(torch.zeros(4, 3, 64, 64))])\n"
        "assert 'classes' in files['ggam_fast']\n"
        "assert not [name for name in sys.modules if name.startswith('ggam_fast')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, tmp_path / "there" / "model.pt2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[(4, 3), (4, ")


@needs_onnx
def test_the_onnx_file_carries_its_description(run, report):
    import onnx

    export_run(ExportConfig(run, "onnx"))
    model = onnx.load(run / "model.onnx")
    (carried,) = (entry.value for entry in model.metadata_props if entry.key == "ggam_fast")
    assert json.loads(carried) == json.loads((run / "export.json").read_text())
    onnx.checker.check_model(model)


def test_what_differs_is_refused_and_the_old_files_stay(run, report, monkeypatch):
    export_run(ExportConfig(run, "torch"))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    save = exporting._torch

    def wrong(model, side, part, text):
        exported = save(model, side, part, text)
        return lambda images: tuple(1.001 * output for output in exported(images))

    monkeypatch.setattr(exporting, "_torch", wrong)
    with pytest.raises(TrainError, match=r"logits differs from the eager model by 1.0e-03"):
        export_run(ExportConfig(run, "torch", True))
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert not list(run.rglob(".part-*"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_is_one_line_and_the_old_files_stay(run, report, environment, kind):
    export_run(ExportConfig(run, kind))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    script = (
        "import resource, sys\n"
        "from ggam_fast.training.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))\n"  # in bytes
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "export", run, "--format", kind],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    *_, line = done.stderr.splitlines()  # matplotlib may say before that it cannot write its cache
    assert re.fullmatch(r"ggam-fast: cannot write \S+, \S+: File too large", line)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert not list(run.rglob(".part-*"))


def test_not_a_number_is_a_difference(run):
    model = Deployed(load_checkpoint(run).model, False)
    with pytest.raises(TrainError, match="differs"):
        difference(model, lambda images: (torch.full((len(images), 3), torch.nan),), 64, "torch")
    with pytest.raises(TrainError, match=r"shape \(2, 3\), not \(1, 3\)"):
        difference(model, lambda images: (torch.zeros(2, 3),), 64, "torch")


def test_bad_input_is_one_line(run, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        capsys.readouterr()
        assert main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ggam-fast: ")
        assert error.count("\n") == 1
        return error

    assert "no checkpoint at" in refused(tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(run, "--out", tmp_path / "file" / "below")

    def fails(*arguments, **options):
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setattr(torch.export, "export", fails)
    assert refused(run) == "ggam-fast: cannot export to torch: no such operator\n"
    monkeypatch.setattr(exporting, "_NEEDED", ("onnx_that_is_not_there",))
    assert 'needs onnx_that_is_not_there: pip install "ggam-fast[export]"' in refused(run, "--format", "onnx")
