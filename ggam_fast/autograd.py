"""The base of this library's autograd nodes."""

import inspect
from typing import Any

import torch


class Function(torch.autograd.Function):
    """`torch.autograd.Function` that knows its forward's signature, which `apply` looks up at every call."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        vars(cls.forward)["__signature__"] = inspect.signature(cls.forward)
