"""Help that fits a screen: a command's examples, and one line per option."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any

import tyro

_WIDTH = 100


def screen(command: str, doc: str, config: Any, described: Collection[str] | None = None) -> str:
    """What `ggam-fast COMMAND --help` shows: `doc`, then every option of `config` with its default.

    Each option in `described` gets a line that says what it does. By default these are all options.
    """
    sections = [getattr(config, f.name) for f in fields(config)]
    if not all(map(is_dataclass, sections)):
        sections = [config]
    lines, others = [inspect.cleandoc(doc), ""], []
    for section in sections:
        docs = _field_docs(type(section))
        for f in fields(section):
            value = getattr(section, f.name)
            if described is None or f.name in described:
                lines.append(_line(f.name, str(f.type), value, docs[f.name]))
            else:
                others.append(f"{_flag(f.name, value)} {_default(value)}")
    if others:
        lines += ["", "Other options and their defaults:", *_filled(others)]
    more = f"ggam-fast {command} --help-all explains all options."
    if command not in ("data", "cache"):
        more += " --config FILE reads them from YAML or TOML."
    lines += ["", more]
    return "\n".join(lines)


def _filled(cells: list[str]) -> list[str]:
    """Lines that hold as many cells as fit. No cell is broken."""
    text = "   ".join(cell.strip().replace(" ", "\xa0") for cell in cells)
    lines = textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    return f"--[no-]{flag}" if value is True else f"--{flag}"


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, tuple):
        return " ".join(map(_default, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(name: str, kind: str, value: Any, doc: str) -> str:
    if "Positional" in kind:
        return f"  {name.upper():21s}{doc.split('. ')[0].rstrip('.')}"
    choices = kind.removeprefix("Literal[").split("]")[0] if kind.startswith("Literal[") else ""
    note = choices.replace("'", "").replace('"', "")
    if value is tyro.MISSING:
        note = "needed"
    elif default := _default(value):
        others = [choice for choice in note.split(", ") if choice not in ("", default)]
        note = f"default {default}" + (f"; or {', '.join(others)}" if others else "")
    note = f" ({note})" if note else ""
    first = doc.split(". ")[0].split(";")[0].rstrip(".")
    left = f"  {_flag(name, value):20s} "
    if isinstance(value, tuple) and len(left) + len(first) + len(note) > _WIDTH:
        note = f" (default: {len(value)} values)"
    return left + textwrap.shorten(first, _WIDTH - len(left) - len(note), placeholder="...") + note


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) else ""  # type: ignore[attr-defined]
            docs[field.target.id] = " ".join(text.split())
    return docs
