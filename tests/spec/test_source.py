import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sftk.errors import Problem, SpecError
from sftk.spec.document import Document
from sftk.spec.dump import dump_yaml
from sftk.spec.source import parse_value, parse_yaml, read_yaml


def problems(text):
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "x.yaml")
    return [str(problem) for problem in caught.value.problems]


SCALARS = {
    "1e-4": 1e-4,
    "1.5e3": 1500.0,
    ".5": 0.5,
    "5.": 5.0,
    "-7": -7,
    "+7": 7,
    "0x1f": 31,
    "0o17": 15,
    "012": 12,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "null": None,
    "~": None,
    "Null": None,
    "NULL": None,
    "": None,
    "on": "on",
    "yes": "yes",
    "off": "off",
    "no": "no",
    "tRUE": "tRUE",
    "2026-01-01": "2026-01-01",
    "1:30": "1:30",
    "1_000": "1_000",
    "0b1": "0b1",
    "-0x1f": "-0x1f",
    "e5": "e5",
    "1e": "1e",
    "٣": "٣",
    ".": ".",
    "=": "=",
    "'1e-4'": "1e-4",
    '"true"': "true",
    "''": "",
    r'"\ud83d\ude00 \u00e9"': "😀 é",
    "!!str 5": "5",
    "! 5": "5",
    "!!float 3": 3.0,
    "!!int 3": 3,
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_of_yaml_1_2(text, value):
    for read in (parse_yaml(f"a: {text}", "x").value["a"], parse_yaml(f"[{text}, 0]", "x").value[0] if text else None):
        assert read == value
        assert type(read) is type(value)


def test_nan_and_long_numbers():
    assert math.isnan(parse_yaml("a: .nan", "x").value["a"])
    assert problems("a: 1e999") == ["1e999 is too large for a number; write .inf if infinity is meant @ $.a (x.yaml:1)"]
    assert problems("a: " + "1" * 5000) == ["a number of 5000 digits is too long @ $.a (x.yaml:1)"]


RECIPE = """\
# a comment
version: 1
phases:
  - name: generator
    with: {steps: [1000,
                   750]}
  -
    name: critic
shared: &s
  a: 1
again:
  - *s
"""


def test_places_are_those_of_keys_and_items():
    document = parse_yaml(RECIPE, "dmd.yaml")
    lines = {
        (): 2,
        ("version",): 2,
        ("phases",): 3,
        ("phases", 0): 4,
        ("phases", 0, "name"): 4,
        ("phases", 0, "with"): 5,
        ("phases", 0, "with", "steps", 0): 5,
        ("phases", 0, "with", "steps", 1): 6,
        ("phases", 0, "with", "steps", 7): 5,
        ("phases", 1): 8,
        ("phases", 2): 3,
        ("again", 0): 12,
        ("again", 0, "a"): 10,
    }
    assert {path: document.where(path) for path in lines} == {path: ("dmd.yaml", line) for path, line in lines.items()}


def test_aliases_share_nothing():
    value = parse_yaml(RECIPE, "x").value
    assert value["again"] == [{"a": 1}]
    assert value["again"][0] is not value["shared"]


def test_sub_document_has_its_own_root_and_keeps_places():
    part = parse_yaml(RECIPE, "x.yaml").at(("phases", 1))
    assert part.value == {"name": "critic"}
    assert str(part.problem(("name",), "bad", "fix it")) == "bad @ $.name (x.yaml:8); fix it"
    assert part.where(("missing",)) == ("x.yaml", 8)
    with pytest.raises(SpecError, match=r"^no key 'phase' @ \$ \(x.yaml:2\); did you mean 'phases'\?$"):
        parse_yaml(RECIPE, "x.yaml").at(("phase", 1))
    with pytest.raises(SpecError, match=r"^no item 2 @ \$.phases \(x.yaml:3\)$"):
        parse_yaml(RECIPE, "x.yaml").get(("phases", 2))
    assert parse_yaml(RECIPE, "x.yaml").get(("phases", 2), None) is None


def test_locate_keeps_a_place_that_is_known():
    document = parse_yaml(RECIPE, "x.yaml")
    assert document.locate(Problem(path=("version",), message="m")).line == 2
    known = Problem(path=("version",), message="m", file="y.yaml", line=9)
    assert document.locate(known) is known
    assert Document(value=1, file="z").where(("a",)) == ("z", None)


def test_replace_gives_a_new_document():
    old = parse_yaml(RECIPE, "x.yaml")
    before = repr(old.value)
    new = old.replace(("phases", 0, "with"), {"steps": [1]}, "here", 3).replace(("new", "deep"), 1, "there")
    assert repr(old.value) == before
    assert old.where(("phases", 0, "with", "steps", 1)) == ("x.yaml", 6)
    assert new.value["phases"][0] == {"name": "generator", "with": {"steps": [1]}}
    assert new.where(("phases", 0, "with", "steps", 1)) == ("here", 3)
    assert new.where(("new",)) == new.where(("new", "deep")) == ("there", None)
    new.value["phases"][1]["name"] = "changed"
    assert repr(old.value) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("phases", 2, "x"), r"index 2 is out of range: the list has 2 items @ \$.phases \(f:3\)"),
        (("phases", "x"), r"expected a mapping with a key 'x', found a list @ \$.phases \(f:3\)"),
        (("version", "x"), r"expected a mapping with a key 'x', found the integer 1 @ \$.version \(f:3\)"),
        (("new", 0), r"expected a list with an item 0, found null @ \$.new \(f:3\); items are not added one by one.*"),
    ],
)
def test_replace_refuses(path, message):
    with pytest.raises(SpecError, match=f"^{message}$"):
        parse_yaml(RECIPE, "x.yaml").replace(path, 1, "f", 3)


