"""YAML 1.2's core schema: its tags, and what a plain scalar stands for."""

from __future__ import annotations

import math
import re
from typing import Any

TAG = "tag:yaml.org,2002:"
"""What the tags of YAML begin with; `!!str` is short for it and `str`."""
CORE_TAGS = {"str": str, "int": int, "float": (int, float), "bool": bool, "null": type(None)}
"""The scalars' tags, without `TAG`, and the types that their values may have."""
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_INTEGERS = ((re.compile(r"[-+]?[0-9]+"), 10), (re.compile(r"0o[0-7]+"), 8), (re.compile(r"0x[0-9a-fA-F]+"), 16))
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def resolve_scalar(text: str) -> Any:
    """The value of a plain scalar in the YAML 1.2 core schema.

    Raises:
        ValueError: a number is too long or too large.

    Example:
        >>> resolve_scalar("1e-4"), resolve_scalar("0x1f"), resolve_scalar("on"), resolve_scalar("~")
        (0.0001, 31, 'on', None)
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for pattern, base in _INTEGERS:
        if pattern.fullmatch(text):
            if len(text) > 4000:
                raise ValueError(f"a number of {len(text)} digits is too long")
            return int(text, base)
    if _FLOAT.fullmatch(text):
        if math.isinf(float(text)):
            raise ValueError(f"{text} is too large for a number; write .inf if infinity is meant")
        return float(text)
    return text


def is_string(text: str) -> bool:
    """Whether a plain scalar is a string, which is what does not match anything else.

    Example:
        >>> is_string("on"), is_string("012")
        (True, False)
    """
    return text not in _CONSTANTS and not any(kind.fullmatch(text) for kind in (_FLOAT, *(kind for kind, _ in _INTEGERS)))


def number_text(value: float) -> str:
    """A number as readers of YAML 1.1 and 1.2 both take it for one.

    Example:
        >>> number_text(3), number_text(1e-5), number_text(float("-inf"))
        ('3', '1.0e-05', '-.inf')
    """
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    mantissa, exponent, power = repr(value).partition("e")
    return mantissa + (".0" if exponent and "." not in mantissa else "") + exponent + power
