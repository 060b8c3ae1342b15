"""Transforms: pure functions over a State with declared inputs, outputs, options and model ports."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import attrs
from torch import Tensor

from sftk.core import registry
from sftk.errors import SpecError, did_you_mean

Kind = Literal["per_sample", "reduced", "keyed", "host"]
"""How a transform treats the batch axis.

`per_sample` commutes with a permutation of the batch, `reduced` sums over it, `keyed` draws from a `Key`,
`host` computes host values (plans, step lists) only.
"""


class Transform:
    """What graphs are made of: something with named inputs, outputs and model ports that runs on a mapping.

    `FunctionTransform`, `Graph` and `Fold` are transforms, so graphs nest.

    Attributes:
        name: the name in drawings and errors.
        doc: one line on what it does.
        kind: how it treats the batch axis, see `Kind`.
        inputs: keys that must be given.
        optional: keys that may be given; absent ones are passed as None.
        outputs: keys that `run` returns.
        ports: names of the models that it calls.
    """

    name: str
    doc: str
    kind: Kind
    inputs: tuple[str, ...]
    optional: tuple[str, ...]
    outputs: tuple[str, ...]
    ports: tuple[str, ...]

    def run(self, values: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
        """Runs on plain mappings. Returns exactly `outputs`, never writes to `values`."""
        raise NotImplementedError

    def node(
        self,
        *,
        in_: Mapping[str, str] | None = None,
        out: Mapping[str, str | None] | None = None,
        models: Mapping[str, str] | None = None,
        grad: bool = True,
        **options: Any,
    ) -> Node:
        """This transform with its keys renamed and its options set, to stand in a graph.

        Args:
            in_: argument name to state key; an argument that is not named reads the key of its own name.
            out: result name to state key; None drops a result.
            models: port name to the role that the graph's caller binds.
            grad: False runs the node without a graph for backward (`torch.no_grad`).
            **options: values of keyword-only arguments. Checked when the graph is built.

        Example:
            >>> from sftk.functional import add_noise
            >>> add_noise.node(in_={"noise": "score_noise"}, out={"noisy": "score_noisy"}, shift=5.0).writes
            ('score_noisy',)
        """
        return Node(op=self, in_=in_ or {}, out=out or {}, models=models or {}, grad=grad, options=options)


class FunctionTransform(Transform):
    """A plain function made a transform by `@transform`; calling it calls the function."""

    def __init__(
        self,
        fn: Callable[..., Any],
        out: tuple[str, ...],
        kind: Kind,
        ports: tuple[str, ...],
        example: Any,
        check: Any,
        replay: bool = False,
        whole: Callable[[Mapping[str, Any]], bool] | None = None,
        gradient: tuple[str, ...] = (),
    ):
        parameters = inspect.signature(fn).parameters
        positional = [p for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        _check_signature(fn, parameters.values(), ports, kind)
        self.fn = fn
        self.name = fn.__name__
        self.doc = (inspect.getdoc(fn) or "").partition("\n")[0]
        self.kind = kind
        self.ports = ports
        self.outputs = out
        self.arguments = tuple(p.name for p in positional if p.name not in ports)
        self.inputs = tuple(a for a in self.arguments if parameters[a].default is inspect.Parameter.empty)
        self.optional = tuple(a for a in self.arguments if a not in self.inputs)
        self.options = {p.name: p for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        self.example, self.check, self.replay, self._whole = example, check, replay, whole
        self.gradient = gradient
        hints = typing.get_type_hints(fn)
        self.tensors_only = all(hints.get(name) in (Tensor, Tensor | None) for name in self.arguments)
        self.__doc__ = fn.__doc__
        self.__module__ = fn.__module__
        self.__wrapped__ = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def run(self, values: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {port: models[port] for port in self.ports}
        arguments |= {a: values[a] for a in self.arguments if a in values}
        return self.pack(self.fn(**arguments))

    def complete(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with defaults filled in."""
        return {name: options.get(name, parameter.default) for name, parameter in self.options.items()}

    def needs_whole(self, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, it can use its models only where each process holds all of their weights."""
        return self._whole is not None and self._whole(self.complete(options))

    def pack(self, result: Any) -> dict[str, Any]:
        """The function's result as a mapping of declared outputs."""
        if len(self.outputs) == 1:
            return {self.outputs[0]: result}
        if not isinstance(result, tuple) or len(result) != len(self.outputs):
            found = f"{len(result)} results" if isinstance(result, tuple) else f"one {type(result).__name__}"
            raise SpecError(
                f"the transform {self.name!r} must return a tuple of {', '.join(self.outputs)}; it returned {found}"
            )
        return dict(zip(self.outputs, result, strict=True))

    def __repr__(self) -> str:
        return f"<transform {self.name}({', '.join(self.arguments)}) -> {', '.join(self.outputs)}>"


def _check_signature(
    fn: Callable[..., Any], parameters: Iterable[inspect.Parameter], ports: tuple[str, ...], kind: str
) -> None:
    """Raises a SpecError for a function that cannot be a transform."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    place = f"the transform {fn.__name__!r}"
    for parameter in parameters:
        if parameter.kind not in named:
            raise SpecError(f"{place} takes {str(parameter)!r}; every argument needs a name of its own, by which it is passed")
    arguments = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    for port in ports:
        if port not in arguments:
            raise SpecError(
                f"{place} has the model port {port!r}, which is none of its arguments; {did_you_mean(port, arguments)}"
            )
    if kind not in get_args(Kind):
        raise SpecError(f"{place} has the kind {kind!r}; {did_you_mean(kind, get_args(Kind))}")


@attrs.frozen(kw_only=True, eq=False)
class Node:
    """A transform as it stands in a graph: keys renamed, options set, ports bound. Made by `Transform.node`."""

    op: Transform
    in_: Mapping[str, str] = attrs.field(factory=dict)
    out: Mapping[str, str | None] = attrs.field(factory=dict)
    models: Mapping[str, str] = attrs.field(factory=dict)
    grad: bool = True
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:
        """(argument, key) of each required input."""
        return tuple((a, self.in_.get(a, a)) for a in self.op.inputs)

    @property
    def may_read(self) -> tuple[tuple[str, str], ...]:
        """(argument, key) of each optional input."""
        return tuple((a, self.in_.get(a, a)) for a in self.op.optional)

    @property
    def results(self) -> tuple[tuple[str, str], ...]:
        """(result, key) of each output that is kept."""
        pairs = ((r, self.out.get(r, r)) for r in self.op.outputs)
        return tuple((r, key) for r, key in pairs if key is not None)

    @property
    def writes(self) -> tuple[str, ...]:
        """The keys that this node writes."""
        return tuple(key for _, key in self.results)

    @property
    def roles(self) -> tuple[tuple[str, str], ...]:
        """(port, role) of each model port."""
        return tuple((port, self.models.get(port, port)) for port in self.op.ports)


def transform(
    *,
    out: str | tuple[str, ...],
    kind: Kind,
    models: tuple[str, ...] = (),
    example: Callable[..., Mapping[str, Any]] | None = None,
    check: Callable[[Mapping[str, Any], int | None], Iterable[tuple[str, str]]] | None = None,
    replay: bool = False,
    whole: Callable[[Mapping[str, Any]], bool] | None = None,
    gradient: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], FunctionTransform]:
    """Makes a function a registered transform.

    Argument names are the input keys (a default of None makes one optional), keyword-only arguments the options.

    Args:
        out: name of the result, or of each member of the returned tuple.
        kind: how it treats the batch axis, see `Kind`.
        models: arguments that are model ports.
        example: `example(batch, randn)` returns arguments and options on which the laws are tested; `randn(*shape)` draws.
        check: `check(options, frames)` yields (option, message) for values that fit their types but not one another, before
            anything runs; `frames` is the number of latent frames, or None when that is not known.
        replay: its backward pass may run later, from its inputs, see `sftk.core.replayed`.
        whole: `whole(options)` says whether the models' weights must lie whole in every process: when they are differentiated
            twice, say, which sharded ones cannot be.
        gradient: options that decide what carries gradient and change no sample; phases that share a rollout may differ there.

    Raises:
        SpecError: the name is already registered, the signature has `*args`, `**kwargs` or positional-only arguments, a port is
            no argument, or the kind is unknown.

    Example:
        >>> @transform(out="doubled", kind="per_sample")
        ... def double_for_doctest(x, *, times: float = 2.0):
        ...     '''Twice x.'''
        ...     return x * times
        >>> double_for_doctest(3.0), double_for_doctest.outputs
        (6.0, ('doubled',))
        >>> registry.unregister("double_for_doctest")
    """
    outputs = (out,) if isinstance(out, str) else tuple(out)

    def decorate(fn: Callable[..., Any]) -> FunctionTransform:
        made = FunctionTransform(fn, outputs, kind, tuple(models), example, check, replay, whole, gradient)
        registry.register(made.name, made)
        return made

    return decorate
