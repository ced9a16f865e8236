"""Evaluations that never took place, for tests of the page."""

import torch

from ggam_fast.training.show.page import Example, Seen, Training, page


def results(classes: int) -> dict:
    """The content of evaluation.json for a run without heat maps, with three kinds of predictions."""
    confusion = [[0] * classes for _ in range(classes)]
    confusion[3][7], confusion[8][2], confusion[5][5] = 4, 9, 20
    shares = dict.fromkeys(("accuracy", "majority", "top5", "balanced_accuracy", "macro_f1"), 0.25)
    of_class = {name: [0.25] * classes for name in ("precision", "recall", "f1")}
    return {
        "classification": {
            **shares,
            **{"images": 33, "calibration_error": 0.5, **of_class},
            **{"support": [0, *[1] * (classes - 1)], "confusion": confusion},
            "reliability": [None, {"images": 33, "confidence": 0.7, "accuracy": 20 / 33}],
            "intervals": {"accuracy": (0.2, 0.3), "macro_f1": (0.1, 0.4)},
        },
        "run": {
            **{"backbone": {"name": "net"}, "head": {"attention": "channel"}, "finetune": True},
            "optim": {"guidance_weight": 1e-3},
        },
        **{"weights": "last", "data": "photos", "split": "test", "notes": ["a & b"], "device": "cpu"},
        "classes": [f"class {index}" for index in range(classes)],
        **{"localisation": {}, "faithfulness": None, "versions": {"torch": "2", "timm": "1"}},
    }


def full_page(images: int = 120) -> str:
    """A page with everything on it: 12 classes, one with a long name, and 120 images, every third wrong."""
    found = results(12)
    found["classes"][7] = "W" * 90
    found["classification"]["recall"] = [0.3, *[index / 12 for index in range(1, 12)]]
    found["classification"]["support"] = [0, *range(1, 12)]
    found["localisation"] = {
        "attention": dict.fromkeys(("pointing", "energy", "max_box_acc_v2", "parts"), 0.5)
    }
    found["localised_against"], found["thresholds"] = "boxes and parts", 7
    curves = {kind: {"curve": [0.1, 0.9], "area": 0.5} for kind in ("insertion", "deletion")}
    found["faithfulness"] = {"images": 3, "maps": {"attention": curves, "random order": curves}}
    names = found["classes"]
    seen = [
        Seen(
            f"{index:03}.png", names[index % 12], names[(index + (index % 3 == 0)) % 12], 0.9, index / images
        )
        for index in range(images)
    ]
    torch.manual_seed(0)

    def example(row: int) -> Example:
        cams = {name: torch.rand(4, 4) for name in (seen[row].label, seen[row].guess)}
        return Example(row, torch.rand(32, 32, 3), torch.rand(4, 4), cams)

    history = [{"epoch": n, "loss": 1 / n, "cross_entropy": 1 / n, "accuracy": 0.5} for n in (1, 2)]
    return page(found, seen, [example(0), example(6)], [example(1)], Training(history, 1))
