"""Kernels as `torch.library` operators: one private functional operator `ggam_fast::...` for each stage.

An operator's body is a generator with a typed signature, which is all there is to write: it yields its
outputs, allocated and still empty, and then launches the kernels that fill them.  The schema is its
signature; for `torch.compile` and `torch.export` the fake is the same body, left at its yield.  Autograd
lives outside, in `ggam_fast.autograd`.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch

from .launch import thread

_LIBRARY = torch.library.Library("ggam_fast", "FRAGMENT")
OPERATORS: dict[str, Callable[..., Any]] = {}


def operator(body: Callable[..., Any]) -> Callable[..., Any]:
    """Register the body under its name; what is returned calls the operator, or in a recording the body."""

    def run(*arguments: Any) -> Any:
        outputs, *_ = body(*arguments)
        return outputs

    def fake(*arguments: Any) -> Any:
        return next(body(*arguments))

    (returns,) = typing.get_args(typing.get_type_hints(body)["return"])
    registered = define(body, returns, run, fake)

    def call(*arguments: Any) -> Any:
        return run(*arguments) if thread.recorder else registered(*arguments)

    return call


def define(
    typed: Callable[..., Any], returns: Any, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `run` and its fake with the name and the parameters of `typed`."""
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
