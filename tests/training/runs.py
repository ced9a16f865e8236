"""What tests do with a run: set its options, read what it printed and what it measured."""

import json
from dataclasses import replace


def with_(config, **options):
    """The configuration with these options of its `optim` section."""
    return replace(config, optim=replace(config.optim, **options))


def said(report) -> str:
    """The text that the fixture `report` has kept."""
    return report.console.file.getvalue()


def numbers(folder) -> dict:
    """The numbers of a run that do not depend on the machine's speed."""
    results = json.loads((folder / "metrics.json").read_text())
    for epoch in results["epochs"]:
        del epoch["images_per_second"]
    return {"test": results["test"], "epochs": results["epochs"]}