def test_all_problems_at_once():
    text = "a: 1\nb: {c: 1, c: 2}\na: 2\n1: x\n<<: {d: 1}\n? [k]\n: 1\nt: !new {a: 1}\nu: !!binary aaa\nv: !!int x\nnull: 1\n"
    assert problems(text) == [
        "duplicate key 'c' @ $.b (x.yaml:2); it was given in line 2",
        "duplicate key 'a' @ $ (x.yaml:3); it was given in line 1",
        "a key is a string, found 1 @ $ (x.yaml:4); quote it: '1'",
        "merge key '<<' is not YAML 1.2 @ $ (x.yaml:5); write the keys out",
        "a key is a string, found a collection @ $ (x.yaml:6)",
        "tag !new is not known here @ $.t (x.yaml:8); remove it",
        "tag !!binary is not known here @ $.u (x.yaml:9); remove it; quotes make a string",
        "'x' is not what its tag !!int says @ $.v (x.yaml:10)",
        "a key is a string, found null @ $ (x.yaml:11); quote it: 'null'",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the document is empty @ $ (x.yaml)"),
        ("# only this\n", "the document is empty @ $ (x.yaml)"),
        ("---\n", "the document is empty @ $ (x.yaml)"),
        ("a: 1\n---\nb: 2", "a second document starts here @ $ (x.yaml:2); put each document in a file of its own"),
        ("a: 1\nb: c: 2", "not valid YAML: mapping values are not allowed here @ $ (x.yaml:2); quote a string that holds ': '"),
        ("a: &x\n  - *x", "an alias contains itself @ $.a[0] (x.yaml:2); write the value out"),
        ("a: &x {b: {c: *x}}", "an alias contains itself @ $.a.b.c (x.yaml:1); write the value out"),
        ("a: *x", "not valid YAML: found undefined alias 'x' @ $ (x.yaml:1)"),
        ("a: 1\nb: \x07", "character U+0007 is not allowed in YAML @ $ (x.yaml:2); remove it"),
        (
            r'a: "\ud83d"',
            "half of a surrogate pair is no character @ $.a (x.yaml:1); write the character itself, or both halves",
        ),
        ("[" * 102 + "]" * 102, "the document is nested deeper than 100 levels @ $[0][0][0] (x.yaml:1)"),
        ("[" * 2000, "the document is nested too deeply @ $ (x.yaml)"),
    ],
)
def test_broken_text(text, message):
    assert problems(text) == [message]


