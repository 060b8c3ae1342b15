from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NewType

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftk.errors import Problem, SpecError
from sftk.spec.convert import structure, unstructure
from sftk.spec.document import Document
from sftk.spec.dump import dump_yaml
from sftk.spec.hooks import make_converter
from sftk.spec.overrides import apply_overrides
from sftk.spec.source import parse_yaml

Seed = NewType("Seed", int)


class Precision(enum.Enum):
    BF16 = "bf16"
    FP32 = "fp32"


class Mode(enum.StrEnum):
    PLAIN = "graph"
    REPLAY = "replay"


@attrs.frozen(kw_only=True)
class Node:
    use: str
    with_: Mapping[str, Any] = attrs.field(factory=dict)
    in_: dict[str, str] = attrs.field(factory=dict)
    grad: bool = True


@attrs.frozen(kw_only=True)
class Phase:
    name: str
    update: tuple[str, ...] | str
    every: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    clip: float | None = None
    window: tuple[int, int] | None = None
    nodes: tuple[Node, ...] = ()
    backward: Literal["graph", "replay"] = "graph"


def increasing(instance, attribute, value):
    if list(value) != sorted(value):
        raise ValueError("steps must not decrease")


@attrs.frozen(kw_only=True)
class Recipe:
    version: Literal[1]
    phases: tuple[Phase, ...]
    train: str
    steps: tuple[float, ...] = attrs.field(default=(), validator=increasing)
    lr: float | str = 1e-4
    precision: Precision = Precision.BF16


@attrs.frozen(kw_only=True)
class Pair:
    low: int = attrs.field(validator=attrs.validators.ge(0))
    high: int = attrs.field(validator=attrs.validators.ge(0))

    @high.validator
    def _above(self, attribute, value):
        if value < self.low:
            raise ValueError(f"high is below low, {self.low}")


@attrs.frozen(kw_only=True)
class Converted:
    size: int = attrs.field(default=1, converter=attrs.Converter(lambda size: size * 2), validator=attrs.validators.le(10))
    kind: str = attrs.field(default="a", converter=str.upper, validator=attrs.validators.in_(("A", "B")))


@dataclasses.dataclass
class Own:
    a: int
    b: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Checked:
    a: int = 0
    b: int = 0

    def __attrs_post_init__(self):
        if self.a + self.b > 3:
            raise ValueError("a and b are too large together")


@attrs.frozen(kw_only=True)
class Tree:
    children: tuple[Tree, ...] = ()
    payload: Pair | Node | None = None


def errors(value, cls):
    document = value if isinstance(value, Document) else Document(value=value, file="f")
    with pytest.raises(SpecError) as caught:
        structure(document, cls)
    return [str(problem) for problem in caught.value.problems]


GOOD = """\
version: 1
train: data
lr: 1e-4
steps: [0, 500]
precision: fp32
phases:
  - {name: generator, update: [generator], clip: 10, window: [3, 9]}
  - name: critic
    update: fake_score
    backward: replay
    nodes:
      - {use: add_noise, with: {any: [1, {b: null}]}, in: {noise: x}, grad: false}
"""


def test_a_good_recipe():
    recipe = structure(parse_yaml(GOOD, "dmd.yaml"), Recipe)
    assert recipe == Recipe(
        version=1,
        train="data",
        lr=1e-4,
        steps=(0.0, 500.0),
        precision=Precision.FP32,
        phases=(
            Phase(name="generator", update=("generator",), clip=10.0, window=(3, 9)),
            Phase(
                name="critic",
                update="fake_score",
                backward="replay",
                nodes=(Node(use="add_noise", with_={"any": [1, {"b": None}]}, in_={"noise": "x"}, grad=False),),
            ),
        ),
    )
    assert type(recipe.phases[0].clip) is float
    assert type(recipe.steps[0]) is float
    assert structure(parse_yaml(dump_yaml(unstructure(recipe)), "again"), Recipe) == recipe


