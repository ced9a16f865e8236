"""The command line: one function per subcommand. Options are generated from a configuration class."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from ggam_fast.training.cli.help import screen
from ggam_fast.training.config.config_file import as_arguments, read_config_file
from ggam_fast.training.config.options import BEFORE, HeadConfig, TrainConfig
from ggam_fast.training.config.recipes import RECIPES
from ggam_fast.training.errors import TrainError

Config = TypeVar("Config")

# The options that --help describes. It lists all others with their defaults.
_EVERYDAY = {
    "train": (
        *("data", "root", "backbone", "finetune", "finetune_from", "preset", "attention", "recipe"),
        *("epochs", "lr", "guidance_weight", "seed", "out", "resume"),
    ),
    "ablate": (
        *("data", "root", "out", "seeds", "choice_seeds", "attentions", "guidances", "guidance_weights"),
        *("position_weights", "train_per_class", "backbone", "finetune_from", "epochs", "lr", "backbone_lr"),
    ),
}
# Options that may change when a run is resumed.
_PER_PART = {"root", "resume", "save_every", "log_to", "device", "workers", "cache_dir", "compile"}


def train(arguments: Sequence[str]) -> int:
    """Train a GGAM classifier on photographs.

    Without options it trains a head for solar cells (elpv) in a few minutes on two cores.

        ggam-fast train --data folder --root photos --out runs/photos
        ggam-fast train --finetune-from blocks.5 --out runs/last      # train the last layers too
        ggam-fast train --recipe paper --data folder --root photos    # train the whole network on a GPU
        ggam-fast train --resume runs/photos                          # go on with a stopped run
        ggam-fast train --resume runs/photos --epochs 12              # more epochs for a finished run
    """
    from ggam_fast.training.run import train as training
    from ggam_fast.training.show.console import Report

    outcome = training.train(parse_train(arguments), Report())
    return 0 if outcome.metrics is not None else 130


def data(arguments: Sequence[str]) -> int:
    """List data sets, check one, or draw some of its images.

    check reads every file. Its exit code is 2 if train would refuse the data set.

        ggam-fast data list
        ggam-fast data check --data cub --root datasets
        ggam-fast data check --data folder --root photos --enlarge --json
        ggam-fast data preview --data birds --root packages --out birds.png
    """
    from ggam_fast.training.cli import data_commands
    from ggam_fast.training.show.console import Report

    what, config = _followed("data", ("list", "check", "preview"), data_commands.ShowConfig, arguments)
    report = Report.silent() if config.json else Report()
    with report.listening():
        if what == "check":
            return data_commands.check(config, report)
        if what == "list":
            data_commands.show_list(config, report)
        else:
            data_commands.preview(config)
    return 0


def cache(arguments: Sequence[str]) -> int:
    """List what is cached, check it, or remove what is of no use.

    verify reads every byte, and its exit code is 2 if something is damaged. prune removes what is
    damaged, unfinished parts of killed runs and, with --unused-days, what no run has used for long.

        ggam-fast cache list
        ggam-fast cache verify --json
        ggam-fast cache prune --unused-days 30 --dry-run
    """
    from ggam_fast.training.cli import cache_commands
    from ggam_fast.training.show.console import Report

    what, config = _followed("cache", ("list", "prune", "verify"), cache_commands.CacheConfig, arguments)
    report = Report.silent() if config.json else Report()
    with report.listening():
        if what == "verify":
            return cache_commands.verify(config, report)
        if what == "list":
            cache_commands.show_list(config)
        else:
            cache_commands.prune(config)
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Measure how good a trained classifier is, and whether it looks at the object.

    The results are evaluation.json and evaluation.html in the run's folder.

        ggam-fast evaluate runs/photos
        ggam-fast evaluate runs/birds --split val --weights best --out looked
    """
    from ggam_fast.training.show.console import Report
    from ggam_fast.training.use import evaluate as evaluation

    config, report = _parsed("evaluate", evaluation.EvaluateConfig(), arguments), Report()
    with report.listening():
        evaluation.evaluate_run(config, report)
    return 0


def explain(arguments: Sequence[str]) -> int:
    """Draw where a trained classifier looks, one figure for each image.

    It shows the image, spatial attention, Grad-CAM and the five likeliest classes of one or two runs.

        ggam-fast explain photo.jpg --run runs/photos
        ggam-fast explain photos/*.jpg --run runs/guided --compare runs/unguided --out figures
    """
    from ggam_fast.training.show.console import Report
    from ggam_fast.training.use import explain as explanation

    config = _parsed("explain", explanation.ExplainConfig(), arguments)
    with Report().listening():
        explanation.explain(config)
    return 0


