"""Drawings for the terminal: options stand there as a spec writes them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sftk.core import draw
from sftk.core.graph import Graph
from sftk.spec.source import parse_value

texts = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | texts
    | st.sampled_from(["null", "True", "on", "1e5"])
)


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner)))
def test_an_option_reads_back(value):
    assert parse_value(draw._yaml(value), "tree") == value


def test_a_tree_has_no_words_of_python():
    tree = Graph.from_spec("specs/rollout.yaml").to_tree()
    assert "output_frames: null" in tree
    assert "warp: true" in tree
    assert not {"None", "True", "False"} & set(tree.replace(",", " ").replace("}", " ").split())


@pytest.mark.parametrize(
    ("value", "text"), [(float("inf"), ".inf"), (float("nan"), ".nan"), ((1, 2.0), "[1, 2.0]"), ("a b", '"a b"')]
)
def test_values(value, text):
    assert draw._yaml(value) == text
