"""The stages as kernels.  One file a group of stages: `sums`, `pooling`, `layers`, `guidance`,
`features_grad`; `register` makes them operators, `launch` launches, `record` remembers what was
launched."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ggam_fast.backends import registry
from ggam_fast.backends.layer import Layer
from ggam_fast.backends.torch import Backend, CamTerms, Entropy, Guided

from . import classifier, features_grad, guidance, layers, pooling, sums
from .shapes import CAM_NORM, NORM, POOL, plan


class TritonBackend(Backend):
    """Small results are float32; none of them is differentiable by itself."""

    def channel_sum(self, features: Tensor, weights: Tensor) -> Tensor:
        return sums.channel_sum(features, weights.float())

    def spatial_sum(self, features: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return sums.spatial_sum(features, None if weights is None else weights.float(), scale)

    def attended(
        self, features: Tensor, s: Tensor, norm: str, pool_type: str, kappa: int = 1
    ) -> tuple[Tensor, ...]:
        return sums.attended(features, s, NORM[norm], POOL[pool_type], pool_type == "flatten", kappa)

    def attention_backward(
        self,
        features: Tensor,
        grads: Sequence[Tensor],
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
    ) -> list[tuple[Tensor, Tensor]]:
        v, v_1 = grads if len(grads) == 2 else (grads[0], None)
        du, ds, du_1, ds_1 = sums.attention_backward(features, v, v_1, scale, extra, t, total, NORM[norm])
        return [(du, ds)] if v_1 is None else [(du, ds), (du_1, ds_1)]

    def spatial_attention(
        self, features: Tensor, s: Tensor, norm: str, kappa: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        return sums.spatial_attention(features, s, NORM[norm], kappa)

    def spatial_attention_grad(
        self,
        features: Tensor,
        v: Tensor,
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
    ) -> Tensor:
        return sums.spatial_attention_grad(features, v, scale, extra, t, total, NORM[norm])

    def spatial_norm_grad(
        self, dt: Tensor, scale: float, extra: Tensor | None, t: Tensor, total: Tensor, norm: str
    ) -> Tensor:
        partials = dt.unsqueeze(1) if dt.dim() == 2 else dt
        return sums.spatial_norm_grad(partials, float(scale), extra, t, total, NORM[norm])

    def max_pool(self, features: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        return pooling.max_pooled(features, t)

    def position_scatter(self, values: Tensor, index: Tensor, positions: int) -> Tensor:
        return pooling.position_scatter(values, index, positions)

    def hadamard(self, features: Tensor, t: Tensor | None, s: Tensor, for_flatten: bool) -> Tensor:
        return pooling.attended_map(features, t, s, 1.0, for_flatten)

    def multiply(self, x: Tensor, y: Tensor, kappa: int) -> Tensor:
        return pooling.attended_map(x.unsqueeze(2), None, y, float(kappa), True).squeeze(2)

    def grad_cam_means(
        self, features: Tensor, grad: Tensor, t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return pooling.grad_cam_means(features, grad, t)

    def features_grad(
        self,
        features: Tensor,
        pool_type: str,
        first: Tensor,
        index: Tensor,
        t: Tensor | None,
        du: Tensor | None,
        s: Tensor,
        grad_mean: Tensor | None,
        scale: Tensor | None = None,
    ) -> Tensor:
        # Compiled, an outer product that Inductor writes where it is used.
        if torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag and pool_type == "avg":
            return super().features_grad(features, pool_type, first, index, t, du, s, grad_mean, scale)
        return features_grad.features_grad(
            features, POOL[pool_type], first, index, t, du, s, grad_mean, scale
        )

    def multiplies(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    def product(
        self,
        rows: Sequence[Tensor],
        matrix: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        relu: bool = False,
    ) -> list[Tensor]:
        if matrix.dtype != torch.float32:
            return super().product(rows, matrix, bias, mask, relu)
        x, x_1 = rows if len(rows) == 2 else (rows[0], None)
        return list(layers.product(x, x_1, matrix, bias, mask, relu))[: len(rows)]

    def layer_grads(
        self, factors: Sequence[tuple[Tensor, Tensor]], scale: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        if not factors or any(x.dtype != torch.float32 for pair in factors for x in pair):
            return super().layer_grads(factors, scale)
        return self.parameter_grads(factors, [], scale)[0]

    def parameter_grads(
        self, factors: Sequence[tuple[Tensor, Tensor]], vectors: Sequence[Tensor], scale: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        joined = [] if scale is None else _joined(vectors)
        if not factors or joined is None or any(x.dtype != torch.float32 for pair in factors for x in pair):
            return super().parameter_grads(factors, vectors, scale)
        found: list[Tensor] = []
        copied: list[Tensor] = []
        for i in range(0, len(factors), 4):
            flat = [x for pair in factors[i : i + 4] for x in pair]
            with_it = joined if i == 0 else []
            made = layers.layer_grads(
                *flat, *[None] * (8 - len(flat)), *with_it, *[None] * (2 - len(with_it)), scale
            )
            found += made[: len(flat)]
            copied += made[8 : 8 + len(with_it)]
        pairs = list(zip(found[::2], found[1::2], strict=True))
        return pairs, list(vectors) if scale is None else [x for v in copied for x in v.unbind(0)]

    def softmax(self, logits: Tensor) -> Tensor:
        if not self._holds(logits):
            return super().softmax(logits)
        return guidance.softmax(logits)

    def softmax_grad(
        self, ds: Tensor, s: Tensor, extra: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        if not self._holds(s):
            return super().softmax_grad(ds, s, extra, scale)
        return guidance.softmax_grad(ds, s, extra, scale)

    def batch_norm(self, x: Tensor, layer: Layer, follows: Layer | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._in_torch(x, layer):
            return super().batch_norm(x, layer, follows)
        return classifier.batch_norm(x, layer, follows)

    def batch_norm_grad(
        self,
        rows: Sequence[Tensor],
        x: Tensor,
        layer: Layer,
        follows: Layer | None,
        saved: tuple[Tensor, ...],
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        if self._in_torch(x, layer):
            return super().batch_norm_grad(rows, x, layer, follows, saved)
        found, dgamma, dbeta = classifier.batch_norm_grad(rows, x, layer, follows, saved)
        return found, dgamma if layer.weight is not None else None, dbeta

    @staticmethod
    def _in_torch(x: Tensor, layer: Layer) -> bool:
        """Compiled or under torch.func, as statistics that move would be hidden in an operator; of one image
        or another width torch says what is wrong; and where a parameter has another type or is missing."""
        given = (x, layer.weight, layer.bias, layer.running_mean, layer.running_var)
        return (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or (layer.from_batch and x.shape[0] == 1)
            or layer.weight is None or layer.bias is None
            or (layer.running_mean is None) != (layer.running_var is None)
            or any(t is not None and (t.dtype != torch.float32 or not t.is_contiguous()) for t in given)
            or any(t is not None and t.shape[-1] != x.shape[1] for t in given)
        )  # fmt: skip

    def cross_entropy(
        self, logits: Tensor, target: Tensor, smoothing: float, cam_class: str, ignore_index: int | None
    ) -> Entropy:
        if not self._in_kernel(logits, target):
            return super().cross_entropy(logits, target, smoothing, cam_class, ignore_index)
        losses, share, score, grad = classifier.cross_entropy(
            logits,
            target,
            smoothing,
            cam_class == "predicted",
            ignore_index is not None,
            ignore_index or 0,
            True,
        )
        return Entropy(losses, share, score, grad)

    def class_scores(
        self, logits: Tensor, target: Tensor, cam_class: str, ignore_index: int | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self._in_kernel(logits, target):
            return super().class_scores(logits, target, cam_class, ignore_index)
        _, share, score, _ = classifier.cross_entropy(
            logits, target, 0.0, cam_class == "predicted", ignore_index is not None, ignore_index or 0, False
        )
        return score, share

    @staticmethod
    def _in_kernel(logits: Tensor, target: Tensor) -> bool:
        soft = target.is_floating_point() and target.dtype != torch.float32
        return logits.dtype == torch.float32 and not soft

    @staticmethod
    def _holds(rows: Tensor) -> bool:
        """Whether one program holds a row."""
        return plan.channels_block(rows.shape[1]) is not None and rows.dtype == torch.float32

    def guided_loss(
        self,
        logits: Tensor,
        terms: CamTerms,
        ds: Tensor | None,
        positions: int,
        cam_norm: str,
        temperature: float,
        divergence: str,
        weight: float,
        mean: bool,
        share: Tensor | None,
        losses: Tensor | None,
    ) -> Guided:
        if share is None or not self._holds(logits):
            return super().guided_loss(
                logits, terms, ds, positions, cam_norm, temperature, divergence, weight, mean, share, losses
            )
        beta, s, each, de, guidance_loss, loss = guidance.guided_loss(
            logits, *terms, ds, positions, CAM_NORM[cam_norm], divergence == "symmetric", temperature, weight,
            mean, share, losses,
        )  # fmt: skip
        return Guided(beta, s, each, de, guidance_loss, guidance_loss if losses is None else loss)

    def guidance(
        self,
        logits: Tensor,
        terms: CamTerms,
        ds: Tensor | None,
        positions: int,
        cam_norm: str,
        temperature: float,
        divergence: str,
        weight: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self._holds(logits):
            return super().guidance(logits, terms, ds, positions, cam_norm, temperature, divergence, weight)
        return guidance.guidance(
            logits, *terms, ds, positions, CAM_NORM[cam_norm], divergence == "symmetric", temperature, weight
        )


def _joined(vectors: Sequence[Tensor]) -> list[Tensor] | None:
    """Each two of up to four neighbouring vectors as one (2, C); None if they are not that."""
    if torch.compiler.is_compiling():  # which knows no storages
        return None if vectors else []
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    for x, y in pairs:
        same = x.untyped_storage()._cdata == y.untyped_storage()._cdata
        if not same or y.storage_offset() - x.storage_offset() != x.numel() or x.shape != y.shape:
            return None
    found = [x.as_strided((2, x.numel()), (x.numel(), 1)) for x, _ in pairs]
    return found if len(found) <= 2 else None


TRITON = TritonBackend()
registry.register("triton", TRITON)