def test_every_problem_of_the_tree_at_once_with_its_line():
    text = """\
version: 2
steps: [500, 0]
lr: [1]
trainn: data
phases:
  - name: generator
    update: [generator, 3]
    every: 0
    clip: "10"
    ts_shedule: true
  - update: x
    window: [1, 2, 3]
    backward: repley
    nodes:
      - use: 7
        with: [a]
        in: {noise: 1,
             other: null}
        grad: "false"
      - just a string
"""
    assert errors(parse_yaml(text, "dmd.yaml"), Recipe) == [
        "expected 1, found the integer 2 @ $.version (dmd.yaml:1)",
        "missing key 'train' @ $ (dmd.yaml:1)",
        "steps must not decrease @ $.steps (dmd.yaml:2)",
        "expected a number or a string, found a list @ $.lr (dmd.yaml:3)",
        "unknown key 'trainn' @ $ (dmd.yaml:4); did you mean 'train'?",
        "expected a string, found the integer 3 @ $.phases[0].update[1] (dmd.yaml:7)",
        "'every' must be >= 1: 0 @ $.phases[0].every (dmd.yaml:8)",
        'expected a number or null, found the string "10" @ $.phases[0].clip (dmd.yaml:9)',
        "unknown key 'ts_shedule' @ $.phases[0] (dmd.yaml:10); "
        "expected one of 'backward', 'clip', 'every', 'name', 'nodes', 'update', 'window'",
        "missing key 'name' @ $.phases[1] (dmd.yaml:11)",
        "expected a list of 2 items, found a list of 3 items @ $.phases[1].window (dmd.yaml:12)",
        'expected one of "graph", "replay", found the string "repley" @ $.phases[1].backward (dmd.yaml:13); '
        "did you mean 'replay'?",
        "expected a string, found the integer 7 @ $.phases[1].nodes[0].use (dmd.yaml:15)",
        "expected a mapping, found a list @ $.phases[1].nodes[0].with (dmd.yaml:16)",
        "expected a string, found the integer 1 @ $.phases[1].nodes[0].in.noise (dmd.yaml:17)",
        "expected a string, found null @ $.phases[1].nodes[0].in.other (dmd.yaml:18)",
        'expected a boolean, found the string "false" @ $.phases[1].nodes[0].grad (dmd.yaml:19)',
        'expected a mapping, found the string "just a string" @ $.phases[1].nodes[1] (dmd.yaml:20)',
    ]


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "expected an integer, found the boolean true"),
        (3.7, int, "expected an integer, found the number 3.7"),
        (3.0, int, "expected an integer, found the number 3.0"),
        ("3", int, 'expected an integer, found the string "3"'),
        (None, int, "expected an integer, found null"),
        (False, float, "expected a number, found the boolean false"),
        ("1e-4", float, 'expected a number, found the string "1e-4"'),
        (10**400, float, "int too large to convert to float"),
        (3, str, "expected a string, found the integer 3"),
        (None, str, "expected a string, found null"),
        ("false", bool, 'expected a boolean, found the string "false"'),
        (0, bool, "expected a boolean, found the integer 0"),
        ("ab", tuple[str, ...], 'expected a list, found the string "ab"'),
        ({"a": 1}, tuple[str, ...], "expected a list, found a mapping"),
        ("ab", list[str], 'expected a list, found the string "ab"'),
        ("ab", frozenset[str], 'expected a list, found the string "ab"'),
        ("ab", Sequence[str], 'expected a list, found the string "ab"'),
        ([], dict, "expected a mapping, found a list"),
        ([1], tuple[int, int], "expected a list of 2 items, found a list of 1 item"),
        (True, Literal[1], "expected 1, found the boolean true"),
        (1.0, Literal[1, "a"], 'expected one of 1, "a", found the number 1.0'),
        (True, int | None, "expected an integer or null, found the boolean true"),
        (True, float | str, "expected a number or a string, found the boolean true"),
        (1, str | dict, "expected a string or a mapping, found the integer 1"),
        ("atuo", Literal["auto"] | float, 'expected "auto" or a number, found the string "atuo"'),
        ("x", Precision, 'expected one of "bf16", "fp32", found the string "x"'),
        ([], Mode, 'expected one of "graph", "replay", found a list'),
        (1, type(None), "expected null, found the integer 1"),
        ("1", Seed, 'expected an integer, found the string "1"'),
        ("1", Annotated[int, "doc"], 'expected an integer, found the string "1"'),
        (1, Node, "expected a mapping, found the integer 1"),
        (None, Checked, "expected a mapping, found null"),
        ({"a": 2, "b": 2}, Checked, "a and b are too large together"),
    ],
)
def test_wrong_types(value, kind, message):
    (found,) = errors(value, kind)
    assert found.split(" @ $ (f)")[0] == message


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        (3, float, 3.0),
        (math.inf, float, math.inf),
        (3, float | int, 3),
        (3, int | float, 3),
        (3, float | str, 3.0),
        ("3", float | str, "3"),
        (["a"], tuple[str, ...] | str, ("a",)),
        ("a", tuple[str, ...] | str, "a"),
        (["a"], tuple[int, ...] | tuple[str, ...], ("a",)),
        ({"a": 1}, str | dict, {"a": 1}),
        ({"a": [1]}, Mapping[str, tuple[float, ...]], {"a": (1.0,)}),
        ([1, "a"], tuple, (1, "a")),
        ([1, 2.0], tuple[float, int] | tuple[int, float], (1, 2.0)),
        ([1, 2], list[float], [1.0, 2.0]),
        ([1, 1], frozenset[int], frozenset({1})),
        ([1], Sequence[int], (1,)),
        (None, int | None, None),
        ("replay", Mode, Mode.REPLAY),
        ("auto", Literal["auto"] | float, "auto"),
        ({"a": [None]}, Any, {"a": [None]}),
        ([{"a": [None]}], tuple[Any, ...], ({"a": [None]},)),
        (5, Seed, 5),
        ({"low": 1, "high": 2}, Node | Pair, Pair(low=1, high=2)),
        ({"children": [{"payload": {"use": "x"}}]}, Tree, Tree(children=(Tree(payload=Node(use="x")),))),
    ],
)
def test_right_types(value, kind, result):
    done = structure(Document(value=value, file="f"), kind)
    assert done == result
    assert type(done) is type(result)
    if isinstance(done, tuple | list):
        assert [type(item) for item in done] == [type(item) for item in result]


