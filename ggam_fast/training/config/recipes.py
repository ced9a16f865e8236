"""Whole sets of training options under one name.

`paper` trains the whole network as the paper does (arXiv 2101.09666): SGD, a cosine schedule, 448 x 448 crops
of images brought to 600, pretrained layers ten times slower than new ones. The rest is common practice in
fine-grained recognition and not from the paper: momentum 0.9, 100 epochs, batches of 16, weight decay 5e-4,
rates 0.01 and 0.001.
"""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "modern": {},
    "paper": {
        "backbone": "resnet50",
        "finetune": True,
        "image_size": 448,
        "resize": 600,
        "optimizer": "sgd",
        "schedule": "cosine",
        "lr": 0.01,
        "backbone_lr": 0.001,
        "weight_decay": 5e-4,
        "batch_size": 16,
        "epochs": 100,
    },
}
