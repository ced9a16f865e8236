"""Running statistics of batch norm that belong to a module's present weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ggam_fast.norm import SettlingBatchNorm1d
from ggam_fast.training.system.distributed import ALONE, World

# Statistics still depend on where they started if more than this share of them is that old.
_OLD_SHARE = 0.01


def settled(module: nn.Module, batches: int) -> bool:
    """Whether `batches` training batches suffice for every batch norm in `module`.

    After n batches, (1 - momentum)^n of a running statistic is what it started from. 1 % of that is the
    limit. `SettlingBatchNorm1d` drops its first values at once, and needs 1 / momentum batches.
    """
    for layer in _norms(module):
        if layer.momentum is None:
            continue
        if isinstance(layer, SettlingBatchNorm1d):
            if batches * layer.momentum < 1:
                return False
        elif (1 - layer.momentum) ** batches > _OLD_SHARE:
            return False
    return True


def estimated(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World = ALONE) -> nn.Module:
    """A copy of `module` whose batch norms have the mean statistics of `batches` (inputs, labels).

    Every process of `world` gives its own batches. The random state is as before.
    """
    module = copy.deepcopy(module)
    training = module.training
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # dropout
        update_bn(batches, module)
        for layer in _norms(module):
            for value in (layer.running_mean, layer.running_var):
                assert value is not None
                value.copy_(torch.stack(world.gather(value.cpu())).mean(0))
    return module.train(training)


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [one for one in module.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