def test_validators_are_all_asked():
    assert errors({"low": -1, "high": -2}, Pair) == [
        "'low' must be >= 0: -1 @ $.low (f)",
        "'high' must be >= 0: -2 @ $.high (f)",
    ]
    assert errors({"low": 3, "high": 2}, Pair) == ["high is below low, 3 @ $.high (f)"]
    assert errors({"high": 2}, Pair) == ["missing key 'low' @ $ (f)"]


def test_converters_of_fields_run_before_their_validators():
    assert structure(Document(value={"size": 5, "kind": "b"}, file="f"), Converted) == Converted(size=5, kind="b")
    assert errors({"size": 6, "kind": "c"}, Converted) == [
        "'size' must be <= 10: 12 @ $.size (f)",
        "'kind' must be in ('A', 'B') (got 'C') @ $.kind (f)",
    ]


def test_a_union_of_classes_reports_the_nearest():
    assert errors({"payload": {"low": 1, "hihg": 2}}, Tree) == [
        "unknown key 'hihg' @ $.payload (f); did you mean 'high'?",
        "missing key 'high' @ $.payload (f)",
    ]


def test_keys_of_a_mapping_are_checked_at_their_line():
    document = parse_yaml("graph: 1\nreplai: x", "f")
    assert errors(document, Mapping[Literal["graph", "replay"], int]) == [
        'expected one of "graph", "replay", found the string "replai" @ $ (f:2); did you mean \'replay\'?',
        'expected an integer, found the string "x" @ $.replai (f:2)',
    ]


def test_an_override_is_blamed_for_its_value():
    document = apply_overrides(parse_yaml(GOOD, "dmd.yaml"), ["phases.critic.every=0", "phases.0.everyy=2"])
    assert errors(document, Recipe) == [
        "unknown key 'everyy' @ $.phases[0] (override 'phases.0.everyy=2'); did you mean 'every'?",
        "'every' must be >= 1: 0 @ $.phases[1].every (override 'phases.critic.every=0')",
    ]


def test_hooks_of_a_caller():
    converter = make_converter()
    converter.register_structure_hook(Pair, lambda value, _: Pair(low=0, high=value["to"]) if "to" in value else refuse())

    def refuse():
        raise SpecError([Problem(path=("deep",), message="refused"), Problem(message="known", file="other", line=4)])

    document = parse_yaml("payload:\n  to: 3", "f")
    assert structure(document, Tree, converter) == Tree(payload=Pair(low=0, high=3))
    with pytest.raises(SpecError) as caught:
        structure(parse_yaml("a:\n  deep: 3", "f"), dict[str, Pair], converter)
    assert str(caught.value) == "refused @ $.a.deep (f:2)\nknown @ $.a (other:4)"


def test_errors_of_cattrs_own_hooks_are_understood():
    assert errors({"x": {"b": ["s", 1], "c": 0}}, dict[str, Own]) == [
        "missing key 'a' @ $.x (f)",
        "expected a string, found the integer 1 @ $.x.b[1] (f)",
        "unknown key 'c' @ $.x (f)",
    ]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(plain)
def test_nothing_but_a_spec_error_escapes(value):
    with pytest.raises(SpecError) as caught:
        structure(Document(value=[value], file="f"), tuple[Recipe, ...])
    assert all(problem.path[0] == 0 and problem.file == "f" for problem in caught.value.problems)


@given(plain)
def test_a_value_goes_through_unchanged_where_anything_may_stand(value):
    assert structure(Document(value={"use": "x", "with": {"v": value}}, file="f"), Node).with_ == {"v": value}


def test_unstructure():
    tree = Tree(children=(Tree(payload=Node(use="a", in_={"x": "y"})),))
    assert unstructure(tree) == {
        "children": [{"children": [], "payload": {"use": "a", "with": {}, "in": {"x": "y"}, "grad": True}}],
        "payload": None,
    }
    assert unstructure((Precision.BF16, Mode.REPLAY, frozenset({2, 1}))) == ["bf16", "replay", [1, 2]]
    assert type(unstructure(Mode.REPLAY)) is str


def test_an_option_that_classes_share_does_not_tell_them_apart():
    @attrs.frozen
    class One:
        cache: Literal["full", "half"] = "full"
        kind: Literal["one"] = "one"
        x: int = 0

    @attrs.frozen
    class Two:
        cache: Literal["full", "half"] = "full"
        kind: Literal["two"] = "two"

    assert structure(Document(value={"kind": "two", "cache": "half"}, file="f"), One | Two) == Two(cache="half")
    assert errors({"kind": "two", "x": 1}, One | Two) == ["unknown key 'x' @ $ (f); expected one of 'cache', 'kind'"]
