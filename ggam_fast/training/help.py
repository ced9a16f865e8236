"""Help that fits a screen: a command's examples, and one line an option."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from typing import Any

import tyro

_WIDTH = 118


def screen(command: str, doc: str, config: Any) -> str:
    """What `ggam-fast COMMAND --help` shows: `doc`, then every option of `config` with its default."""
    lines = [inspect.cleandoc(doc), ""]
    sections = [(f.name, getattr(config, f.name)) for f in fields(config)]
    if not all(is_dataclass(section) for _, section in sections):
        sections = [("options", config)]
    for name, section in sections:
        lines.append(f"{name}:")
        docs = _field_docs(type(section))
        lines += [_line(f.name, str(f.type), getattr(section, f.name), docs[f.name]) for f in fields(section)]
    lines += ["", f"ggam-fast {command} --help-all explains them in full."]
    return "\n".join(lines)


def _line(name: str, kind: str, value: Any, doc: str) -> str:
    if "Positional" in kind:
        return f"  {name.upper():24s}{doc.split('. ')[0].rstrip('.')}"
    flag = name.replace("_", "-")
    flag = f"[no-]{flag}" if value is True else flag
    notes = []
    if kind.startswith("Literal["):
        notes.append(kind.removeprefix("Literal[").split("]")[0].replace("'", "").replace('"', ""))
    if value is tyro.MISSING:
        notes.append("needed")
    elif value is not None and not isinstance(value, bool):
        notes.append(f"default {value:g}" if isinstance(value, float) else f"default {value}")
    note = f" ({'; '.join(notes)})" if notes else ""
    first = doc.split(". ")[0].split(";")[0].rstrip(".")
    left = f"  --{flag:22s}"
    return left + textwrap.shorten(first, _WIDTH - len(left) - len(note), placeholder="...") + note


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) else ""  # type: ignore[attr-defined]
            docs[field.target.id] = " ".join(text.split())
    return docs
