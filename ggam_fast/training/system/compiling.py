"""torch.compile where it works, and one line where it does not."""

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

    `probe` runs the compiled function once, backward included where there is one, because that
    is when code is generated: a machine without a C++ compiler fails there. Whatever the probe
    changes in `module`, its gradients or the random state is put back.
    """
    # It warns wherever a CUDA toolkit is installed but no GPU is there.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    state = copy.deepcopy(module.state_dict())
    try:
        with torch.random.fork_rng():
            probe(compiled)
    except Exception as error:
        logger.warning(f"running eagerly, torch.compile failed: {first_line(error)}")
        compiled = function
    module.load_state_dict(state)
    module.zero_grad(set_to_none=True)
    return compiled
