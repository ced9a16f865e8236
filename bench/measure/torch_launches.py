"""Count on a CPU the kernels that torch's own operations would launch on a GPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def torch_launches(call: Callable[[], Any]) -> int:
    """How many kernels, copies and fills torch's operations in one call would launch on a GPU.

    An operation that has its own kernel in torch's dispatcher is one launch, whatever it calls: `softmax` is
    one (`_softmax`), `mean` is one, `clone` is one (`copy_`).  `item`, which reads a value, is one copy.
    Operations that only make or describe a tensor do not count: views, `detach`, `empty` and similar ones,
    `resize_`, `set_`.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        call()
    return sum(_launches_of(event) for event in record.events() or [] if event.cpu_parent is None)


def _launches_of(event: Any) -> int:
    if event.name.startswith("aten::") and _launches_itself(event.name):
        return 1
    return sum(_launches_of(child) for child in event.cpu_children)


_ONE_FOR_ALL_DEVICES = ("aten::copy_",)  # the dispatcher calls it composite
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_empty", "aten::resize", "aten::set_")


@cache
def _launches_itself(name: str) -> bool:
    if name in _ONE_FOR_ALL_DEVICES:
        return True
    overloads = torch._C._jit_get_schemas_for_operator(name)
    is_view = any(r.alias_info and not r.alias_info.is_write for s in overloads for r in s.returns)
    if is_view or name.startswith(_NO_LAUNCH):
        return False
    names = [f"{name}.{s.overload_name}" if s.overload_name else name for s in overloads]
    # An operation with a kernel for the CPU also has one for a GPU.  Only that of the CPU can always be
    # looked up.
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU") for full in names)
