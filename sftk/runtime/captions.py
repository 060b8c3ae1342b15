"""Text drawn into pictures: one font, wrapped to a width in pixels."""

from __future__ import annotations

import math
import os
from functools import lru_cache

from PIL import ImageFont


@lru_cache
def font(size: int = 14) -> ImageFont.FreeTypeFont:
    """Matplotlib's sans-serif: Pillow's own lacks most letters beyond English.

    Example:
        >>> font(11).size
        11
    """
    from matplotlib import get_data_path

    return ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def wrap(text: str, width: int, size: int = 14, lines: int = 4) -> str:
    """The text broken at spaces to fit a width in pixels; what exceeds `lines`, or a word too wide, ends in an ellipsis.

    Its own line breaks stay.

    Example:
        >>> wrap("a 3 moving left\\nteacher", width=60).split("\\n")
        ['a 3', 'moving', 'left', 'teacher']
    """
    face, out = font(size), []
    for paragraph in text.split("\n"):
        out.append("")
        for word in paragraph.split():
            joined = f"{out[-1]} {word}".strip()
            if out[-1] and face.getlength(joined) > width:
                out.append(word)
            else:
                out[-1] = joined
    if len(out) > lines:
        out = [*out[: lines - 1], out[lines - 1] + " …"]
    for index, line in enumerate(out):
        while face.getlength(line) > width and len(line) > 1:
            line = line.rstrip("… ")[:-1] + "…"
        out[index] = line
    return "\n".join(out)


def text_width(text: str, size: int = 14) -> int:
    """Pixels that the widest line takes.

    Example:
        >>> text_width("") == 0 < text_width("i") < text_width("m")
        True
    """
    return math.ceil(max(font(size).getlength(line) for line in text.split("\n")))


def text_height(text: str, size: int = 14) -> int:
    """Pixels that the lines take.

    Example:
        >>> text_height(""), text_height("one"), text_height("one\\ntwo")
        (0, 19, 38)
    """
    return (text.count("\n") + 1) * (size + 5) if text else 0
