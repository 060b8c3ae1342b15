"""Laws that every registered transform obeys."""

from __future__ import annotations

import re
import warnings
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import sftk
from sftk.core import FunctionTransform, Graph
from sftk.functional import Key

OPS: dict[str, Any] = {n: op for n, op in sorted(sftk.transforms().items()) if op.__module__.startswith("sftk.")}
FLOAT32_BY_DESIGN = {
    "draw_timestep": ("timestep",),
    "draw_interval": ("timestep", "interval"),
    "draw_step": ("timestep",),
    "draw_grid_step": ("timestep", "next_timestep"),
}
"""Outputs that are documented as float32 whatever the inputs are."""

every = pytest.mark.parametrize("name", OPS)
few = settings(max_examples=4, deadline=None, derandomize=True)
examples = given(batch=st.integers(1, 3), seed=st.integers(0, 2**16))


def of_kind(*kinds: str):
    return pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kind in kinds])


def example(name: str, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return dict(OPS[name].example(batch, lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)))


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return OPS[name].pack(OPS[name].fn(**arguments))


def rows(tree: Any, index: list[int]) -> Any:
    """The samples `index` of every tensor and key; host values and sums over the batch as they are."""

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index] if leaf.dim() else leaf
        return attrs.evolve(leaf, samples=tuple(leaf.samples[i] for i in index)) if isinstance(leaf, Key) else leaf

    return pytree.tree_map(take, tree)


def copy(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def assert_same(found: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    (found_leaves, found_spec), (leaves, spec) = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert found_spec == spec
    for a, b in zip(found_leaves, leaves, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert a == b


def close(found: Any, expected: Any) -> None:
    assert_same(found, expected, rtol=1e-12, atol=1e-12)


def test_registry_is_whole():
    from sftk import functional, objectives

    exported = {n for m in (functional, objectives) for n in m.__all__ if isinstance(getattr(m, n), FunctionTransform)}
    assert exported == set(OPS)
    assert {op.kind for op in OPS.values()} == {"per_sample", "reduced", "keyed", "host"}


@every
@few
@examples
def test_inputs_stay_unchanged(name: str, batch: int, seed: int):
    arguments = example(name, batch, seed)
    before = copy(arguments)
    versions = [leaf._version for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    call(name, arguments)
    assert_same(arguments, before)
    assert versions == [leaf._version for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


@every
def test_inputs_stay_unchanged_when_backward_runs(name: str):
    arguments = pytree.tree_map(
        lambda leaf: leaf.requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        example(name, 2),
    )
    before = copy(arguments)
    result = call(name, arguments)
    heads = [leaf.sum() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if heads:
        torch.stack(heads).sum().backward()
    assert_same(arguments, before)


@every
@few
@examples
def test_is_deterministic_and_takes_nothing_from_the_global_generator(name: str, batch: int, seed: int):
    arguments = example(name, batch, seed)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = call(name, arguments)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert_same(call(name, arguments), first)


@every
def test_writes_exactly_its_declared_keys(name: str):
    op, arguments = OPS[name], example(name, 2)
    assert tuple(call(name, arguments)) == op.outputs
    models = {port: arguments.pop(port) for port in op.ports}
    options = {key: arguments.pop(key) for key in list(arguments) if key in op.options}
    named = {result: f"out_{result}" for result in op.outputs}
    graph = Graph([op.node(out=named, **options)], inputs=op.inputs, optional=[k for k in arguments if k in op.optional])
    out = graph(arguments, models)
    assert set(out) - set(arguments) == set(named.values())
    assert all(out[key] is arguments[key] for key in arguments)


@every
def test_example_covers_what_is_required(name: str):
    op, arguments = OPS[name], example(name, 2)
    known = {*op.inputs, *op.optional, *op.options, *op.ports}
    assert set(arguments) <= known
    assert {*op.inputs, *op.ports} <= set(arguments)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype(name: str, dtype: torch.dtype):
    for key, value in call(name, example(name, 2, dtype=dtype)).items():
        expected = torch.float32 if key in FLOAT32_BY_DESIGN.get(name, ()) else dtype
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                assert leaf.dtype == expected, key


@every
def test_half_precision_stays_half_but_for_losses(name: str):
    op = OPS[name]
    in_float32 = op.kind == "reduced" or name in FLOAT32_BY_DESIGN or name in ("dmd_gradient", "weigh_samples")
    arguments = example(name, 2, dtype=torch.float32)
    for key, value in arguments.items():
        # A timestep below 1000 in bf16 is off by up to 4: times stay in float32.
        if key not in ("timestep", "clean_timestep", "interval"):
            half = lambda leaf: leaf.bfloat16() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
            arguments[key] = pytree.tree_map(half, value)
    if "denoiser" in arguments:
        inner = arguments["denoiser"]

        def in_latents_dtype(latents, timestep, prompt_embeds, **rest):
            return pytree.tree_map(lambda leaf: leaf.to(latents.dtype), inner(latents, timestep, prompt_embeds, **rest))

        arguments["denoiser"] = in_latents_dtype
    for key, value in call(name, arguments).items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                assert leaf.dtype == (torch.float32 if in_float32 else torch.bfloat16), key
                assert leaf.isfinite().all()


@of_kind("per_sample", "reduced", "host")
def test_keeps_the_device_and_reads_nothing_back(name: str):
    """On the meta device there is nothing to read, so a value that reached the host would raise."""
    with torch.device("meta"):
        arguments = OPS[name].example(2, torch.randn)
    for leaf in pytree.tree_leaves(call(name, arguments)):
        if isinstance(leaf, Tensor):
            assert leaf.device.type == "meta"


@of_kind("per_sample")
@few
@given(batch=st.integers(2, 4), data=st.data())
def test_per_sample_commutes_with_a_permutation(name: str, batch: int, data: st.DataObject):
    order = data.draw(st.permutations(range(batch)))
    arguments = example(name, batch)
    close(call(name, rows(arguments, order)), rows(call(name, arguments), order))


@of_kind("per_sample")
def test_per_sample_equals_each_sample_alone(name: str):
    arguments = example(name, 3)
    together = call(name, arguments)
    for i in range(3):
        close(call(name, rows(arguments, [i])), rows(together, [i]))


@of_kind("keyed")
@few
@given(data=st.data())
def test_keyed_follows_its_samples(name: str, data: st.DataObject):
    order = data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 4))]
    arguments = example(name, 4)
    close(call(name, rows(arguments, order)), rows(call(name, arguments), order))


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kind == "reduced" and "loss" in op.outputs])
@pytest.mark.parametrize("cut", [1, 2])
def test_reduced_sums_do_not_depend_on_the_split(name: str, cut: int):
    assert OPS[name].outputs == ("loss", "loss_weight")
    arguments = example(name, 4)
    whole = call(name, arguments)
    parts = [call(name, rows(arguments, index)) for index in (list(range(cut)), list(range(cut, 4)))]
    for key in ("loss", "loss_weight"):
        assert whole[key].shape == ()
        torch.testing.assert_close(sum(part[key] for part in parts), whole[key], rtol=1e-12, atol=0)


@of_kind("reduced")
def test_reduced_does_not_depend_on_the_order_of_the_batch(name: str):
    arguments = example(name, 4)
    close(call(name, rows(arguments, [2, 0, 3, 1])), call(name, arguments))


@of_kind("host")
def test_host_transforms_return_no_tensors(name: str):
    leaves = pytree.tree_leaves(call(name, example(name, 2)))
    assert not any(isinstance(leaf, Tensor) for leaf in leaves)


def takes_tensors(name: str) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example(name, 2)))


