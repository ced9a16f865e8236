"""Write the table of options in the page that asks for it, from the constructor of `GGAMHead`."""

import inspect
from typing import Any

import griffe

MARK = "<!-- the options of GGAMHead -->"


def descriptions(cls: type) -> dict[str, str]:
    """What the docstring's Args section says of each parameter."""
    sections = griffe.Docstring(inspect.getdoc(cls) or "", lineno=1).parse("google", warnings=False)
    found: dict[str, str] = {}
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.parameters:
            for entry in section.value:
                for name in entry.name.split(","):
                    found[name.strip()] = entry.description
    return found


def default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "needed"
    text = value.__name__ if isinstance(value, type) else repr(value)
    return f"`{text}`".replace("'", '"')


def table(cls: type) -> str:
    """A Markdown table, a row for each parameter of the constructor."""
    said = descriptions(cls)
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in said:
            raise KeyError(f"the docstring of {cls.__name__} says nothing of {name}")
        text = " ".join(said[name].split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {default(parameter.default)} | {text} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    if MARK not in markdown:
        return markdown
    import ggam_fast

    return markdown.replace(MARK, table(ggam_fast.GGAMHead))
