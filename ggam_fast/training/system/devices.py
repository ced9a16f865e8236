"""The device of a run, and its precision."""

from __future__ import annotations

import platform

import torch

from ggam_fast.training.errors import TrainError, first_line


def resolve_device(name: str) -> torch.device:
    """The device called `name`. "auto" is the first CUDA device, or the CPU if there is none.

    Raises:
        TrainError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


def precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the backbone. "auto" is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`. For float32 autocast is off."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)
