"""Each stage as a function and as a `torch.library` operator `ggam_fast::...`.

A stage is written once, as a typed function that allocates its outputs and launches the kernels that fill
them.  Its signature is the operator's schema.  The operator's fake, for `torch.compile` and `torch.export`,
is the same function without launches.  Autograd is in `ggam_fast.autograd`.

Eager code calls the functions.  A compiler, a dispatch mode or a transform of `torch.func` must see
operators; `registry.get_backend` decides which is used.
"""

import inspect
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ggam_fast.backends.torch import Backend

from .launch import faked

_LIBRARY = torch.library.Library("ggam_fast", "FRAGMENT")
OPERATORS: dict[str, Callable[..., Any]] = {}
FUNCTIONS = SimpleNamespace()
"""The stages by name, as functions."""
STAGES = SimpleNamespace()
"""The stages by name, as operators."""


class KernelBackend(Backend):
    """A backend whose methods call the stages in `run`: `FUNCTIONS` or `STAGES`."""

    def __init__(self, run: Any):
        self.run = run


def operator(stage: Callable[..., Any]) -> Callable[..., Any]:
    """Register the stage as a function and as an operator, under its name."""

    def fake(*arguments: Any) -> Any:
        with faked():
            return stage(*arguments)

    name = stage.__name__
    setattr(FUNCTIONS, name, stage)
    setattr(STAGES, name, define(stage, typing.get_type_hints(stage)["return"], stage, fake))
    return stage


def define(
    typed: Callable[..., Any], returns: Any, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `run` and its fake as an operator with the name and the parameters of `typed`."""
    name, hints = typed.__name__, typing.get_type_hints(typed)
    parameters = [p.replace(annotation=hints[p.name]) for p in inspect.signature(typed).parameters.values()]

    def prototype(*_: Any) -> None:
        raise NotImplementedError

    vars(prototype)["__signature__"] = inspect.Signature(parameters, return_annotation=returns)
    schema = torch.library.infer_schema(prototype, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"ggam_fast::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    OPERATORS[name] = registered = getattr(torch.ops.ggam_fast, name).default
    return registered
