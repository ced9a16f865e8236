"""A whole training step of a timm backbone with one of three heads, for `bench_e2e`.

linear          global pooling, one linear layer and cross entropy; GGAM replaces these
fused           this library's head and fused loss
fused_compiled  `fused` inside torch.compile(fullgraph=True); the backbone is not compiled
authors         the method of the authors' script.  A backward pass of the predicted scores through the whole
                backbone gives beta, and its gradients are dropped.  Then the loss goes back through the
                backbone a second time.  Attention, classifier and guidance are those of the reference.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.suite.peers import GUIDANCE_WEIGHT, NUM_CLASSES, guided_loss
from ggam_fast import GGAMHead
from ggam_fast.reference import GGAMHeadReference

PROVIDERS = ("linear", "fused", "fused_compiled", "authors")


class Setting(NamedTuple):
    """A backbone with random weights, its images, and the type of autocast."""

    backbone: str
    size: int
    n: int
    autocast: torch.dtype | None


AS_IN_THE_SCRIPT = {"cam_class": "predicted", "cam_at": "attended"}
"""The class and the place of Grad-CAM.  They are the same for both heads."""
GPU = Setting("resnet50", 448, 32, torch.bfloat16)
CPU = Setting("resnet10t", 64, 4, None)


class TrainingStep:
    """`step()`: forward, loss, backward and SGD on one batch."""

    def __init__(self, provider: str, setting: Setting, device: torch.device):
        torch.manual_seed(0)
        self.provider, self.setting, self.device = provider, setting, device
        backbone = timm.create_model(setting.backbone, pretrained=False, num_classes=0, global_pool="")
        self.channels = backbone.num_features
        torch.manual_seed(1)
        kind = {"linear": None, "authors": GGAMHeadReference}.get(provider, GGAMHead)
        head = (
            nn.Linear(self.channels, NUM_CLASSES)
            if kind is None
            else kind(self.channels, NUM_CLASSES, cam_norm="standardized", **AS_IN_THE_SCRIPT)
        )
        self.backbone = backbone.to(device, memory_format=torch.channels_last)
        self.head = head.to(device)
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        torch.manual_seed(2)
        images = torch.randn(setting.n, 3, setting.size, setting.size, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.target = torch.randint(NUM_CLASSES, (setting.n,), device=device)

        if provider == "fused_compiled":
            torch._dynamo.reset()
            self.guided_loss = torch.compile(guided_loss, fullgraph=True, dynamic=False)

    def autocast(self) -> AbstractContextManager[object]:
        if self.setting.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.setting.autocast)

    def __call__(self) -> Tensor:
        loss = getattr(self, f"_{self.provider}")()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def loss(self) -> Tensor:
        """One backward pass without the optimizer's step, for parity."""
        return getattr(self, f"_{self.provider}")()

    def _linear(self) -> Tensor:
        with self.autocast():
            logits = self.head(self.backbone(self.images).mean((2, 3)))
            loss = F.cross_entropy(logits, self.target)
        loss.backward()
        return loss.detach()

    def _fused(self) -> Tensor:
        with self.autocast():
            features = self.backbone(self.images)
            loss = guided_loss(self.head, features, self.target)
        loss.backward()
        return loss.detach()

    def _fused_compiled(self) -> Tensor:
        with self.autocast():
            features = self.backbone(self.images)
        loss = self.guided_loss(self.head, features, self.target)  # the head ignores autocast
        loss.backward()
        return loss.detach()

    def _authors(self) -> Tensor:
        head = self.head
        assert isinstance(head, GGAMHeadReference)
        seen: list[Tensor] = []
        with self.autocast():
            features = self.backbone(self.images)
            shape = tuple(features.shape[2:])
            attended, log_s, *_ = head.attend(features.flatten(2))
            attended.register_hook(lambda gradient: seen.append(gradient))
            logits = head.classify(attended, shape)
        logits.max(1).values.sum().backward(retain_graph=True)
        beta = seen[0].detach().float().mean(2)
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits.float(), self.target)
        loss = loss + GUIDANCE_WEIGHT * head.guidance(log_s.float(), beta)
        loss.backward()
        return loss.detach()
