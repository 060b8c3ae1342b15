"""A key whose exit steps are chosen, for counting and measuring what each of them costs."""

from __future__ import annotations

import attrs

from sftk.functional.keys import Key


@attrs.frozen(kw_only=True)
class ExitKey(Key):
    """A key whose draws named `exit` give `exit_index` (or the last entry, where there are fewer).

    All other integers are the largest of their range. Tensors are drawn as by any other key.

    Args:
        exit_index: place in the step list.
        choices: to which each draw named `exit` appends how many entries it chose from.

    Example:
        >>> key = ExitKey(seed=0, exit_index=2)
        >>> key.integers("exit", 0, 4, 2), key.integers("length", 1, 4, 1), key.choices
        ((2, 2), (3,), [4])
    """

    exit_index: int = 0
    choices: list[int] = attrs.field(factory=list, eq=False)

    def integers(self, name: str, low: int, high: int, count: int) -> tuple[int, ...]:
        """The chosen exit step, or the largest number."""
        if name != "exit":
            return (high - 1,) * count
        self.choices.append(high - low)
        return (min(low + self.exit_index, high - 1),) * count