def compiled(name: str, backend: str, **options: Any) -> None:
    torch._dynamo.reset()
    arguments = example(name, 2, dtype=torch.float32)
    expected = call(name, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = OPS[name].pack(torch.compile(OPS[name].fn, backend=backend, **options)(**arguments))
    assert_same(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in OPS if takes_tensors(name)])
def test_compiled_equals_eager(name: str):
    drawn_or_called = OPS[name].kind == "keyed" or bool(OPS[name].ports)
    compiled(name, "aot_eager", fullgraph=not drawn_or_called)


def has_compiler() -> bool:
    from torch._inductor import config, cpp_builder, exc

    try:
        return bool(cpp_builder.get_cpp_compiler()) and bool(config)
    except exc.InvalidCxxCompiler:
        return False


@pytest.mark.parametrize("name", ["add_noise", "dmd_gradient", "surrogate_loss", "guide"])
def test_inductor_equals_eager(name: str):
    if not has_compiler():
        pytest.skip("no C++ compiler")
    compiled(name, "inductor", fullgraph=True)


@every
def test_is_documented(name: str):
    op = OPS[name]
    text = op.__doc__ or ""
    assert op.example is not None
    assert "Example" in text or ">>>" in text
    assert op.doc


@every
def test_its_names_are_documented(name: str):
    """Each argument, option and result is named in the docstring, in one that it refers to, or in the list of state keys."""
    from sftk.core.state import KEYS

    op = OPS[name]
    text = op.__doc__ or ""
    names = set(re.findall(r"(?:see|as) `(\w+)`", text)) & set(OPS)
    text += "".join(OPS[n].__doc__ or "" for n in names)
    missing = [n for n in (*op.arguments, *op.options) if n not in KEYS and not re.search(rf"\b{n}\b", text)]
    assert not missing
    own = op.__doc__ or ""
    assert [n for n in op.outputs if n not in KEYS and not re.search(rf"\b{n}\b", own)] == []
