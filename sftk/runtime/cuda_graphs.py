"""CUDA graphs of cached passes without gradient: a rollout makes many short ones, at which a host is slower than the GPU."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sftk.core.numerics import rounds_as_with_gradient
from sftk.errors import SftkError
from sftk.functional.attention import is_exact
from sftk.functional.free_space import LayerKV, TextKV
from sftk.functional.rooms import set_room_memory, tensors_of
from sftk.models.held_linear import HeldLinear
from sftk.models.trunk import BlockCall, Passed, run_blocks

MOST_GRAPHS = 64
"""Graphs that one model keeps; of more, those that were not replayed for longest are dropped."""
_captured = 0


def captured_graphs() -> int:
    """How many CUDA graphs were captured in this process.

    Example:
        >>> captured_graphs()
        0
    """
    return _captured


def replay_passes(model: nn.Module) -> nn.Module:
    """Lets a backbone replay its cached passes without gradient, in place, and returns it.

    Caches are allocated in memory of their own from then on, so that a rollout's has the addresses of the one before.

    Args:
        model: has `blocks`, all on one CUDA device, whole, and `trunk`.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> model = replay_passes(WanModel(preset("digits")))
        >>> model(torch.zeros(1, 3, 4, 8, 8), torch.zeros(1, 3), torch.zeros(1, 4, 32))[0].shape, captured_graphs()
        (torch.Size([1, 3, 4, 8, 8]), 0)
    """
    model.trunk = GraphedTrunk(model)  # pyright: ignore[reportArgumentType]
    if torch.cuda.is_available():
        set_room_memory(_room_memory)
    return model


_rooms: Any = None


def _room_memory() -> AbstractContextManager[None]:
    global _rooms
    _rooms = _rooms or torch.cuda.MemPool()
    return torch.cuda.use_mem_pool(_rooms)


def release_room_memory() -> None:
    """Gives the memory of caches that nobody holds back to the device; later ones have other addresses.

    Example:
        >>> release_room_memory()
    """
    global _rooms
    _rooms = None


@attrs.frozen(eq=False)
class _Recorded:
    """A graph, and the tensors in which it leaves its results: hidden states where all graphs of their shape leave them."""

    graph: Any
    x: Tensor
    kv: tuple[LayerKV, ...]


class GraphedTrunk:
    """Takes hidden states through a backbone's blocks, and replays the kernels of passes that come again.

    Those are passes without gradient whose cache is empty, or has space behind it (`free_space`). The first pass of a kind runs
    as ever, which compiles what has to be; the second one is captured; from then on the host launches one graph instead of some
    600 kernels. A graph refers to addresses, of weights and of cached keys and values; with others it is another kind of pass.

    Args:
        model: see `replay_passes`.

    Source: CUDA graphs as PyTorch has them, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, model: nn.Module):
        blocks = model.get_submodule("blocks")
        self._weights = list(blocks.parameters())
        self._held = [module for module in blocks.modules() if isinstance(module, HeldLinear)]
        self._graphs: OrderedDict[Hashable, _Recorded | None] = OrderedDict()
        self._inputs: dict[Hashable, Tensor] = {}
        self._text: tuple[TextKV, TextKV] | None = None
        self._pool: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy of the model: graphs stay behind, since they refer to addresses."""
        return {**self.__dict__, "_graphs": OrderedDict(), "_inputs": {}, "_text": None, "_pool": None}

    def __call__(self, blocks: nn.ModuleList, x: Tensor, call: BlockCall, wanted: Collection[int] = ()) -> Passed:
        if not _replayable(x, call, wanted):
            return run_blocks(blocks, x, call, wanted)
        key = self._key(x, call)
        x, call = self._place("x", x), self._placed(call)
        known, recorded = key in self._graphs, self._graphs.get(key)
        if known and recorded is None:
            recorded = self._record(blocks, x, call)
        self._graphs[key] = recorded
        self._graphs.move_to_end(key)
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        if recorded is None:
            return run_blocks(blocks, x, call)
        recorded.graph.replay()
        return recorded.x, tuple(_copied(layer) for layer in recorded.kv), {}

    def _key(self, x: Tensor, call: BlockCall) -> Hashable:
        """All that a graph depends on but for the numbers in its inputs."""
        held = (tensor for layer in self._held if layer.held is not None for tensor in layer.parts(layer.held))
        addresses = (*call.rope, *(call.past_rope or ()), *self._weights, *held)
        past = [tensor for chunks in call.past for tensor in tensors_of(chunks)]
        text = None if call.text is None else call.text.shape
        modes = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_inference_mode_enabled()
        return (
            (x.shape, x.dtype, call.time.shape, text, call.backend, call.text_backend, modes),
            tuple(tensor.data_ptr() for tensor in addresses),
            # Rooms of different lengths have their samples at other distances; of one sample that matters to nobody.
            tuple((tensor.data_ptr(), tensor.shape, tensor.stride()[len(tensor) == 1 :]) for tensor in past),
        )

    def _placed(self, call: BlockCall) -> BlockCall:
        """The pass with its inputs where graphs look for them."""
        text = None if call.text is None else self._place("text", call.text)
        text_kv = None
        if call.text_kv is not None:
            if self._text is None or self._text[0] is not call.text_kv:  # one for all passes of a rollout
                pairs = enumerate(call.text_kv)
                self._text = call.text_kv, tuple((self._place((i, "k"), k), self._place((i, "v"), v)) for i, (k, v) in pairs)
            text_kv = self._text[1]
        return dataclasses.replace(call, time=self._place("time", call.time), text=text, text_kv=text_kv)

    def _place(self, name: Hashable, tensor: Tensor) -> Tensor:
        """A copy of an input at the address that all inputs of its name, shape and strides have."""
        kind = (name, tensor.shape, tensor.stride(), tensor.dtype)
        if kind not in self._inputs:
            with torch.inference_mode(False):
                self._inputs[kind] = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
        return self._inputs[kind].copy_(tensor)

    def _record(self, blocks: nn.ModuleList, x: Tensor, call: BlockCall) -> _Recorded:
        """Captures a pass; it runs when the graph is replayed."""
        global _captured
        graph, kept = torch.cuda.CUDAGraph(), self._place("out", x)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # Other threads (of data loaders, checkpoints) may go on calling CUDA.
            with _own_casts(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out, kv, _ = run_blocks(blocks, x, call)
                kept.copy_(out)
        except Exception as error:
            reason = str(error).strip().splitlines()[:1]
            raise SftkError(
                f"a pass of {list(x.shape)} hidden states could not be captured as a CUDA graph ({type(error).__name__}: "
                f"{''.join(reason)}); set cuda_graphs: false in the recipe"
            ) from error
        _captured += 1
        return _Recorded(graph, kept, kv)


@contextmanager
def _own_casts() -> Iterator[None]:
    """Within, weights are cast anew, and no cast stays behind: what is captured casts them each time that it is replayed.

    Autocast keeps casts until the outermost one ends, which may be a caller's around many passes: one made before goes away
    while a graph still reads it, and one made in a graph's memory holds nothing until the graph is replayed. Autocast's cache
    is emptied, not turned off: compiled blocks are compiled for either, and this is no time to compile.

    Source: https://docs.pytorch.org/docs/stable/amp.html#torch.autocast, `cache_enabled`.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _replayable(x: Tensor, call: BlockCall, wanted: Collection[int]) -> bool:
    differentiated = rounds_as_with_gradient() or forward_ad._current_level >= 0 or is_exact()
    alone = not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing() if x.is_cuda else False
    cached = call.joint or (call.keep_kv and not any(call.past))
    return alone and cached and not differentiated and call.mask is None and not wanted


def _copied(layer: LayerKV) -> LayerKV:
    k, v, text_k, text_v = (tensor.clone() for tensor in layer)
    return k, v, text_k, text_v
