"""GGAMHead: the paper's attention and classifier, with Grad-CAM guidance, as one drop-in module."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks
from .attention import ChannelMLP, Options, ggam_attention
from .base import GGAMHeadBase, GGAMOutput
from .classifier import (
    Anchored,
    LayerGradient,
    Scores,
    closed_form_layers,
    custom_scores,
    hooked,
    layers_of,
    run,
    score_gradient,
    scores,
)
from .contractions import get_stages
from .fused_loss import FusedLoss, LossTerms, fused_loss
from .gradcam import cam_and_guidance, grad_cam_weights
from .guidance import kl_guidance
from .losses import GGAMLoss, loss_weights, reduce_batch


class GGAMHead(GGAMHeadBase):
    """Grad-CAM guided channel-spatial attention and classifier (arXiv 2101.09666).

        g = mean_l A;  S = softmax(FC2(relu(FC1(g))));  U = sum_c S_c A_c;  T = norm(U);  D = A T
        logits = classifier(pool(D));  beta = mean_l d y / d A;  L = divergence(S, norm(beta))

    `head(features)` returns logits (N, K): a drop-in for pooling and a linear layer; beta is never
    computed. `head(features, target)` returns a `GGAMOutput`. Nothing is stashed on the module.

    Args:
        in_features: C, channels of the features.
        num_classes: K; 0 for no classifier (timm's convention).
        attention: "channel_spatial"; "channel" (D = S A); "spatial" (S = 1/C); "none" (D = A).
        spatial_norm: "softmax" over positions; "sum" (U / sum U, uniform where that is 0); "sigmoid".
        rd_ratio: hidden width of the channel MLP as a share of C, in (0, 1]; `rd_channels` sets it outright.
        pool_type: "avg", "max" (ties to the first position), "flatten" (needs `feat_size`), or "" to hand
            the attended map to `classifier`.
        hidden_size: width of the default BN-FC-BN-ELU-FC classifier; 0 or None for one linear layer.
        classifier: your own module on the pooled vector (N, C), or on the map for `pool_type=""`.
            Its class-score gradient is autograd's (see `classifier` for compiling it), so its first layer
            must not work in place.
        cam_at: beta at the "features" A or at the "attended" map D.
        cam_class: y is the score of the "label" (or of a soft target), or of the "predicted" class.
        cam_detach: False differentiates the guidance loss through beta too (second order).
        cam_norm, cam_temperature, divergence: the guidance loss, see `guidance`.
        guidance_reduction: "mean" or "sum" over the batch; None follows the divergence's source: mean for
            "symmetric", sum for "forward".
        drop_rate: dropout before the classifier's last layer, in [0, 1); a classifier that is not an
            nn.Sequential is one layer.
        norm_layer, act_layer: layers of the hidden classifier. Others than BatchNorm1d, ELU, ReLU and
            Identity, or a hook on the classifier or one of its layers, make it a custom classifier.
        input_fmt: "NCHW" (any memory order; NCHW and channels-last are read in place), "NHWC" or "NLC".
        feat_size: (H, W) for "flatten", whose features are ordered C, H, W for every input format.
        backend: "auto" (Triton on a GPU tensor, torch elsewhere), "triton" or "torch".
        device, dtype: of the parameters.

    Features are float32, bfloat16, float16, or float64 (torch backend). Everything small, logits of the
    default classifiers included, is computed and returned in float32 (float64 for float64), under
    autocast too; a custom classifier runs under the caller's autocast, or in its parameters' type.
    In training mode with batch norm, beta is the gradient of the batch's summed score, coupling included.

    Raises:
        ValueError, TypeError: an option, shape, type or target that does not fit, named in the message.

    Example:
        >>> head = GGAMHead(512, 10)
        >>> out = head(torch.randn(4, 512, 7, 7), torch.tensor([1, 2, 3, 4]))
        >>> out.logits.shape, out.cam_weights.shape
        (torch.Size([4, 10]), torch.Size([4, 512]))
    """

    def forward(
        self, features: Tensor, target: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor | GGAMOutput:
        """Logits (N, K); with `target` a GGAMOutput; with `pre_logits` the last layer's input."""
        self._check_request(target, pre_logits)
        x, spatial_shape, mlp, options, backend = self._inputs(features)
        second_order = target is not None and not self.cam_detach and torch.is_grad_enabled()

        attended = ggam_attention(x, mlp, options, backend, differentiable=second_order)
        if target is None:
            return self._classify(attended.pooled, spatial_shape, pre_logits, backend)

        target = checks.target(target, x.shape[0], self.num_classes)
        layers = closed_form_layers(self.classifier, self.drop)
        logits, pull_back = self._score(layers, attended.pooled, spatial_shape, not second_order, backend)
        checks.scores(logits, x.shape[0], self.num_classes)
        (v,), _ = pull_back([score_gradient(logits, target, self.cam_class)])
        terms = (self.cam_norm, self.cam_temperature, self.divergence)
        if second_order:
            with checks.full_precision(x):
                beta = grad_cam_weights(
                    x, mlp, options, attended, v, self.cam_at, backend, differentiable=True
                )
                log_s = torch.log_softmax(attended.channel_logits, -1)
                s, guidance = log_s.exp(), kl_guidance(log_s, beta, *terms)
        else:
            beta, s, guidance = cam_and_guidance(x, mlp, options, attended, v, self.cam_at, backend, *terms)
        t = attended.spatial.unflatten(1, spatial_shape)
        return GGAMOutput(logits, s, t, beta, reduce_batch(guidance, self.guidance_reduction))

    def fused_loss(
        self, features: Tensor, target: Tensor, guidance_weight: float = 0.1, label_smoothing: float = 0.0
    ) -> FusedLoss:
        """The loss of `GGAMLoss`, with the gradient of the features in hand: see
        `functional.fused_ggam_loss`."""
        weight, smoothing = loss_weights(guidance_weight, label_smoothing)
        self._check_request(target, pre_logits=False)
        if not self.cam_detach or self.pool_type in ("flatten", "") or not torch.is_grad_enabled():
            out = self(features, target)
            loss = GGAMLoss(weight, smoothing)(out, target)
            return FusedLoss(loss, GGAMOutput(*(o.detach() for o in out)))
        x, spatial_shape, mlp, options, backend = self._inputs(features)
        target = checks.target(target, x.shape[0], self.num_classes)
        terms = LossTerms(weight, smoothing, self.cam_at, self.cam_class, self.cam_norm,
                          self.cam_temperature, self.divergence, self.guidance_reduction)  # fmt: skip

        layers = closed_form_layers(self.classifier, self.drop)
        known = layers is not None

        def score(pooled: Tensor) -> Scores:
            if torch.compiler.is_compiling() and not known:
                anchor = next((p for p in (x, *mlp) if p is not None and p.requires_grad), None)
                pooled = pooled if anchor is None else Anchored.apply(pooled, anchor)
            with torch.set_grad_enabled(not known):  # the gradients of known layers come in closed form
                result = self._score(layers, pooled, spatial_shape, True, backend)
            checks.scores(result.logits, x.shape[0], self.num_classes)
            return result

        loss, (logits, s, t, beta, guidance) = fused_loss(x, mlp, options, backend, score, target, terms)
        return FusedLoss(loss, GGAMOutput(logits, s, t.unflatten(1, spatial_shape), beta, guidance))

    def _inputs(self, features: Tensor) -> tuple[Tensor, tuple[int, ...], ChannelMLP, Options, str]:
        """Features as (N, C, L), their spatial shape, the channel MLP, the options, the resolved backend."""
        x, spatial_shape = checks.feature_map(features, self.input_fmt, self.in_features)
        self._check_positions(spatial_shape)
        options = Options(self.attention, self.spatial_norm, self.pool_type)
        mlp = ChannelMLP(None, None, None, None)
        if options.uses_channel:
            parameters: list[Tensor] = []
            for name, layer in (("fc1", self.fc1), ("fc2", self.fc2)):
                own_forward = type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__
                own = layer._parameters
                by_hook = bool(layer._forward_pre_hooks) and not ("weight" in own and "bias" in own)
                if own_forward or by_hook:
                    other = "parameters that a hook computes (pruning)" if by_hook else "a forward of its own"
                    raise TypeError(
                        f"{name} must be a plain nn.Linear, as its weight and bias are read and it is not "
                        f"called; got {type(layer).__name__} with {other}"
                    )
                weight, bias = layer.weight, layer.bias
                if bias is None:
                    raise TypeError(f"{name} must have a bias; got {layer}")
                if hasattr(weight, "full_tensor"):
                    raise TypeError(
                        f"{name} is sharded by itself (its weight is a {type(weight).__name__}), and it is "
                        "not called: shard the head or a module around it"
                    )
                parameters += [weight, bias]
            mlp = ChannelMLP(*parameters)
        return x, spatial_shape, mlp, options, checks.backend(self.backend, x)

    def _classify(
        self, pooled: Tensor, spatial_shape: tuple[int, ...], pre_logits: bool, backend: str
    ) -> Tensor:
        layers = closed_form_layers(self.classifier, self.drop)
        if layers is None or self.pool_type == "":
            return self._custom(pooled, spatial_shape, pre_logits)
        with checks.full_precision(pooled):
            return run(layers[:-1] if pre_logits else layers, pooled.flatten(1), get_stages(backend))

    def _custom(self, pooled: Tensor, spatial_shape: tuple[int, ...], pre_logits: bool = False) -> Tensor:
        """Run a classifier of unknown layers in its parameters' type, or under the caller's autocast."""
        if self.pool_type == "":
            x = checks.like_input(pooled, spatial_shape, self.input_fmt)
        else:
            x = pooled.flatten(1)
        parameter = next((p for p in self.classifier.parameters() if p.is_floating_point()), None)
        if parameter is not None and not checks.autocasts(x):
            x = x.to(parameter.dtype)
        *body, last = layers_of(self.classifier)
        if body and not pre_logits and hooked(self.classifier):
            classifier = self.classifier
            if self.drop.training and self.drop.p:
                classifier = copy.copy(classifier)  # the same hooks, around one layer more
                classifier._modules = {str(i): m for i, m in enumerate((*body, self.drop, last))}
            return classifier(x)
        for layer in body:
            x = layer(x)
        x = self.drop(x)
        return x if pre_logits else last(x)

    def _score(
        self,
        layers: list[nn.Module] | None,
        pooled: Tensor,
        spatial_shape: tuple[int, ...],
        detach: bool,
        backend: str,
    ) -> Scores:
        """Logits, and the map from d y / d logits to d y / d pooled, in pooled's own shape."""
        if layers is None or self.pool_type == "":
            return custom_scores(lambda x: self._custom(x, spatial_shape), pooled, detach)
        with checks.full_precision(pooled):
            result = scores(layers, pooled.flatten(1), detach, get_stages(backend))

        def pull_back(seeds: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
            with checks.full_precision(pooled):
                rows, gradients = result.pull_back(seeds)
                return [v.view(pooled.shape) for v in rows], gradients

        return Scores(result.logits, pull_back)