def ablate(arguments: Sequence[str]) -> int:
    """Compare attentions and guidances over several seeds.

    It trains many heads on the cached maps of a frozen backbone, and writes a report. With
    --finetune-from, each head trains the last layers of the backbone too.
    The same command continues a stopped study.

        ggam-fast ablate --out ablation-elpv --epochs 3
        ggam-fast ablate --finetune-from blocks.5 --out ablation-last-layers
        ggam-fast ablate --data birds --root packages --out ablation-birds
    """
    from ggam_fast.training.ablation import study
    from ggam_fast.training.show.console import Report

    config = _parsed("ablate", study.AblateConfig(), arguments)
    command = shlex.join(["ggam-fast", "ablate", *arguments])
    report = Report()
    with report.listening():
        return 0 if study.ablate(config, report, command) else 130


def export(arguments: Sequence[str]) -> int:
    """Write a trained classifier as a torch.export or ONNX file, and check it.

    The file maps normalised images (N, 3, H, W) to logits (N, K). --maps adds attention and Grad-CAM.

        ggam-fast export runs/photos
        ggam-fast export runs/photos --format both --maps --out deployed
    """
    from ggam_fast.training.show.console import Report
    from ggam_fast.training.use import export as exporting

    config = _parsed("export", exporting.ExportConfig(), arguments)
    with Report().listening():
        exporting.export_run(config)
    return 0


def predict(arguments: Sequence[str]) -> int:
    """Write the likeliest classes of images as CSV or JSON lines.

    Rows are written as they come. The same command continues a stopped prediction.

        ggam-fast predict runs/photos folder
        ggam-fast predict runs/photos a.jpg b.jpg --out ab.jsonl --top-k 3 --probabilities
    """
    from ggam_fast.training.show.console import Report
    from ggam_fast.training.use import predict as predicting

    config, report = _parsed("predict", predicting.PredictConfig(), arguments), Report()
    with report.listening():
        return 0 if predicting.predict(config, report) is not None else 130


def compare(arguments: Sequence[str]) -> int:
    """Compare finished runs: means over seeds, paired differences and curves.

    Runs that differ in their seed alone are one group. Others are compared with the first group.

        ggam-fast compare runs/plain-0 runs/plain-1 runs/guided-0 runs/guided-1
        ggam-fast compare runs/* --out compared
    """
    from ggam_fast.training.show.console import Report
    from ggam_fast.training.use import compare as comparing

    config, report = _parsed("compare", comparing.CompareConfig(), arguments), Report()
    with report.listening():
        comparing.compare(config, report)
    return 0


# The function of each command. Its docstring is the command's help.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "explain": explain,
    "predict": predict,
    "compare": compare,
    "ablate": ablate,
    "export": export,
    "data": data,
    "cache": cache,
}
_CONFIGS = {
    "train": ("config.options", "TrainConfig"),
    "data": ("cli.data_commands", "ShowConfig"),
    "cache": ("cli.cache_commands", "CacheConfig"),
    "evaluate": ("use.evaluate", "EvaluateConfig"),
    "explain": ("use.explain", "ExplainConfig"),
    "predict": ("use.predict", "PredictConfig"),
    "compare": ("use.compare", "CompareConfig"),
    "ablate": ("ablation.study", "AblateConfig"),
    "export": ("use.export", "ExportConfig"),
}


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Help and unknown options end the process."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        raise TrainError(f"there is no command {name}; choose from {', '.join(COMMANDS)}")
    if "--help" in rest or "-h" in rest:
        module, config = _CONFIGS[name]
        options = getattr(import_module(f"ggam_fast.training.{module}"), config)()
        print(screen(name, COMMANDS[name].__doc__ or "", options, _EVERYDAY.get(name)))
        return 0
    if "--help-all" in rest:
        rest = ["--help"]
    return COMMANDS[name](rest)


