"""Versions are those of the libraries that are imported."""

import timm
import torch
import torchvision

from ggam_fast.training.system.versions import versions


def test_versions_are_those_imported():
    found = versions()
    assert list(found) == ["torch", "timm", "torchvision"]
    # torch adds its build to its version.
    for module in (torch, timm, torchvision):
        assert module.__version__.split("+")[0] == found[module.__name__].split("+")[0]
