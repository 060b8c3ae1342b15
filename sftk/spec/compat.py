"""`compat: self_forcing`: every choice of the public code at once (see docs/concepts.md, "Where ours differs")."""

from __future__ import annotations

from typing import Any

COMPAT: dict[str, dict[str, Any]] = {
    "self_forcing": {
        "schedule": "table",
        "score_shift": 8.0,
        "context_gradient": "straight_through",
        "normalizer_guard": False,
        "attend_sink": False,
    },
}
"""Values that take the place of a spec's own defaults, for parameters of these names. What a recipe binds itself wins.

- `schedule: table`: sigmas from the 1000-entry shifted table; so the context is noised a little even at context_noise 0.
- `score_shift: 8`: the score models read flow with the sigma of another table than noise was added with.
- `context_gradient: straight_through`: a later block's gradient to cached keys and values reaches the earlier exit step.
- `normalizer_guard: false`: DMD's normaliser is unguarded, then NaN becomes 0.
- `attend_sink: false`: in training a window holds the last frames only.
"""


def compat_defaults(name: str | None) -> dict[str, Any]:
    """Defaults under a recipe's `compat`.

    Example:
        >>> compat_defaults("self_forcing")["schedule"], compat_defaults(None)
        ('table', {})
    """
    return dict(COMPAT[name]) if name is not None else {}
