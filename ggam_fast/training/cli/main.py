"""The command `ggam-fast`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

import ggam_fast

_NEEDED = (
    "timm",
    "torchvision",
    "torchmetrics",
    "rich",
    "tyro",
    "matplotlib",
    "anyascii",
    "tensorboard",
    "safetensors",
    "yaml",
    "jinja2",
    "filelock",
)
_BAD_INPUT = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"ggam-fast {ggam_fast.__version__}")
        return 0
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"ggam-fast: {', '.join(missing)} must be installed: "
            'pip install "ggam-fast[train]", or from a checkout pip install -e ".[train]"',
            file=sys.stderr,
        )
        return _BAD_INPUT
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("ggam-fast: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _run(arguments: list[str]) -> int:
    from ggam_fast.training.cli import commands
    from ggam_fast.training.errors import TrainError, first_line, out_of_memory, worker_died
    from ggam_fast.training.system.interrupts import terminating

    try:
        with terminating():
            return commands.run(arguments)
    except (TrainError, OSError) as error:  # an OSError is one of the system, such as a full disk
        print(f"ggam-fast: {error}", file=sys.stderr)
        return _BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if worker_died(error):
            advice = "the machine may lack memory: fewer --workers or a smaller --batch-size may help"
            print(f"ggam-fast: {first_line(error).rstrip(' .')}; {advice}", file=sys.stderr)
            return _BAD_INPUT
        if not out_of_memory(error):
            raise
        advice = "a smaller --batch-size or --image-size may help"
        print(f"ggam-fast: out of memory ({first_line(error)}); {advice}", file=sys.stderr)
        return _BAD_INPUT
