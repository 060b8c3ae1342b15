"""Watches a pass over meta tensors: bytes alive and their peak, floating-point operations, bytes moved."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sftk.functional.apart import BODIES
from sftk.functional.meta_attention import BACKWARD_OP, FORWARD_OP, attention_flops

ALL_TO_ALL, WAIT = "_c10d_functional::all_to_all_single", "_c10d_functional::wait_tensor"


@attrs.define
class Exchanged:
    """What ranks that share samples exchange: collectives, bytes that each rank gives them, of these to other ranks."""

    calls: float = 0.0
    payload: float = 0.0
    sent: float = 0.0

    def add(self, other: Exchanged, times: float = 1.0) -> None:
        """Adds another, `times` over."""
        self.calls += times * other.calls
        self.payload += times * other.payload
        self.sent += times * other.sent


@attrs.define
class Work:
    """What a pass computes.

    Args:
        gemm: floating-point operations of matrix products and convolutions.
        attention, attention_backward: of attention. attention_again: the part of `attention` that a backward pass computed
            again for an activation checkpoint.
        moved: bytes that all other operations read and write, each tensor once an operation.
        exchanged: name of a process group to what goes between its ranks, which share the pass's tokens.
    """

    gemm: float = 0.0
    attention: float = 0.0
    attention_backward: float = 0.0
    attention_again: float = 0.0
    moved: float = 0.0
    exchanged: dict[str, Exchanged] = attrs.field(factory=dict)

    def add(self, other: Work, times: float = 1.0) -> None:
        """Adds other work, `times` over."""
        for name in ("gemm", "attention", "attention_backward", "attention_again", "moved"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name, exchanged in other.exchanged.items():
            self.exchanged.setdefault(name, Exchanged()).add(exchanged, times)

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.gemm + self.attention + self.attention_backward

    @property
    def sent(self) -> float:
        """Bytes that go to other ranks."""
        return sum(exchanged.sent for exchanged in self.exchanged.values())


class Trace(TorchDispatchMode):
    """Watches what runs inside it. Gradients of parameters are counted apart, by `gradient`, since sharding divides them.

    Attributes:
        live: bytes of tensors that were made inside and are alive. peaks: bytes of gradients to the most bytes alive with them.
        work: see `Work`. casts: copies of weights in half precision that autocast keeps during a call, by weight.
        caching: whether a call of a model is open.

    Example:
        >>> with Trace() as trace:
        ...     x = torch.empty(4, 8, device="meta")
        ...     y = x @ x.T
        ...     del x
        >>> trace.live, trace.peaks, trace.work.gemm
        (64, {0: 192}, 256.0)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peaks, self.work = 0, {0: 0}, Work()
        self.casts: dict[int, Tensor] = {}
        self.caching, self.paused = False, False
        self.seen: dict[int, Any] = {}
        self.gradients: dict[int, int] = {}
        self.gradient_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in BODIES:  # counts what it is made of
            with self:
                return BODIES[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self._count(func, args, kwargs or {}, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_meta]
        if not results:
            return
        made = [self.track(t) for t in results]
        name = func._schema.name
        if name == FORWARD_OP:
            count = attention_flops(name, args)
            self.work.attention += count
            # Inside a backward pass, only a checkpoint runs forward kernels; its own machinery asks the same way.
            self.work.attention_again += count if torch._C._current_graph_task_id() != -1 else 0
        elif name == BACKWARD_OP:
            self.work.attention_backward += attention_flops(name, args)
        elif func._overloadpacket in flop_registry:
            self.work.gemm += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif name == ALL_TO_ALL:
            tensor, _, splits, group = args
            sent = tensor.nbytes * (1 - splits[0] / sum(splits))  # what the first rank keeps does not travel
            self.work.exchanged.setdefault(group, Exchanged()).add(Exchanged(calls=1, payload=tensor.nbytes, sent=sent))
        elif name.startswith(("aten::empty", WAIT)):
            return
        elif any(made) or name.rstrip("_") != name or name.startswith("aten::_foreach"):
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta]
            self.work.moved += sum(t.numel() * t.element_size() for t in (*read, *results))

    def track(self, tensor: Tensor) -> bool:
        """Counts a tensor's memory for as long as it is alive; returns whether it was new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return False

        def gone(_: Any) -> None:
            del self.seen[key]
            self.live -= size

        self.seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.spike(0)
        return True

    def ignore(self, module: nn.Module) -> None:
        """Leaves a module's weights out, whose views would else be taken for new tensors."""
        for parameter in module.parameters():
            self.seen[parameter.untyped_storage()._cdata] = None

    def given(self, tensor: Tensor) -> None:
        """Leaves a tensor out that was there before, whose views would else be taken for new ones."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self.seen[key] = weakref.ref(storage, lambda _: self.seen.pop(key, None))

    def spike(self, size: int) -> None:
        """Notes that `size` more bytes were alive for a moment."""
        self.peaks[self.gradient_bytes] = max(self.peaks.get(self.gradient_bytes, 0), self.live + size)

    def gradient(self, key: int, size: int) -> None:
        """Notes that a parameter has a gradient from here on."""
        if key not in self.gradients:
            self.gradients[key] = size
            self.gradient_bytes += size
            self.spike(0)

    def peak(self, share: float = 1.0) -> float:
        """Most bytes alive, with that share of the parameters' gradients (1 over the number of shards)."""
        return max(alive + share * gradients for gradients, alive in self.peaks.items())


class HalfPrecision(TorchFunctionMode):
    """What autocast does to the backbone on CUDA: linear layers in `dtype`, layer norms in float32.

    PyTorch has no autocast for meta tensors. As there, copies of weights that require grad live until the model's call ends.

    Args:
        trace: `trace()` gives the one that holds these copies.
    """

    def __init__(self, dtype: torch.dtype, trace: Callable[[], Trace]):
        super().__init__()
        self.dtype, self.trace = dtype, trace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            args, kwargs = tuple(map(self._half, args)), {key: self._half(value) for key, value in kwargs.items()}
        elif func is torch.nn.functional.layer_norm and isinstance(args[0], Tensor) and args[0].dtype == self.dtype:
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)

    def around(self, module: nn.Module) -> None:
        """Enters this mode in each call of a module: a recomputation in the backward pass runs outside of it."""
        forward = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        module.forward = call

    def _half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.is_meta:
            return value
        trace = self.trace()
        if not (trace.caching and value.requires_grad and value.is_leaf):
            return value.to(self.dtype)
        if id(value) not in trace.casts:
            trace.casts[id(value)] = value.to(self.dtype)
        return trace.casts[id(value)]
