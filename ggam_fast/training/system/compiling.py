"""torch.compile, with a fallback to eager mode."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ggam_fast.training.errors import first_line

logger = logging.getLogger(__name__)


def compile_or_eager(
    function: Callable[..., Any],
    module: nn.Module,
    probe: Callable[[Callable[..., Any]], object],
) -> Callable[..., Any]:
    """`function` compiled without graph breaks, or `function` itself if that fails.

    `probe` calls the compiled function once, with its backward if it has one. torch generates code in that
    call, so it fails there on a machine without a C++ compiler. Afterwards `module`, its gradients and the
    random state are as before.
    """
    # torch warns here on machines with a CUDA toolkit but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    state = copy.deepcopy(module.state_dict())
    try:
        with torch.random.fork_rng():
            probe(compiled)
    except Exception as error:
        logger.warning(f"running eagerly because torch.compile failed: {first_line(error)}")
        compiled = function
    module.load_state_dict(state)
    module.zero_grad(set_to_none=True)
    return compiled
