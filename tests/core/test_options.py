from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sftk
from sftk.core.options import describe, describe_value, matches, option_problem
from sftk.functional import add_noise, plan_rollout

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner), max_leaves=6)

STRATEGIES: dict[Any, st.SearchStrategy] = {
    int: st.integers(),
    float: st.one_of(st.floats(), st.integers()),
    str: st.text(),
    bool: st.booleans(),
    None: st.none(),
    Literal["a", 1]: st.sampled_from(["a", 1]),
    tuple[float, ...]: st.lists(st.floats() | st.integers(), max_size=4) | st.tuples(st.integers()),
    tuple[float, float]: st.tuples(st.floats(), st.integers()),
    Sequence[int]: st.lists(st.integers(), max_size=4),
    list[str]: st.lists(st.text(max_size=2), max_size=3),
    Mapping[str, int]: st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    int | None: st.none() | st.integers(),
    tuple[int, ...] | None: st.none() | st.lists(st.integers(), max_size=3),
}


@pytest.mark.parametrize("annotation", STRATEGIES, ids=str)
@given(data=st.data())
def test_values_of_a_type_match_it(annotation, data):
    assert matches(data.draw(STRATEGIES[annotation]), annotation)
    assert matches(data.draw(values), Any)


@given(value=values)
def test_scalars_are_never_converted(value):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    assert matches(value, int) is (type(value) is int)
    assert matches(value, float) is number
    assert matches(value, bool) is isinstance(value, bool)
    assert matches(value, str) is isinstance(value, str)
    assert matches(value, type(None)) is (value is None)
    assert matches(value, float | None) is (number or value is None)
    assert matches(value, Sequence[Any]) is isinstance(value, (list, tuple))


@given(value=st.lists(scalars, max_size=4))
def test_lists_match_member_by_member(value):
    assert matches(value, tuple[int, ...]) is all(type(v) is int for v in value)
    assert matches(value, tuple[float, float]) is (len(value) == 2 and all(matches(v, float) for v in value))


def test_literals_tell_1_from_true():
    assert not matches(True, Literal[1])
    assert not matches(1.0, Literal[1])
    assert matches(1, Literal[1])
    assert not matches("abc", Sequence[str])


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "an integer"),
        (float | None, "a number or null"),
        (bool, "true or false"),
        (Literal["a", "b"], "one of 'a', 'b'"),
        (tuple[float, float], "a list of 2 numbers"),
        (tuple[int, ...], "a list of integers"),
        (Sequence[float], "a list of numbers"),
        (Mapping[str, int], "a mapping"),
        (tuple[float, float] | None, "a list of 2 numbers or null"),
    ],
)
def test_descriptions(annotation, words):
    assert describe(annotation) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "the boolean true"),
        (3, "the integer 3"),
        (3.5, "the number 3.5"),
        ((1, 2), "the list [1, 2]"),
        ({"a": 1}, "the mapping {'a': 1}"),
        (None, "null"),
        ("x" * 200, "the string '" + "x" * 79),
    ],
)
def test_descriptions_of_values(value, words):
    assert describe_value(value) == words


def test_problems_name_option_and_transform():
    assert option_problem(add_noise, "shift", 5) is None
    assert option_problem(add_noise, "schedule", "tabel") == (
        "the option 'schedule' of add_noise takes one of 'continuous', 'table', found the string 'tabel'"
    )
    assert option_problem(plan_rollout, "steps", [1000, "750"]) == (
        "the option 'steps' of plan_rollout takes a list of numbers, found the list [1000, '750']"
    )
    assert option_problem(plan_rollout, "grad_frames", True) == (
        "the option 'grad_frames' of plan_rollout takes an integer or null, found the boolean true"
    )


def test_every_default_and_example_passes_its_own_check():
    import inspect

    import torch

    for op in sftk.transforms().values():
        example = op.example(2, torch.randn)
        for name, parameter in op.options.items():
            if parameter.default is not inspect.Parameter.empty:
                assert option_problem(op, name, parameter.default) is None
            if name in example:
                assert option_problem(op, name, example[name]) is None
        if op.check is not None:
            assert list(op.check(op.complete(example), None)) == []
