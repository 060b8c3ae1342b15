"""Several clips on one page: captioned grids that move, and contact sheets that do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sftk.errors import ShapeError
from sftk.runtime.captions import font, text_height, text_width, wrap
from sftk.runtime.media import Frames, complete_file, even, magnify, rgb

_INK, _FAINT, _PAPER = (28, 30, 33), (120, 124, 130), (255, 255, 255)
_GAP = 8


def video_grid(rows: Sequence[tuple[str, Sequence[Frames]]], columns: Sequence[str]) -> np.ndarray:
    """Clips in a captioned grid, to compare methods on the same prompts.

    Args:
        rows: for each prompt, its text and one clip for each column; clips that end early hold their last frame.
        columns: the names above the columns (methods, say).

    Returns:
        [F, H, W, 3], uint8, even H and W; F is that of the longest clip.

    Raises:
        ShapeError: a row has not one clip for each column.

    Example:
        >>> clip = np.zeros((4, 16, 16), np.uint8)
        >>> video_grid([("a 3 moving left", [clip, clip])], columns=["teacher", "student"]).shape[0]
        4
    """
    for prompt, clips in rows:
        if len(clips) != len(columns):
            raise ShapeError(f"row {prompt!r} has {len(clips)} clips for {len(columns)} columns; expected one for each")
    if not rows or not columns:
        raise ShapeError("a video grid needs at least one row and one column")
    cells = [[_fit(rgb(clip), low=128, high=320) for clip in clips] for _, clips in rows]
    cell_h, cell_w = (max(clip.shape[axis] for row in cells for clip in row) for axis in (1, 2))
    labels = [wrap(prompt, width=150) for prompt, _ in rows]
    names = [wrap(name, width=cell_w) for name in columns]
    left = _GAP + max((text_width(label) + _GAP for label in labels if label), default=0)
    top = _GAP + max((text_height(name) + _GAP for name in names if name), default=0)
    pitch_h = max(cell_h, *(text_height(label) for label in labels)) + _GAP

    canvas = Image.new("RGB", (left + len(columns) * (cell_w + _GAP), top + len(rows) * pitch_h), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(names):
        above = top - text_height(name) - _GAP // 2
        draw.text((left + index * (cell_w + _GAP), above), name, _INK, font=font(), spacing=2)
    for index, label in enumerate(labels):
        draw.text((_GAP, top + index * pitch_h), label, _INK, font=font(), spacing=2)
    longest = max(len(clip) for row in cells for clip in row)
    grid = np.repeat(np.asarray(canvas)[None], longest, axis=0)
    for r, row in enumerate(cells):
        for c, clip in enumerate(row):
            y, x = top + r * pitch_h, left + c * (cell_w + _GAP)
            held = np.minimum(np.arange(longest), len(clip) - 1)
            grid[:, y : y + clip.shape[1], x : x + clip.shape[2]] = clip[held]
    return even(grid)


def contact_sheet(path: str | Path, rows: Sequence[tuple[str, Frames]], columns: int = 11, title: str | None = None) -> Path:
    """A PNG with one row of evenly picked frames for each clip, the first and the last frame among them.

    Args:
        path: the file; its folder is created.
        rows: label and frames of each clip. The numbers of the picked frames, from 0, stand above the rows they hold for.
        columns: the most frames that a row shows.
        title: a heading.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sheet.png"
        >>> contact_sheet(path, [("a 3 moving left", np.zeros((21, 16, 16), np.uint8))]).name
        'sheet.png'
    """
    if not rows or columns < 1:
        raise ShapeError("a contact sheet needs at least one row and one column")
    picks = [np.unique(np.linspace(0, len(frames) - 1, columns).round().astype(int)) for _, frames in rows]
    cells = [_fit(rgb(frames)[pick], low=64, high=160) for (_, frames), pick in zip(rows, picks, strict=True)]
    labels = [wrap(label, width=180) for label, _ in rows]
    left = 2 * _GAP + max((text_width(label) + _GAP for label in labels if label), default=0)
    width = left + max(len(cell) * (cell.shape[2] + _GAP // 2) for cell in cells) + _GAP
    heading = wrap(title or "", width=width - 4 * _GAP, size=18)
    numbers_above = [index == 0 or not np.array_equal(picks[index], picks[index - 1]) for index in range(len(rows))]
    heights = [
        max(cell.shape[1], text_height(label)) + _GAP // 2 + (22 if numbered else 0)
        for cell, label, numbered in zip(cells, labels, numbers_above, strict=True)
    ]
    top = 2 * _GAP + (text_height(heading, size=18) + _GAP if heading else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * _GAP, _GAP + 2), heading, _INK, font=font(18))
    y = top
    for cell, label, pick, numbered, height in zip(cells, labels, picks, numbers_above, heights, strict=True):
        inset = 22 if numbered else 0
        draw.text((2 * _GAP, y + inset), label, _INK, font=font(), spacing=2)
        for index, image in enumerate(cell):
            x = left + index * (cell.shape[2] + _GAP // 2)
            sheet.paste(Image.fromarray(image), (x, y + inset))
            if numbered:
                draw.text((x + cell.shape[2] / 2, y + 19), str(pick[index]), _FAINT, font=font(11), anchor="ms")
        y += height
    with complete_file(path) as part:
        sheet.save(part, "PNG")
    return Path(path)


def _fit(clip: np.ndarray, low: int, high: int) -> np.ndarray:
    """The clip with its shorter side at least `low` (whole magnification) and at most `high` (resampled down)."""
    short = min(clip.shape[1:3])
    if short <= high:
        return magnify(clip, None, low)
    size = (round(clip.shape[2] * high / short), round(clip.shape[1] * high / short))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in clip])
