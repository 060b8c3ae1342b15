"""What is wrong with a value that is being converted: problems, and the places where they are shown."""

from __future__ import annotations

from typing import Literal

import attrs
from cattrs.errors import AttributeValidationNote, BaseValidationError, ForbiddenExtraKeysError, IterableValidationNote

from sftk.errors import Problem, SpecError
from sftk.spec.document import KeyPath


@attrs.frozen
class Finding:
    """A problem, and the path whose place it is shown at (that of the key when `problem.path` is the mapping's)."""

    problem: Problem
    place: KeyPath = ()
    without: KeyPath | Literal["nothing"] | None = None
    """The key without which the rest can be read; None while it is not known, "nothing" when there is none."""

    def under(self, *prefix: str | int) -> Finding:
        """The finding as the value sees it that holds this one at `prefix`."""
        without = self.without if self.without in (None, "nothing") else (*prefix, *self.without)
        return Finding(self.problem.under(*prefix), (*prefix, *self.place), without)

    def stays(self) -> Finding:
        """The finding as one that leaving a key out does not mend, unless a key is known that does."""
        return self if self.without is not None else attrs.evolve(self, without="nothing")


class InvalidValue(ValueError):
    """A value that does not convert, with everything that is wrong with it."""

    def __init__(self, findings: list[Finding]):
        super().__init__("; ".join(finding.problem.message for finding in findings))
        self.findings = findings


CAUSED_BY_USER = (ValueError, TypeError, OverflowError, BaseValidationError, SpecError)
"""What a conversion raises for a wrong value."""


def findings_of(error: BaseException) -> list[Finding]:
    """The problems in an error of ours, of cattrs' own hooks, or of a hook or a validator that a caller wrote.

    Example:
        >>> [finding.problem.message for finding in findings_of(ValueError("steps must not decrease"))]
        ['steps must not decrease']
    """
    if isinstance(error, InvalidValue):
        return error.findings
    if isinstance(error, SpecError):
        return [Finding(problem, problem.path) for problem in error.problems]
    if isinstance(error, ForbiddenExtraKeysError):
        return [Finding(Problem(message=f"unknown key {key!r}"), (key,)) for key in sorted(error.extra_fields)]
    if isinstance(error, BaseValidationError):
        return [finding.under(*_noted(part)) for part in error.exceptions for finding in findings_of(part)]
    if isinstance(error, KeyError):
        return [Finding(Problem(message=f"missing key {error.args[0]!r}"))]
    message = str(error.args[0]) if error.args else type(error).__name__
    return [Finding(Problem(message=message))]


def _noted(error: BaseException) -> KeyPath:
    """Where cattrs says that a part of its error happened; a missing key is one of the mapping itself."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, IterableValidationNote):
            return (note.index,)
        if isinstance(note, AttributeValidationNote) and not isinstance(error, KeyError):
            return (note.name,)
    return ()
