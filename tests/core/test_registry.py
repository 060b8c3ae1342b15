from __future__ import annotations

import pytest

from sftk.core import LatentShape, from_state, lookup, split_blocks, transform, transforms
from sftk.core.registry import register
from sftk.errors import ShapeError, SpecError


def test_lookup_suggests():
    with pytest.raises(SpecError) as caught:
        lookup("add_nois")
    assert str(caught.value) == "unknown transform 'add_nois'; did you mean 'add_noise'? (is its module in `plugins:`?)"


def test_a_name_is_taken_once(nothing_stays_registered):
    @transform(out="y", kind="per_sample")
    def mine_for_test(x):
        """Mine."""
        return x

    assert lookup("mine_for_test") is mine_for_test
    register("mine_for_test", mine_for_test)
    with pytest.raises(SpecError, match=r"the transform name 'mine_for_test' is taken by .*test_registry"):
        register("mine_for_test", lookup("add_noise"))


def test_the_registry_is_read_only():
    with pytest.raises(TypeError):
        transforms()["x"] = None  # pyright: ignore[reportIndexIssue]


def test_transform_checks_its_declaration(nothing_stays_registered):
    def fits(x, nett):
        return x

    with pytest.raises(
        SpecError, match=r"'fits' has the model port 'net', which is none of its arguments; did you mean 'nett'\?"
    ):
        transform(out="y", kind="per_sample", models=("net",))(fits)
    with pytest.raises(SpecError, match=r"'fits' has the kind 'sample'; did you mean 'per_sample'\?"):
        transform(out="y", kind="sample")(fits)  # pyright: ignore[reportArgumentType]
    for odd in (lambda *x: x, lambda **x: x, lambda x, /: x):
        with pytest.raises(SpecError, match="every argument needs a name of its own"):
            transform(out="y", kind="per_sample")(odd)
    assert not {"fits", "<lambda>"} & set(transforms())


def test_the_number_of_results_is_checked(nothing_stays_registered):
    @transform(out=("a", "b"), kind="per_sample")
    def one_result_for_test(x):
        """Forgets one."""
        return x

    with pytest.raises(SpecError, match="'one_result_for_test' must return a tuple of a, b; it returned one int"):
        one_result_for_test.run({"x": 1}, {})


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [((6, 3), (3, 3)), ((7, 3, True), (1, 3, 3)), ((1, 3, True), (1,)), ((3, 1), (1, 1, 1))],
)
def test_split_blocks(arguments, blocks):
    assert split_blocks(*arguments) == blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 3), "7 frames do not divide into blocks of 3; take 6 or 9 frames"),
        ((9, 3, True), "9 frames do not divide into blocks of 3 after a first frame of its own; take 7 or 10 frames"),
        ((2, 3), "2 frames do not divide into blocks of 3; take 3 frames"),
        ((0, 3), "0 frames do not divide into blocks of 3; take 3 frames"),
        ((3, 3, True), "3 frames do not divide into blocks of 3 after a first frame of its own; take 1 or 4 frames"),
        ((6, 0), "a block has at least 1 frame, found 0"),
    ],
)
def test_split_blocks_says_what_would_fit(arguments, message):
    with pytest.raises(ShapeError) as caught:
        split_blocks(*arguments)
    assert str(caught.value) == message


def test_latent_shape():
    shape = LatentShape(frames=3, channels=4, height=8, width=12)
    assert shape.tensor_shape(2) == (2, 3, 4, 8, 12)
    assert shape.tokens_per_frame((1, 2, 2)) == 24
    with pytest.raises(ShapeError, match="a patch of 3x2 does not divide latents of 8x12"):
        shape.tokens_per_frame((1, 3, 2))


def test_from_state_copies_the_mapping_alone():
    state = {"a": [1]}
    found = from_state(state)
    assert found == state
    assert found is not state
    assert found["a"] is state["a"]
