"""Names of devices and precisions become torch's."""

import pytest
import torch

from ggam_fast.training.errors import TrainError
from ggam_fast.training.system.devices import autocast, device_name, precision, resolve_device

CPU = torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto").type == kind


@pytest.mark.parametrize("name", ["abacus", "cpu:x", "meta"])
def test_a_device_that_cannot_compute_is_one_line(name):
    with pytest.raises(TrainError, match=f"--device {name} cannot be used") as raised:
        resolve_device(name)
    assert "\n" not in str(raised.value)


def test_precision_is_float32_on_the_cpu_unless_asked_for():
    assert precision("auto", CPU) == torch.float32
    assert precision("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_the_dtype_asked_for(dtype):
    a = torch.rand(3, 3)
    with autocast(CPU, dtype):
        assert (a @ a).dtype == dtype


def test_the_name_of_the_cpu_says_its_threads():
    assert device_name(CPU).startswith(f"cpu, {torch.get_num_threads()} threads, ")
