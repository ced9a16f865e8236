"""The command line, generated from the options in `config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tyro

from ggam_fast.training.config import HeadConfig, TrainConfig

Options = tyro.conf.OmitArgPrefixes[TrainConfig]


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command; its exit code. Help and unknown options end the process."""
    app = tyro.extras.SubcommandApp()

    @app.command(name="train")
    def train(config: Options) -> int:
        """Train a GGAM classifier on photographs.

        Without options: solar cells (elpv), a frozen EfficientNet-Lite0, a few minutes on two cores.

        Your own images, one folder for each class:
            ggam-fast train --data folder --root photos --out runs/photos

        The backbone too, on a GPU if there is one:
            ggam-fast train --finetune
        """
        from ggam_fast.training import engine
        from ggam_fast.training.reports import Report

        preset = config.head.preset
        outcome = engine.train(parse_train(arguments[1:]) if preset else config, Report())
        return 0 if outcome.metrics is not None else 130

    return app.cli(
        prog="ggam-fast",
        description="Grad-CAM guided channel-spatial attention (GGAM): see ggam-fast train --help.",
        args=arguments,
    )


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the arguments of `train` ask for.

    With --preset they are read twice: that preset's options are the defaults of the second reading.
    """
    config = tyro.cli(Options, args=arguments)
    if config.head.preset is None:
        return config
    defaults = replace(TrainConfig(), head=HeadConfig.from_preset(config.head.preset))
    return tyro.cli(Options, args=arguments, default=defaults)
