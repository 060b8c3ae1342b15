import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftk.errors import SpecError
from sftk.spec.dump import dump_yaml
from sftk.spec.overrides import apply_overrides
from sftk.spec.source import parse_yaml

RECIPE = """\
version: 1
models: {generator: {size: tiny}}
phases:
  - name: generator
    every: 5
    with:
  - name: critic
    steps: [[1, 2], [3]]
  - plain
twins: [{name: a}, {name: a}]
numbers: {"0": zero}
"""


@pytest.fixture
def recipe():
    return parse_yaml(RECIPE, "dmd.yaml")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("version=2", ("version",), 2),
        ("phases.0.every=3", ("phases", 0, "every"), 3),
        ("phases[0].every=3", ("phases", 0, "every"), 3),
        ("phases.generator.every=3", ("phases", 0, "every"), 3),
        ("phases[critic].every=1e-4", ("phases", 1, "every"), 1e-4),
        ("phases.critic.steps[0][1]=7", ("phases", 1, "steps", 0, 1), 7),
        ("phases.1.steps.1=[]", ("phases", 1, "steps", 1), []),
        ("phases.0.with.guidance=4.0", ("phases", 0, "with", "guidance"), 4.0),
        ("models.critic.size=on", ("models", "critic", "size"), "on"),
        ("models={a: {b: [1, 2]}}", ("models",), {"a": {"b": [1, 2]}}),
        ("numbers.0=one", ("numbers", "0"), "one"),
        ("a.b.c=x=y", ("a", "b", "c"), "x=y"),
        ("version=", ("version",), None),
        ("version='1'", ("version",), "1"),
        (" version = 3 ", ("version",), 3),
    ],
)
def test_values_and_places(recipe, text, path, value):
    changed = apply_overrides(recipe, [text])
    assert changed.get(path) == value
    assert type(changed.get(path)) is type(value)
    assert changed.where(path) == (f"override {text!r}", None)
    assert recipe.value == parse_yaml(RECIPE, "dmd.yaml").value


def test_later_overrides_see_earlier_ones_and_the_rest_stays(recipe):
    changed = apply_overrides(recipe, ["phases=[{name: new}]", "phases.new.every=2", "version=2", "version=3"])
    assert changed.value["phases"] == [{"name": "new", "every": 2}]
    assert changed.value["version"] == 3
    assert changed.where(("phases", 0, "name")) == ("override 'phases=[{name: new}]'", None)
    assert changed.where(("phases", 0, "every")) == ("override 'phases.new.every=2'", None)
    assert changed.where(("models", "generator")) == ("dmd.yaml", 2)


@pytest.mark.parametrize("overrides", [[], ["version=2"]])
def test_the_result_shares_nothing(recipe, overrides):
    changed = apply_overrides(recipe, overrides)
    changed.value["models"]["generator"]["size"] = "large"
    assert recipe.get(("models", "generator", "size")) == "tiny"


def test_a_made_mapping_is_placed_at_the_override(recipe):
    changed = apply_overrides(recipe, ["modelss.generator.size=14B"])
    assert changed.where(("modelss",)) == ("override 'modelss.generator.size=14B'", None)


REFUSED = {
    "phases.0.every": "expected key.path=value, found no '=' @ $ (override 'phases.0.every')",
    "=3": "expected a key before '=', found nothing @ $ (override '=3')",
    "a..b=3": "the key 'a..b' has an empty part @ $ (override 'a..b=3'); remove the extra dot",
    "a[=3": "cannot read 'a[' in the key @ $ (override 'a[=3'); write key.path, key.0.path or key[0].path",
    "phases.3.every=1": "index 3 is out of range: the list has 3 items @ $.phases (override 'phases.3.every=1')",
    "phases.critc.every=1": ("no item is named 'critc' @ $.phases (override 'phases.critc.every=1'); did you mean 'critic'?"),
    "twins.a.x=1": "2 items are named 'a' @ $.twins (override 'twins.a.x=1'); address one by its index",
    "version.x=1": "expected a mapping with a key 'x', found the integer 1 @ $.version (override 'version.x=1')",
    "models[0].x=1": "expected a list with an item 0, found a mapping @ $.models (override 'models[0].x=1')",
    "new.0=1": (
        "expected a list with an item 0, found null @ $.new (override 'new.0=1'); "
        "items are not added one by one: give the whole list"
    ),
    "version=a: b": (
        "expected one YAML value, found 'a: b' @ $.version (override 'version=a: b'); "
        "quote a string that holds ': ' or ' #', and write a collection as [a, b] or {a: b}"
    ),
    "models={a: 1, a: 2}": "duplicate key 'a' @ $.models (override 'models={a: 1, a: 2}'); it was given in line 1",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items())
def test_refused(recipe, text, message):
    with pytest.raises(SpecError) as caught:
        apply_overrides(recipe, [text])
    assert str(caught.value) == message
    assert all(problem.line is None for problem in caught.value.problems)


def test_all_problems_at_once(recipe):
    with pytest.raises(SpecError) as caught:
        apply_overrides(recipe, [*REFUSED, "version=[1"])
    *known, syntax = (str(problem) for problem in caught.value.problems)
    assert known == list(REFUSED.values())
    assert syntax.startswith("not valid YAML: ")
    assert syntax.endswith("@ $.version (override 'version=[1')")


@given(st.text("ab", min_size=1), st.integers() | st.floats(allow_nan=False) | st.text("a1.:#'\"[{ "))
def test_any_scalar_can_be_set(key, value):
    text = f"{key}={dump_yaml(value).removesuffix(chr(10))}"
    assert apply_overrides(parse_yaml("{a: 0}", "x"), [text]).value[key] == value
