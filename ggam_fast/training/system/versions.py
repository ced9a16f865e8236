"""The versions of the libraries on which a run's numbers depend."""

from __future__ import annotations

from importlib import metadata


def versions() -> dict[str, str]:
    """Name and version of torch, timm and torchvision."""
    return {name: metadata.version(name) for name in ("torch", "timm", "torchvision")}
