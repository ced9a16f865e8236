"""A layer of the classifier as a backend sees it: its tensors and numbers, without the module."""

from collections.abc import Sequence
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


class Link(NamedTuple):
    """A layer of a chain, with the activation that follows a batch norm."""

    layer: Layer
    follows: Layer | None
    from_batch: bool  # see `Layer.from_batch`
    moves: bool  # see `Layer.moves`


class LayerGradient(NamedTuple):
    """The gradients of a layer's weight and bias, as factors or themselves.

    A linear layer holds dy (N, J) and x (N, C); the gradients are dy^T x and the sum of dy over the batch.
    A batch norm holds the two gradients.
    """

    weight: Tensor | None
    bias: Tensor | None
    left: Tensor  # dy | d weight
    right: Tensor  # x | d bias
    product: bool  # whether the gradients are still to be computed from dy and x


def chain_of(layers: Sequence[Layer]) -> list[Link]:
    """The layers without those that do nothing.  An ELU or ReLU after a batch norm joins it."""
    links: list[Link] = []
    for layer in layers:
        if layer.kind == IDENTITY or (layer.kind == DROPOUT and not (layer.training and layer.p)):
            continue
        before = links[-1] if links else None
        joins = layer.kind in (ELU, RELU) and before is not None and before.layer.kind == BATCH_NORM
        if joins and before is not None and before.follows is None:
            links[-1] = Link(before.layer, layer, before.from_batch, before.moves)
        else:
            norm = layer.kind == BATCH_NORM
            links.append(Link(layer, None, norm and layer.from_batch, norm and layer.moves))
    return links
