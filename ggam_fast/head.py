"""GGAMHead: the paper's attention and classifier, with Grad-CAM guidance, as one drop-in module."""

import copy
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.fx import Proxy

from . import checks, step
from .autograd import Anchored, forward_mode
from .backends.registry import autocasts, full_precision, looked_into
from .backends.torch import TORCH
from .base import GGAMHeadBase, GGAMOutput, output_of, values_of
from .called import CalledBackend, CalledMLP, call
from .classifier.layers import hooked, known_layers, modules_of, read_directly, weight_and_bias
from .classifier.rules import LayerGradient, Scores, run, scores
from .classifier.scores import custom_scores
from .closed_form import ChannelMLP, Options
from .entropy import reduce_batch
from .guidance import kl_guidance
from .layer import DROPOUT, Layer
from .losses import GGAMLoss
from .step import FusedLoss, Inputs, LossTerms

if checks.TRITON_AVAILABLE:
    from . import compiled, recorded
else:
    compiled = recorded = None  # type: ignore[assignment]


class GGAMHead(GGAMHeadBase):
    """Grad-CAM guided channel-spatial attention and classifier (arXiv 2101.09666).

        g = mean_l A;  S = softmax(FC2(relu(FC1(g))));  U = sum_c S_c A_c;  T = norm(U);  D = kappa A T
        logits = classifier(pool(D));  beta = mean_l d y / d A;  L = divergence(S, norm(beta))
        of positions: q = relu(d y / d T) / sum;  L = KL(q, T)

    `head(features)` returns logits (N, K) without Grad-CAM and replaces pooling and a linear layer.
    `head(features, target)` returns a `GGAMOutput`. The module stores nothing between calls.

    Args:
        in_features: C, channels of the features.
        num_classes: K; 0 builds no classifier, as in timm.
        attention: which attention is used. "channel_spatial" uses both. "channel" (D = kappa S A),
            "spatial" (S = 1/C) and "none" (D = A) are the paper's ablations.
        spatial_norm: how T is made from U. "softmax" over positions is the paper's text. "sum" (U / sum U,
            uniform if the sum is 0) is its printed formula. "sigmoid" is the authors' script.
        attention_scale: kappa. "unit_mean" makes the weights that multiply A average to one: kappa is L for
            "softmax" and "sum", 1 for "sigmoid", C for attention="channel". "printed" is kappa = 1, as in
            the paper and its script. The state dict holds this option; one without it loads as "printed".
        rd_ratio: hidden width of the channel MLP as a share of C, in (0, 1].
        rd_channels: hidden width of the channel MLP. It replaces `rd_ratio`.
        pool_type: how D is pooled for the classifier. "avg"; "max" (ties go to the first position);
            "flatten", which needs `feat_size`; "" hands D itself to `classifier`.
        hidden_size: width of the default classifier's hidden layer (BN-FC-BN-ELU-FC). 0 or None builds one
            linear layer.
        classifier: your own module on the pooled vector (N, C), or on D for `pool_type=""`. Autograd computes
            its class-score gradient, so its first layer must not work in place.
        cam_at: where the gradient for beta is taken. "features": beta = mean dy/dA. "attended":
            beta = mean dy/dD.
        cam_class: the class whose score y is explained: the "label" (a soft target weights the scores), or
            the "predicted" class.
        cam_detach: True treats beta as a constant. False also differentiates the guidance loss through beta,
            which takes second derivatives and more memory.
        cam_norm: makes beta comparable with S. "sigmoid" is the paper. "softmax" over channels is the
            authors' script. "standardized" is ours: z-scores over channels, then a sigmoid.
            "standardized_softmax" is ours: z-scores, then a softmax. It needs channel attention.
        cam_temperature: divides beta, or its z-scores, before the sigmoid or softmax; finite and > 0.
        divergence: "symmetric" is (KL(S, beta~) + KL(beta~, S)) / 2. "forward" is KL(S, beta~). "reverse" is
            KL(beta~, S). With cam_norm="standardized_softmax" it compares two distributions, has one order
            with the cross entropy, and has the gradient S - beta~ for the channel logits.
        guidance_reduction: "mean" or "sum" over the batch. None is the sum for "forward" and the mean for the
            others, as in their sources. "none" gives the guidance loss of each image (N,), and so the
            position loss. It is slower, because its step is not recorded.
        position_guidance: guides T, beside the guidance of S and independent of it. "relu": by KL(q, T) with
            q = relu(dT) / sum(relu(dT)), uniform where that sum is 0, for the class activation map
            dT = d y / d T. "standardized_softmax": with q = softmax(zscore(dT) / position_temperature). Both
            are ours. It needs spatial attention and spatial_norm="softmax". The output then has a
            `position_loss`, the mean over the batch; its gradient for U is T - q, and q counts as constant.
        position_temperature: divides the z-scores of dT; finite and > 0.
        ignore_index: images with this label have no loss, no guidance and no gradient, and do not count in
            means. Give `GGAMLoss` the same value. Any other label outside [0, K) is an error.
        drop_rate: dropout before the classifier's last layer, in [0, 1). A classifier that is not an
            nn.Sequential counts as one layer.
        norm_layer: norm of the default classifier. A type other than SettlingBatchNorm1d and BatchNorm1d
            makes it a custom classifier. A hook on the classifier or on one of its layers does too.
        act_layer: activation of the default classifier. A type other than ELU, ReLU and Identity makes it a
            custom classifier.
        norm_eps: eps of the classifier's first norm, finite and >= 0. None keeps the layer's default, 1e-5.
        input_fmt: "NCHW", read in place from NCHW and from channels-last memory; "NHWC"; or "NLC".
        prefix_tokens: how many tokens in front of an "NLC" input are no positions, such as a class token and
            registers. The head cuts them off and gives them no gradient.
        feat_size: (H, W) for "flatten". The flattened vector has the order C, H, W for every input format.
        backend: "auto" (Triton for GPU tensors, torch for others), "triton" or "torch".
        device: device of the parameters.
        dtype: type of the parameters.

    Features are float32, bfloat16, float16, or float64 (torch backend). Small tensors and the logits of the
    default classifier are computed and returned in float32 (float64 for float64), under autocast too. A
    custom classifier runs under the caller's autocast, or in the type of its parameters.
    With batch norm in training mode, beta is the gradient of the summed score of the batch: the score of one
    image depends on the other images.

    Raises:
        ValueError, TypeError: an option, shape, type or target does not fit. The message names it.

    Examples:
        >>> head = GGAMHead(512, 10)
        >>> out = head(torch.randn(4, 512, 7, 7), torch.tensor([1, 2, 3, 4]))
        >>> out.logits.shape, out.cam_weights.shape
        (torch.Size([4, 10]), torch.Size([4, 512]))
    """

    @overload
    def forward(self, features: Tensor, target: None = None, pre_logits: bool = False) -> Tensor: ...
    @overload
    def forward(self, features: Tensor, target: Tensor, pre_logits: bool = False) -> GGAMOutput: ...
    @overload
    def forward(
        self, features: Tensor, target: Tensor | None, pre_logits: bool = False
    ) -> Tensor | GGAMOutput: ...
    def forward(
        self, features: Tensor, target: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor | GGAMOutput:
        """Logits (N, K); with `target` a GGAMOutput; with `pre_logits` the last layer's input."""
        if isinstance(features, Proxy):
            return self._leaf(features, target, pre_logits)
        if target is not None:
            self._check_request(target, pre_logits)
        if self.prefix_tokens:
            features = self._without_prefix(features)
        if (
            type(self) is GGAMHead
            and recorded is not None
            and not (pre_logits or torch.compiler.is_compiling())
        ):
            replayed: Tensor | GGAMOutput | None
            if target is None:
                replayed = recorded.logits(self, features, self._check)
            else:
                replayed = recorded.guided(self, features, target, self._check)
            if replayed is not None:
                return replayed
        inputs = self._check(features, target)
        x, spatial_shape, mlp, options, backend, layers, target, terms = inputs
        forward = forward_mode()
        second_order = target is not None and not self.cam_detach and (forward or torch.is_grad_enabled())
        called = None
        if self._calls_mlp(mlp):
            mlp_modules = CalledMLP(self.fc1, self.fc2)
            called = CalledBackend(backend, mlp_modules, target is not None, not second_order)
        composed = second_order or forward or called is not None

        if not pre_logits and self._compiles_whole(x, mlp, options, layers, target, backend):
            assert compiled is not None
            assert layers is not None
            out = compiled.drop_in(x, mlp, options, layers, target, terms, self._whole(features))
            if target is None:
                return out.logits
            checks.scores(out.logits, x.shape[0], self.num_classes)
            return _with_map(out, spatial_shape)

        if not (pre_logits or second_order) and called is None and self._runs_whole(inputs):
            out = step.drop_in(inputs, self.num_classes)
            return out.logits if target is None else out

        if forward and target is not None and (layers is None or self.pool_type == "" or called is not None):
            what = "classifier" if called is None else "fc1 or fc2"
            raise NotImplementedError(
                f"a custom {what}'s Grad-CAM is autograd's and has no forward mode (torch.func.jvp): call "
                "the head without target, or use reverse mode (torch.func.vjp, backward)"
            )
        if called is not None:
            attended = called.attention(x, options)
        else:
            attended = step.ggam_attention(x, mlp, options, backend, differentiable=composed)
        stages = "torch" if forward else backend
        if target is None or terms is None:
            return self._classify(layers, attended.pooled, spatial_shape, pre_logits, stages)
        logits, pull_back = self._score(layers, attended.pooled, spatial_shape, not second_order, stages)
        checks.scores(logits, x.shape[0], self.num_classes)
        seed, share = TORCH.class_scores(logits, target, self.cam_class, self.ignore_index)
        (v,), _ = pull_back([seed])
        if composed:
            with full_precision(x):
                of_positions = terms.of_positions(options, attended, share)
                if called is not None:
                    beta, guided = called.grad_cam_weights(x, options, attended, v, self.cam_at, of_positions)
                else:
                    beta, guided = step.grad_cam_weights(
                        x, mlp, options, attended, v, self.cam_at, backend, second_order, of_positions
                    )
                log_s = torch.log_softmax(attended.channel_logits, -1)
                norm = (self.cam_norm, self.cam_temperature, self.divergence)
                s, per_image = log_s.exp(), kl_guidance(log_s, beta, *norm)
                losses = [reduce_batch(per_image, self.guidance_reduction, share)]
                if guided is not None:
                    losses.append(step.position_loss(guided, attended, share, self.guidance_reduction))
        else:
            beta, s, *losses = step.cam_and_guidance(x, mlp, options, attended, v, share, backend, terms)
        t = attended.spatial.unflatten(1, spatial_shape)
        return output_of([logits, s, t, beta, *losses])

    def _check(self, features: Tensor, target: Tensor | None) -> Inputs:
        """What the equations need of a call.  Raise an error if features and target do not fit."""
        x, shape, mlp, options, backend = self._inputs(features, target is not None)
        terms = None
        if target is not None:
            target = checks.target(target, x.shape[0], self.num_classes, self.ignore_index, x.device)
            terms = self._loss_terms()
        layers = known_layers(self.classifier, self.drop)
        return Inputs(x, shape, mlp, options, backend, layers, target, terms)

    def _loss_terms(
        self, guidance_weight: float = 1.0, label_smoothing: float = 0.0, position_weight: float = 1.0
    ) -> LossTerms:
        return LossTerms(
            self.cam_at, self.cam_class, self.cam_norm, self.divergence, self.guidance_reduction,
            self.ignore_index, self.cam_temperature, guidance_weight, label_smoothing,
            self.position_temperature, position_weight,
        )  # fmt: skip

    def fused_loss(
        self,
        features: Tensor,
        target: Tensor,
        guidance_weight: float = 1e-3,
        label_smoothing: float = 0.0,
        position_weight: float | None = None,
    ) -> FusedLoss:
        """The head followed by `GGAMLoss`, fused: see `functional.fused_ggam_loss`."""
        weight, smoothing = checks.loss_weights(guidance_weight, label_smoothing)
        of_positions = checks.position_weight(position_weight, self.position_guidance != "none") or 0.0
        self._check_request(target, pre_logits=False)
        shares = self.cam_detach and self.pool_type not in ("flatten", "") and torch.is_grad_enabled()
        if not shares or self.guidance_reduction == "none" or forward_mode():
            return self._drop_in_loss(features, target, weight, smoothing, position_weight)
        terms, whole_features = self._loss_terms(weight, smoothing, of_positions), features
        if self.prefix_tokens:
            features = self._without_prefix(features)
        if type(self) is GGAMHead and recorded is not None and not torch.compiler.is_compiling():
            replayed = recorded.fused(self, features, target, terms, self._check)
            if replayed is not None:
                return replayed
        x, spatial_shape, mlp, options, backend, layers, labels, _ = self._check(features, target)
        assert labels is not None
        if self._calls_mlp(mlp):
            return self._drop_in_loss(whole_features, target, weight, smoothing, position_weight)
        if self._compiles_whole(x, mlp, options, layers, labels, backend):
            assert compiled is not None
            assert layers is not None
            whole = self._whole(features)
            loss, out = compiled.fused_loss(x, mlp, options, layers, labels, terms, whole)
            checks.scores(out.logits, x.shape[0], self.num_classes)
            return FusedLoss(loss, _with_map(out, spatial_shape))

        def score(pooled: Tensor) -> Scores:
            if torch.compiler.is_compiling():
                anchor = next((p for p in (x, *mlp) if p is not None and p.requires_grad), None)
                pooled = pooled if anchor is None else Anchored.apply(pooled, anchor)
            with torch.enable_grad():
                return self._score(None, pooled, spatial_shape, True, backend)

        classifier = score if layers is None else layers
        loss, out = step.fused_loss(x, mlp, options, backend, classifier, labels, terms, self.num_classes)
        return FusedLoss(loss, _with_map(out, spatial_shape))

    def _drop_in_loss(
        self,
        features: Tensor,
        target: Tensor,
        guidance_weight: float,
        label_smoothing: float,
        position_weight: float | None,
    ) -> FusedLoss:
        """The head and GGAMLoss one after the other."""
        out = self(features, target)
        loss = GGAMLoss(guidance_weight, label_smoothing, self.ignore_index, position_weight=position_weight)(
            out, target
        )
        return FusedLoss(loss, output_of([o.detach() for o in values_of(out)]))

    def _inputs(
        self, features: Tensor, guided: bool = False
    ) -> tuple[Tensor, tuple[int, ...], ChannelMLP, Options, str]:
        """Features as (N, C, L), their spatial shape, the channel MLP, the options, the resolved backend.

        The channel MLP is empty if it is not used, or if its layers must be called.
        """
        x, spatial_shape = checks.feature_map(features, self.input_fmt, self.in_features)
        self._check_positions(spatial_shape)
        options = Options(
            self.attention, self.spatial_norm, self.pool_type, self.attention_scale,
            self.position_guidance if guided else "none",
        )  # fmt: skip
        backend = checks.backend(self.backend, x)
        mlp = ChannelMLP(None, None, None, None)
        if options.uses_channel:
            fc1, fc2 = self.fc1, self.fc2
            if read_directly(fc1, fc2):
                mlp = ChannelMLP(*weight_and_bias("fc1", fc1), *weight_and_bias("fc2", fc2))
        return x, spatial_shape, mlp, options, backend

    def _calls_mlp(self, mlp: ChannelMLP) -> bool:
        """Whether fc1 and fc2 are called, because there is more to them than weights and biases."""
        return mlp.fc1_weight is None and self.attention in ("channel_spatial", "channel")

    def _compiles_whole(
        self,
        x: Tensor,
        mlp: ChannelMLP,
        options: Options,
        layers: list[Layer] | None,
        target: Tensor | None,
        backend: str,
    ) -> bool:
        """Whether the compiled graph holds one operator each way; else it holds the stages."""
        if not torch.compiler.is_compiling() or backend != "triton" or compiled is None:
            return False
        return (
            type(self) is GGAMHead
            and self.cam_detach
            and (target is None or self.guidance_reduction != "none")
            and not self._calls_mlp(mlp)
            and compiled.applies(x, mlp, options, layers, target)
        )

    def _runs_whole(self, inputs: Inputs) -> bool:
        """Whether a step is one autograd node, which no tracer or transform looks into."""
        if inputs.backend != "triton" or inputs.layers is None or inputs.options.dense or looked_into():
            return False
        if inputs.terms is not None and inputs.terms.guidance_reduction == "none":
            return False
        return not any(layer.kind == DROPOUT and layer.training and layer.p for layer in inputs.layers)

    def _whole(self, features: Tensor) -> Tensor | None:
        """The features (N, C, H, W) themselves if they are channels-last, else None."""
        last = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
        return features if last and self.input_fmt == "NCHW" else None

    def _classify(
        self,
        layers: list[Layer] | None,
        pooled: Tensor,
        spatial_shape: tuple[int, ...],
        pre_logits: bool,
        backend: str,
    ) -> Tensor:
        if layers is None or self.pool_type == "":
            return self._custom(pooled, spatial_shape, pre_logits)
        with full_precision(pooled):
            return run(layers[:-1] if pre_logits else layers, pooled.flatten(1), backend)

    def _custom(self, pooled: Tensor, spatial_shape: tuple[int, ...], pre_logits: bool = False) -> Tensor:
        """Run a custom classifier in the type of its parameters, or under the caller's autocast."""
        if self.pool_type == "":
            x = checks.like_input(pooled, spatial_shape, self.input_fmt)
        else:
            x = pooled.flatten(1)
        parameter = next((p for p in self.classifier.parameters() if p.is_floating_point()), None)
        if parameter is not None and not autocasts(x):
            x = x.to(parameter.dtype)
        *body, last = modules_of(self.classifier)
        if body and not pre_logits and hooked(self.classifier):
            classifier = self.classifier
            if self.drop.training and self.drop.p:
                classifier = copy.copy(classifier)  # the same hooks, around one more layer
                classifier._modules = {str(i): m for i, m in enumerate((*body, self.drop, last))}
            return classifier(x)
        for layer in body:
            x = call(layer, x)
        x = self.drop(x)
        return x if pre_logits else call(last, x)

    def _score(
        self,
        layers: list[Layer] | None,
        pooled: Tensor,
        spatial_shape: tuple[int, ...],
        detach: bool,
        backend: str,
    ) -> Scores:
        """Logits, and the map from d y / d logits to d y / d pooled in the shape of `pooled`."""
        if layers is None or self.pool_type == "":
            return custom_scores(lambda x: self._custom(x, spatial_shape), pooled, detach)
        with full_precision(pooled):
            result = scores(layers, pooled.flatten(1), detach, backend)

        def pull_back(seeds: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
            with full_precision(pooled):
                rows, gradients = result.pull_back(seeds)
                return [v.view(pooled.shape) for v in rows], gradients

        return Scores(result.logits, pull_back)


def _with_map(out: GGAMOutput, shape: tuple[int, ...]) -> GGAMOutput:
    # Not _replace: torch 2.11 does not compile it.
    logits, channel, spatial, *rest = values_of(out)
    return output_of([logits, channel, spatial.unflatten(1, shape), *rest])
