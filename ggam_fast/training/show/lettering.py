"""Names that users chose, as text that a figure can draw: in letters of a font, and no longer than fits."""

from __future__ import annotations

import logging
from functools import cache, lru_cache

import matplotlib
from anyascii import anyascii
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

logger = logging.getLogger(__name__)

_POINTS = 72.0  # in an inch
_LAST_RESORT = "Last Resort"  # it has a box for every letter
_MISSING = "?"


def literal(text: str) -> str:
    """`text` in letters that can be drawn, with escaped dollar signs.

    matplotlib would typeset text between dollar signs as mathematics. If another font of this machine has
    the letters, figures use it for them. Letters that no font has are written in Latin letters.
    """
    return drawable(text).replace("$", r"\$")


def fitted(text: str, inches: float, size: float, *, weight: str = "normal", lines: int = 1) -> str:
    """`literal(text)` in at most `lines` lines of `inches`, with letters of `size` points.

    What does not fit is left out in the middle, because names that begin alike often end differently.
    """
    text = drawable(text)

    def wrapped(kept: int) -> list[str]:
        head, tail = text[: (kept + 1) // 2].rstrip(), text[len(text) - kept // 2 :].lstrip()
        return _wrap(text if kept >= len(text) else f"{head}…{tail}", inches, size, weight)

    least, most = 0, len(text)
    while least < most:
        kept = (least + most + 1) // 2
        least, most = (kept, most) if len(wrapped(kept)) <= lines else (least, kept - 1)
    return "\n".join(wrapped(least)).replace("$", r"\$")


def drawable(text: str) -> str:
    """`text` on one line, in letters that a font of this machine has."""
    text = " ".join(text.encode(errors="replace").decode().split())
    return "".join(letter if _font_of(letter) is not None else _latin(letter) for letter in text)


def width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of a line of text, with letters of `size` points."""
    points, _, _ = _renderer().get_text_width_height_descent(
        text, FontProperties(size=size, weight=weight), ismath=False
    )
    return points / _POINTS


def _wrap(text: str, inches: float, size: float, weight: str) -> list[str]:
    """Lines no wider than `inches`. They break at spaces, or else within words."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if width(longer, size, weight) <= inches:
            lines[-1] = longer
            continue
        rest = word if lines[-1] else longer
        if not lines[-1]:
            lines.pop()
        while width(rest, size, weight) > inches and len(rest) > 1:
            fits = len(rest) - 1
            while fits > 1 and width(rest[:fits], size, weight) > inches:
                fits -= 1
            lines.append(rest[:fits])
            rest = rest[fits:]
        lines.append(rest)
    return lines


@cache
def _font_of(letter: str) -> str | None:
    """The family that draws `letter`, or None. A family that figures lack so far is added to theirs."""
    if ord(letter) in _letters(findfont(FontProperties())):
        return matplotlib.rcParams["font.family"][0]
    fonts = [font for font in fontManager.ttflist if _LAST_RESORT not in font.name and font.style == "normal"]
    # Sans serif first, in its usual weight.
    for font in sorted(fonts, key=lambda one: ("Sans" not in one.name, one.weight != 400, one.name)):
        if ord(letter) in _letters(font.fname):
            families = matplotlib.rcParams["font.family"]
            if font.name not in families:
                matplotlib.rcParams["font.family"] = [*families, font.name]
            return font.name
    return None


@cache
def _letters(path: str) -> frozenset[int]:
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a damaged font
        return frozenset()


def _latin(letter: str) -> str:
    latin = anyascii(letter) or _MISSING
    _say_once(letter, latin)
    return latin


_said: list[str] = []


def _say_once(letter: str, latin: str) -> None:
    if not _said:
        _said.append(letter)
        logger.info(
            f"no font of this machine has the letter {letter}, so figures write it as {latin}, and likewise "
            "for others; install a font of its script, such as Noto Sans, to see them"
        )


@lru_cache(maxsize=1)
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, _POINTS)
