"""Let pages link to files of the repository outside docs/, as they do when they are read there.

Such a file becomes part of the site, under repository/: Markdown as a page whose own links are followed in
the same way, text as a page that shows it, and anything else, such as a picture, as it is.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
SHOWN = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml"}
PREFIX = "repository"


def repository_path(uri: str) -> str:
    """Where a page of the site stands in the repository."""
    return uri.removeprefix(f"{PREFIX}/") if uri.startswith(f"{PREFIX}/") else f"docs/{uri}"


def linked(uri: str, link: str) -> str | None:
    """The file of the repository that a page links to; None where mkdocs follows the link itself."""
    here = posixpath.dirname(repository_path(uri))
    # The block of tables may name files from the root.
    for path in (posixpath.normpath(posixpath.join(here, link)), posixpath.normpath(link)):
        if path.startswith("..") or not (ROOT / path).is_file():
            continue
        # mkdocs follows a page's own links within docs/.
        return None if path.startswith("docs/") and not uri.startswith(f"{PREFIX}/") else path
    return None


def uri_of(path: str) -> str:
    """Where a file of the repository stands in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{PREFIX}/{path}.md" if Path(path).suffix in SHOWN else f"{PREFIX}/{path}"


def generated(path: str, config: MkDocsConfig) -> File:
    source, language = ROOT / path, SHOWN.get(Path(path).suffix)
    if language is None:
        return File.generated(config, uri_of(path), abs_src_path=str(source))
    text = f"# {path}\n\n```{language}\n{source.read_text()}\n```\n"
    return File.generated(config, uri_of(path), content=text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        if posixpath.splitext(page.src_uri.removesuffix(".md"))[1] in SHOWN:
            continue
        for link, _ in LINK.findall(page.content_string):
            path = linked(page.src_uri, link)
            if path is None or files.get_file_from_path(uri_of(path)):
                continue
            new = generated(path, config)
            files.append(new)
            if new.src_uri.endswith(".md"):
                waiting.append(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    uri = page.file.src_uri
    if posixpath.splitext(uri.removesuffix(".md"))[1] in SHOWN:
        return markdown

    def moved(match: re.Match[str]) -> str:
        path = linked(uri, match[1])
        if path is None:
            return match[0]
        relative = posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".")
        return f"]({relative}{match[2] or ''})"

    return LINK.sub(moved, markdown)
