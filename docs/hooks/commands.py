"""Write the help of every `ggam-fast` command in the page that asks for it, from the command itself."""

import json
import os
import re
import subprocess
import sys
from typing import Any

MARK = "<!-- the help of every command -->"
FENCE = "``` {.text .help}"
# All of them in one process: torch is imported once.
PROGRAM = """
import contextlib, io, json, runpy, sys

def shown(*arguments):
    sys.argv = ["ggam-fast", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module("ggam_fast.training.cli", run_name="__main__", alter_sys=False)
    return out.getvalue()

first = shown("--help")
commands = [line.split()[1] for line in first.splitlines() if line.startswith("  ggam-fast ")]
texts = {name: [shown(name, "--help"), shown(name, "--help-all")] for name in commands}
print(json.dumps([first, texts]))
"""


def helps() -> tuple[str, dict[str, tuple[str, str]]]:
    """The first screen, and for each command the short help and the full one."""
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the help of ggam-fast ended with {run.returncode}:\n{run.stderr}")
    first, texts = json.loads(run.stdout)
    missing = [name for name, (short, full) in texts.items() if not (short.strip() and full.strip())]
    if missing or not texts:
        raise RuntimeError(f"ggam-fast shows no help for {missing or 'any command'}:\n{run.stderr}")
    return first, texts


def section(name: str, short: str, full: str) -> str:
    full = re.sub(r"\x1b\[[0-9;]*m", "", full)
    indented = "\n".join(f"    {line}".rstrip() for line in full.strip("\n").splitlines())
    return (
        f"### ggam-fast {name} --help\n\n{FENCE}\n{short.strip()}\n```\n\n"
        f'??? note "every option of {name} in full"\n\n    {FENCE}\n{indented}\n    ```\n'
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    if MARK not in markdown:
        return markdown
    first, texts = helps()
    parts = [section(name, short, full) for name, (short, full) in texts.items()]
    return markdown.replace(MARK, f"{FENCE}\n{first.strip()}\n```\n\n" + "\n".join(parts))
