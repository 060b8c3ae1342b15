"""Errors that a user can cause. Each names the place, what was found, what was expected and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import attrs


@attrs.frozen(kw_only=True)
class Problem:
    """One mistake in a recipe or a graph.

    Args:
        path: where it is, as keys and indices from the document's root: `("phases", 0, "with")`.
        message: what was found and what was expected, in one sentence without a full stop.
        hint: the fix, shown after a semicolon.
        file: the file that holds the mistake, when it came from one.
        line: its line there, counted from 1.
        missing: it is about a key that nobody writes (which a graph with an unknown node cannot know).

    Example:
        >>> print(Problem(path=("phases", 0, "with"), message="unknown key 'ts_shedule'", hint="did you mean 'ts_schedule'?"))
        unknown key 'ts_shedule' @ $.phases[0].with; did you mean 'ts_schedule'?
    """

    path: tuple[str | int, ...] = ()
    message: str
    hint: str | None = None
    file: str | None = None
    line: int | None = None
    missing: bool = False

    def under(self, *prefix: str | int) -> Problem:
        """The same problem, seen from a document in which this one sits at `prefix`."""
        return attrs.evolve(self, path=(*prefix, *self.path))

    def __str__(self) -> str:
        place = f" ({self.file}:{self.line})" if self.file and self.line else f" ({self.file})" if self.file else ""
        where = f" @ {format_path(self.path)}{place}" if self.path or place else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.message}{where}{hint}"


class SftkError(Exception):
    """Base of every error that a user can cause."""


class SpecError(SftkError):
    """A recipe, a spec, an override or a graph is wrong. Holds every problem that was found, not only the first.

    Example:
        >>> error = SpecError([Problem(path=("a",), message="no such key"), Problem(path=("b",), message="not a number")])
        >>> len(error.problems)
        2
    """

    def __init__(self, problems: Iterable[Problem] | str):
        self.problems = (Problem(message=problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ShapeError(SftkError, ValueError):
    """A tensor's axes or sizes are not those that a function documents."""


class DataError(SftkError):
    """A data file or a record in it cannot be used."""


class CheckpointError(SftkError):
    """A checkpoint or a weight file is missing, broken or of another model."""


class NonFiniteError(SftkError):
    """A loss, a gradient or a state became NaN or infinite."""


class DistributedError(SftkError):
    """The processes of a run do not find each other, or one of them stopped answering."""


def format_path(path: Iterable[str | int]) -> str:
    """A path in the form that errors show.

    Example:
        >>> format_path(("phases", 0, "with", "steps"))
        '$.phases[0].with.steps'
    """
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def did_you_mean(word: str, known: Iterable[str], listed: int = 12) -> str | None:
    """A hint for a misspelt word: the nearest known one, or the list when nothing is near and it has at most `listed` words.

    Example:
        >>> did_you_mean("ts_shedule", ["ts_schedule", "shift"])
        "did you mean 'ts_schedule'?"
        >>> did_you_mean("zzz", ["a", "b"])
        "expected one of 'a', 'b'"
    """
    options = sorted(set(known))
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if 0 < len(options) <= listed:
        return "expected one of " + ", ".join(repr(option) for option in options)
    return None
