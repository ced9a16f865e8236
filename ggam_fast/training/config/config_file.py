"""Options in a YAML or TOML file, by the names of the command line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ggam_fast.training.errors import TrainError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# The first and the last line of a file that this module wrote. `...` ends a YAML document.
_HEADER = "# Options of ggam-fast. The file is whole if its last line is `...`."
_END = "..."


def read_config_file(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """The options in `path`, by their Python names. The file may write dashes or underscores.

    Raises:
        TrainError: the file cannot be read, is cut off, is not YAML or TOML, is not a table, or has an
            unknown option.
    """
    names = set(known)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if _cut_off(text):
            raise TrainError(
                f"--config {path} is cut off: it must end with the line {_END}, as ggam-fast wrote it"
            )
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise TrainError(f"--config {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        kind = "TOML" if path.suffix == ".toml" else "YAML"
        raise TrainError(f"--config {path} is not {kind}: {reason}") from error
    if not isinstance(found or {}, dict):
        raise TrainError(f"--config {path} must hold options, one `name: value` in each line")
    options = {}
    for key, value in (found or {}).items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise TrainError(f"--config {path} has the unknown option {key}; the nearest is {near}")
        if isinstance(value, Mapping):
            raise TrainError(f"--config {path}: {key} must be one value; got a table")
        options[name] = value
    return options


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """`options` as command-line arguments."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


def config_text(options: Mapping[str, Any]) -> str:
    """`options` as YAML that `read_config_file` reads back."""
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in options.items()
        if value is not None
    }
    return f"{_HEADER}\n{yaml.safe_dump(plain, sort_keys=False)}{_END}\n"


def _cut_off(text: str) -> bool:
    """Whether `config_text` wrote only the beginning of `text`. Files of older versions have no header."""
    if _HEADER.startswith(text.strip()):
        return bool(text.strip())
    return text.startswith(_HEADER) and text.rstrip().splitlines()[-1] != _END
