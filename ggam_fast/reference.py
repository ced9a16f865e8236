"""The paper in plain eager PyTorch, with Grad-CAM by `torch.autograd.grad`: written to be read, never tuned.

Constructor, parameters, state dict and outputs are those of `GGAMHead`. Every step is one line of the paper's
method. The tests compare the rest of the library with this file in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from . import checks
from .base import GGAMHeadBase, GGAMOutput, output_of, values_of
from .guidance import FLAT


class GGAMHeadReference(GGAMHeadBase):
    """The eager `GGAMHead`. It computes in the type of its input; a reference needs float64."""

    def forward(
        self, features: Tensor, target: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor | GGAMOutput:
        if isinstance(features, Proxy):
            return self._leaf(features, target, pre_logits)
        self._check_request(target, pre_logits)
        features = self._without_prefix(features)
        a, spatial_shape = checks.feature_map(features, self.input_fmt, self.in_features)
        self._check_positions(spatial_shape)
        if target is None:
            attended = self.attend(a)[0]
            return self.classify(attended, spatial_shape, pre_logits)
        target = checks.target(target, a.shape[0], self.num_classes, self.ignore_index, a.device)
        counts = torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
        if self.ignore_index is not None and not target.is_floating_point():
            counts = target != self.ignore_index
            target = target.where(counts, 0)

        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Grad-CAM needs dy/dA even if A is a constant, so use a copy that requires grad.
            a = a if a.requires_grad and keep_graph else a.detach().requires_grad_()
            d, log_s, t, log_t = self.attend(a)
            logits = self.classify(d, spatial_shape)

            if self.cam_class == "predicted":
                y = logits.max(1).values[counts].sum()
            elif target.is_floating_point():
                y = (target.to(logits.dtype) * logits).sum()
            else:
                y = logits.gather(1, target.unsqueeze(1))[counts].sum()
            looked_at = a if self.cam_at == "features" else d
            positions = self.position_guidance != "none"
            (gradient,) = torch.autograd.grad(
                y,
                looked_at,
                retain_graph=keep_graph or positions,
                create_graph=keep_graph and not self.cam_detach,
            )
            beta = gradient.mean(2)
            if self.cam_detach:
                beta = beta.detach()
            losses = [self.guidance(log_s[counts], beta[counts])]
            if positions:
                (class_map,) = torch.autograd.grad(y, t, retain_graph=keep_graph)
                losses.append(self.guidance_of_positions(log_t[counts], class_map[counts].detach()))
        if self.guidance_reduction == "none":
            losses = [logits.new_zeros(len(counts)).masked_scatter(counts, each) for each in losses]
        out = output_of([logits, log_s.exp(), t.unflatten(1, spatial_shape), beta, *losses])
        return out if keep_graph else output_of(x.detach() for x in values_of(out))

    def attend(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """D (N, C, L), log S (N, C), T (N, L) and its logarithm (softmax) of the features A (N, C, L)."""
        channels, positions = a.shape[1:]
        unit_mean = self.attention_scale == "unit_mean"
        if self.attention in ("channel_spatial", "channel"):
            g = a.mean(2)  # F_cg
            log_s = F.log_softmax(self.fc2(F.relu(self.fc1(g))), 1)  # F_cr
        else:
            log_s = torch.log(a.new_full(a.shape[:2], 1 / channels))
        s = log_s.exp()
        if self.attention in ("channel", "none"):
            t = a.new_ones(a.shape[0], positions)
            kappa = channels if unit_mean else 1
            return (kappa * a * s.unsqueeze(2) if self.attention == "channel" else a * 1), log_s, t, t.log()
        b = s.unsqueeze(2) * a  # F_cm
        u = b.sum(1)  # F_fa
        if self.spatial_norm == "softmax":
            t = u.softmax(1)
        elif self.spatial_norm == "sigmoid":
            t = u.sigmoid()
        else:
            total = u.sum(1, keepdim=True)
            empty = total == 0
            t = torch.where(empty, 1 / positions, u / torch.where(empty, 1, total))
        kappa = positions if unit_mean and self.spatial_norm != "sigmoid" else 1
        log_t = F.log_softmax(u, 1)
        return kappa * a * t.unsqueeze(1), log_s, t, log_t  # F_sm

    def classify(self, d: Tensor, spatial_shape: tuple[int, ...], pre_logits: bool = False) -> Tensor:
        """F_tc: pool D, drop out, classify."""
        if self.pool_type == "":
            pooled = checks.like_input(d, spatial_shape, self.input_fmt)
        elif self.pool_type == "flatten":
            pooled = d.flatten(1)
        else:
            pooled = d.mean(2) if self.pool_type == "avg" else d.max(2).values
        last = self.classifier
        if type(last) is nn.Sequential and len(last):
            pooled, last = last[:-1](pooled), last[-1]
        pooled = self.drop(pooled)
        return pooled if pre_logits else last(pooled)

    def guidance(self, log_s: Tensor, beta: Tensor) -> Tensor:
        """L_GGAM of log S and beta, both (N, C)."""
        if self.cam_norm in ("standardized", "standardized_softmax"):
            beta = standardized(beta)
        beta = beta / self.cam_temperature
        log_q = F.log_softmax(beta, 1) if "softmax" in self.cam_norm else F.logsigmoid(beta)
        s, q = log_s.exp(), log_q.exp()
        forward = (s * (log_s - log_q)).sum(1)
        backward = (q * (log_q - log_s)).sum(1)
        losses = {"forward": forward, "reverse": backward}.get(self.divergence, (forward + backward) / 2)
        if self.guidance_reduction == "none":
            return losses
        return losses.sum() if self.guidance_reduction == "sum" else losses.sum() / max(beta.shape[0], 1)

    def guidance_of_positions(self, log_t: Tensor, class_map: Tensor) -> Tensor:
        """KL(q, T) of log T and of the class activation map dT, both (N, L)."""
        if self.position_guidance == "relu":
            q = F.relu(class_map)
            total = q.sum(1, keepdim=True)
            empty = total == 0
            q = torch.where(empty, 1 / q.shape[1], q / torch.where(empty, 1, total))
        else:
            q = (standardized(class_map) / self.position_temperature).softmax(1)
        losses = (torch.xlogy(q, q) - q * log_t).sum(1)
        return losses if self.guidance_reduction == "none" else losses.sum() / max(q.shape[0], 1)


def standardized(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over each row; 0 if its values are equal but for roundings."""
    low, high = x.detach().amin(1, keepdim=True), x.detach().amax(1, keepdim=True)
    roundings = FLAT * torch.finfo(x.dtype).eps
    flat = high - low <= roundings * torch.maximum(low.abs(), high.abs())
    centred = torch.where(flat, 0, x - x.mean(1, keepdim=True))
    variance = centred.square().mean(1, keepdim=True)
    return centred / torch.where(flat, 1, variance).sqrt()