def test_syntax_errors_name_their_line():
    (tab,) = problems("a:\n\tb: 1")
    assert tab.startswith(r"not valid YAML: found character '\t' that cannot start any token")
    assert tab.endswith("(x.yaml:2); indent with spaces")
    (open_list,) = problems("a: 1\nb: [1,\nc: 2\n")
    assert "while parsing a flow sequence that starts in line 2" in open_list
    assert problems(r'a: "\UFFFFFFFF"')[0].startswith("not valid YAML: ")


def test_nested_aliases_do_not_expand_without_bound():
    lines = ["a0: &a0 [" + "x, " * 9 + "x]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 9)]
    assert problems("\n".join(lines)) == ["more than 300000 values after expanding aliases @ $ (x.yaml)"]


def test_what_is_read_belongs_to_the_reader(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("steps: [1000, 500]")
    read_yaml(file).value["steps"].append(0)
    assert read_yaml(file).value == {"steps": [1000, 500]}
    file.write_text("steps: [1000]")
    assert read_yaml(file).value == {"steps": [1000]}


def test_files(tmp_path):
    good = tmp_path / "dmd.yaml"
    good.write_bytes(b"\xef\xbb\xbfname: x\xc3\xa9\r\nb: 2\r\n")
    assert read_yaml(good).value == {"name": "xé", "b": 2}
    assert read_yaml(good, "shown").where(("b",)) == ("shown", 2)
    bad = tmp_path / "latin.yaml"
    bad.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(SpecError, match=r"^byte 0xe9 is not UTF-8 @ \$ \(latin:2\); save the file as UTF-8$"):
        read_yaml(bad, "latin")
    with pytest.raises(SpecError, match=r"^no such file @ \$ \(here\); did you mean 'dmd.yaml'\?$"):
        read_yaml(tmp_path / "dmx.yaml", "here")
    with pytest.raises(SpecError, match=r"^expected a YAML file, found a directory @ \$ \(folder\)$"):
        read_yaml(tmp_path, "folder")


@pytest.mark.parametrize("text", ["a: 1", "- 1", "a # b", "#fff", "1\n--- 2", "|", "[1", "*a", "!x 1", "{a: 1, a: 2}", "[1] 2"])
def test_values_that_are_not_one(text):
    with pytest.raises(SpecError):
        parse_value(text, "x")


def test_values():
    assert parse_value("", "x") is None
    assert parse_value(" [1e-4, on] ", "x") == [1e-4, "on"]
    assert parse_value("a b", "x") == "a b"
    assert parse_value("'a # b: c'", "x") == "a # b: c"


def same(one, other):
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


tricky = st.sampled_from(
    [*SCALARS, "a\nb", "a\n", "\n", " a", "a ", "a: b", "<<", "...", "---", "- a", "x" * 200, "1" * 5000, "\t", "#"]
)
texts = st.text(max_size=12) | tricky
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


@given(values)
def test_dump_reads_back(value):
    assert same(parse_yaml(dump_yaml(value), "x").value, value)


@given(st.dictionaries(st.text("abc", min_size=1), scalars, min_size=1))
def test_other_readers_read_the_same(value):
    assert same(yaml.safe_load(dump_yaml(value)), value)


def test_dump_is_readable():
    value = {"doc": "one\ntwo\n", "lr": 1e-4, "eps": 1e-20, "on": "yes", "n": "3", "steps": (1000, 750), "e": [], "m": {}}
    assert dump_yaml(value) == (
        "doc: |\n  one\n  two\nlr: 0.0001\neps: 1.0e-20\n'on': 'yes'\nn: '3'\nsteps: [1000, 750]\ne: []\nm: {}\n"
    )
    assert dump_yaml(None) == "null\n"
    assert dump_yaml({"long": ["word" * 5] * 5}).count("\n") == 6


@pytest.mark.parametrize("value", [{1: 2}, [object()], {"a": {1, 2}}])
def test_dump_refuses(value):
    with pytest.raises(TypeError):
        dump_yaml(value)
