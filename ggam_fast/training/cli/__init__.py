"""The command line `ggam-fast`."""

from ggam_fast.training.cli.main import main

__all__ = ["main"]