def overview() -> str:
    """What `ggam-fast --help` shows."""
    lines = ["Train, evaluate and explain image classifiers with GGAM heads.", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  ggam-fast {name:10s} {(command.__doc__ or '').splitlines()[0]}")
    lines += ["", "ggam-fast COMMAND --help shows a command's options and examples."]
    return "\n".join(lines)


def _followed(
    command: str, choices: Sequence[str], kind: type[Config], arguments: Sequence[str]
) -> tuple[str, Config]:
    """The word behind a command, and the configuration of the flags behind it. All words have the same."""
    what, *rest = arguments or ["nothing"]
    if what == "--help":
        what, rest = choices[-1], ["--help"]
    if what not in choices:
        raise TrainError(
            f"ggam-fast {command} must be followed by {', '.join(choices[:-1])} or {choices[-1]}; got {what}"
        )
    return what, _cli(f"{command} {what}", kind(), rest)


def _parsed(command: str, default: Config, arguments: Sequence[str]) -> Config:
    """The configuration of a command, from its defaults, the file given with --config and its flags."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    given, rest = early.parse_known_args(arguments)
    options = {} if given.config is None else read_config_file(_at_home(Path(given.config)), _names(default))
    # Positional options have no flag. They are all paths.
    for name in [field.name for field in fields(default) if "Positional" in str(field.type)]:  # type: ignore[arg-type]
        if name in options:
            value = options.pop(name)
            several = isinstance(getattr(default, name), tuple)
            paths = tuple(map(Path, value if isinstance(value, list) else [str(value)]))
            default = replace(default, **{name: paths if several else paths[0]})  # type: ignore[type-var]
    return _cli(command, default, [*as_arguments(options), *rest])


def _cli(command: str, default: Config, arguments: Sequence[str]) -> Config:
    kind: Any = tyro.conf.OmitArgPrefixes[type(default)]  # type: ignore[misc]
    return _at_home(tyro.cli(kind, args=list(arguments), default=default, prog=f"ggam-fast {command}"))


def _at_home(value: Any) -> Any:
    """`value` with ~ replaced by the home folder in all its paths. A shell does not replace it everywhere."""
    if isinstance(value, Path):
        try:
            return value.expanduser()
        except RuntimeError:  # there is no such user
            return value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _at_home(getattr(value, field.name)) for field in fields(value)})
    return tuple(map(_at_home, value)) if isinstance(value, tuple) else value


def _names(config: Any) -> list[str]:
    """Every option of a configuration class, without its sections, by its present and its older names."""
    hints = get_type_hints(type(config), include_extras=True)
    names = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            names += _names(value)
            continue
        names.append(field.name)
        for note in getattr(hints[field.name], "__metadata__", ()):
            names += [flag.lstrip("-").replace("-", "_") for flag in getattr(note, "aliases", None) or ()]
    return names


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the arguments of `train` ask for.

    Options come from these sources, and later ones override earlier ones: defaults, --recipe, --preset, the
    file given with --config, the other flags. With --resume all options are those of the stopped run.

    Raises:
        TrainError: --recipe or --preset has no effect, because the file overrides all of its options.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--resume", "--recipe", "--preset"):
        early.add_argument(flag)
    given, rest = early.parse_known_args(arguments)
    for name, value in vars(given).items():
        setattr(given, name, None if value == "None" else value)
    if given.resume is not None:
        for name in ("config", "recipe", "preset"):
            if getattr(given, name) is not None:
                raise TrainError(f"--resume continues with the run's own options; leave out --{name}")
        return _resumed(_at_home(Path(given.resume)), rest)
    known = TrainConfig().values()
    options = {} if given.config is None else read_config_file(_at_home(Path(given.config)), known)
    named = {
        name: value
        for name in ("recipe", "preset")
        if (value := getattr(given, name) or options.get(name)) is not None
    }
    # This checks both names.
    _cli("train", TrainConfig(), as_arguments(named))
    recipe = RECIPES[str(named.get("recipe", "modern"))]
    default = TrainConfig().replaced(recipe)
    preset = vars(HeadConfig.from_preset(named["preset"])) if "preset" in named else {}
    default = default.replaced(preset)
    for flag, means, covers in (
        ("recipe", recipe, {name for one in RECIPES.values() for name in one}),
        ("preset", preset, preset.keys() - {"preset"}),
    ):
        written = {name for name in covers if known[name] is not None}  # a file cannot hold None
        if getattr(given, flag) is None or not written <= options.keys():
            continue
        for name, value in {**means, flag: named[flag]}.items():
            if options.get(name, value) != value:
                raise TrainError(
                    f"--{flag} {named[flag]} means {name} {value}, but --config {given.config} says "
                    f"{options[name]} and overrides it; leave out --{flag} or --config"
                )
    return _cli("train", default, [*as_arguments({**options, **named}), *rest])


def _resumed(folder: Path, arguments: Sequence[str]) -> TrainConfig:
    from ggam_fast.training.run.artifacts import OPTIONS

    if not (folder / OPTIONS).is_file():
        raise TrainError(f"--resume must name the folder of a run; {folder} has no {OPTIONS}")
    options = read_config_file(folder / OPTIONS, TrainConfig().values())
    if not options:
        raise TrainError(f"--resume {folder} cannot go on: its {OPTIONS} is empty")
    saved = {**BEFORE, **options}
    before = _cli("train", TrainConfig(), as_arguments(saved))
    config = _cli("train", before, arguments)
    old, new = before.values(), config.values()
    for name in sorted(set(old) - _PER_PART):
        if name == "epochs" and new[name] > old[name]:
            continue  # a finished run goes on
        if old[name] != new[name]:
            flag = name.replace("_", "-")
            raise TrainError(
                f"--resume keeps the options of the run: there --{flag} is {old[name]}; got {new[name]}"
            )
    return config.replaced({"resume": folder, "out": None})
