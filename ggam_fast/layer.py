"""A layer of the classifier as a backend sees it: its tensors and numbers, without the module."""

from typing import NamedTuple

from torch import Tensor

LINEAR, BATCH_NORM, ELU, RELU, DROPOUT, IDENTITY = (
    "linear", "batch_norm", "elu", "relu", "dropout", "identity",
)  # fmt: skip


class Layer(NamedTuple):
    """y = x W^T + b | batch norm | ELU | ReLU | dropout | x.  Fields that a kind lacks have their default."""

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    tracked: Tensor | None = None  # (), int64: batches that the running statistics have seen
    training: bool = False
    eps: float = 0.0
    momentum: float | None = None  # None: running statistics average all batches
    settling: bool = False  # average all batches until 1 / batches is below `momentum`
    alpha: float = 1.0  # of ELU
    p: float = 0.0  # of dropout

    @property
    def from_batch(self) -> bool:
        """Whether a batch norm normalises with the batch's own statistics."""
        return self.training or self.running_mean is None

    @property
    def moves(self) -> bool:
        """Whether a batch norm updates its running statistics."""
        return self.training and self.running_mean is not None and self.running_var is not None
