"""Prompts of the moving digits, "a 3 moving left", and their embeddings from a fixed table."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sftk.errors import DataError, did_you_mean

DIRECTIONS = ("left", "right", "up", "down")
PROMPT_SHAPE = (4, 32)
"""Tokens of a prompt and their width: two tokens for the digit, two for the direction."""

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FORM = re.compile(r"(?:(?:an?|the) )?(?:(?:digit|number) )?(\S+) moving (?:to the )?(\S+?)(?:wards?)?[.!]?")
_EXPECTED = "expected 'a <digit> moving <direction>', such as 'a 3 moving left'"


def prompt_text(digit: int, direction: int | str) -> str:
    """The prompt of a digit in 0..9 and a direction (a name, or an index into `DIRECTIONS`).

    Raises:
        DataError: no such digit or direction.

    Example:
        >>> prompt_text(3, "left"), prompt_text(8, 2)
        ('a 3 moving left', 'an 8 moving up')
    """
    names = dict(enumerate(DIRECTIONS)) | {name: name for name in DIRECTIONS}
    if digit not in range(10) or direction not in names:
        known = ", ".join(DIRECTIONS)
        raise DataError(f"no clip shows digit {digit!r} moving {direction!r}; expected 0 to 9 and one of {known}")
    return f"{'an' if digit == 8 else 'a'} {int(digit)} moving {names[direction]}"


def parse_prompt(prompt: str) -> tuple[int, str]:
    """The digit and the direction that a prompt asks for; case and white space are free, and digits may be words.

    Raises:
        DataError: the prompt has another form, or names an unknown digit or direction.

    Example:
        >>> parse_prompt("a 3 moving left"), parse_prompt("  Three   moving UPWARDS ")
        ((3, 'left'), (3, 'up'))
        >>> parse_prompt("a 3 moving lefft")
        Traceback (most recent call last):
        sftk.errors.DataError: prompt 'a 3 moving lefft' has direction 'lefft'; did you mean 'left'? (expected ...)
    """
    words = " ".join(prompt.lower().split())
    match = _FORM.fullmatch(words)
    if match is None:
        likely = did_you_mean(words, [prompt_text(digit, name) for digit in range(10) for name in DIRECTIONS])
        raise DataError(f"cannot read prompt {prompt!r}; {_EXPECTED}" + (f"; {likely}" if likely else ""))
    digits = {str(value): value for value in range(10)} | {word: value for value, word in enumerate(_WORDS)}
    digit, direction = match.groups()
    for found, kind, known in ((digit, "digit", digits), (direction, "direction", DIRECTIONS)):
        if found not in known:
            hint = did_you_mean(found, known) or "expected 0 to 9 or 'zero' to 'nine'"
            raise DataError(f"prompt {prompt!r} has {kind} {found!r}; {hint} ({_EXPECTED})")
    return digits[digit], direction


def embed_prompts(
    prompts: Sequence[str], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Prompt embeddings from a fixed table: rows of a Hadamard matrix, so that any two tokens are orthogonal.

    Args:
        prompts: B prompts, as `parse_prompt` reads them; "" is the unconditional one and gives zeros.
        device: where the result lies.
        dtype: its type; entries are -1, 0 or 1 in all of them.

    Returns:
        [B, 4, 32]: two tokens of the digit, then two of the direction.

    Raises:
        DataError: a prompt cannot be read.

    Example:
        >>> embeds = embed_prompts(["a 3 moving left", ""])
        >>> embeds.shape, (embeds[0] @ embeds[0].T).diag().tolist(), embeds[1].any().item()
        (torch.Size([2, 4, 32]), [32.0, 32.0, 32.0, 32.0], False)
    """
    if isinstance(prompts, str):
        raise DataError(f"prompts is the string {prompts!r}; expected a sequence of prompts: [{prompts!r}]")
    rows = [parse_prompt(prompt) if prompt.strip() else None for prompt in prompts]
    table = prompt_table()
    empty = torch.zeros(PROMPT_SHAPE)
    embeds = [empty if row is None else table[row[0], DIRECTIONS.index(row[1])] for row in rows]
    return torch.stack(embeds).to(device=device, dtype=dtype) if embeds else empty.new_zeros(0, *PROMPT_SHAPE)


@functools.cache
def prompt_table() -> Tensor:
    """Tokens of every digit and direction, [10, 4, 4, 32] float32, entries -1 or 1. Not to be written to.

    They are rows 1 to 28 of the Hadamard matrix of order 32 (row 0 is constant).

    Example:
        >>> prompt_table()[0, 0, 0, :4].tolist()
        [1.0, -1.0, 1.0, -1.0]
    """
    hadamard = torch.ones(1, 1)
    for _ in range(5):
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    digits, directions = hadamard[1:21].view(10, 1, 2, 32), hadamard[21:29].view(1, 4, 2, 32)
    return torch.cat((digits.expand(10, 4, 2, 32), directions.expand(10, 4, 2, 32)), dim=2)
