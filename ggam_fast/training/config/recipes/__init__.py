"""Whole sets of training options, one YAML file each; `RECIPES` maps their names to the options."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml


def _read() -> dict[str, dict[str, Any]]:
    found = sorted(files(__name__).iterdir(), key=lambda path: path.name)
    return {
        path.name.removesuffix(".yaml"): yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for path in found
        if path.name.endswith(".yaml")
    }


RECIPES = _read()
