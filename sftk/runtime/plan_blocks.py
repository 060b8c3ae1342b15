"""Transformer blocks on meta tensors: one of each kind of call is run and measured, the others repeat what it cost."""

from __future__ import annotations

import weakref
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sftk.runtime.plan_trace import Trace, Work


@attrs.define
class Active:
    """The trace that counts at the moment; a measured block has one of its own."""

    trace: Trace


@attrs.frozen(kw_only=True)
class BlockCost:
    """What a call of a block costs above what was alive when it began.

    Args:
        outputs: shape and dtype of each output, the place of the input that it is, or None.
        forward, backward: work.
        peak, backward_peak: most bytes, without gradients of parameters.
        kept: bytes held for backward, besides inputs and outputs.
        held: inputs that are held for backward.
    """

    structure: Any
    outputs: tuple[tuple[torch.Size, torch.dtype] | int | None, ...]
    forward: Work
    peak: int
    kept: int = 0
    held: tuple[bool, ...] = ()
    backward: Work = attrs.field(factory=Work)
    backward_peak: int = 0


class MeasuredBlock(nn.Module):
    """Stands for a block of a backbone on meta tensors.

    Args:
        block: as it would run, with its activation checkpoint.
        active: the trace that counts.
        costs: what calls cost, by their shapes; shared by the equal blocks of one model.
    """

    def __init__(self, block: nn.Module, active: Active, costs: dict[Any, BlockCost]):
        super().__init__()
        self.block, self.active, self.costs = block, active, costs
        linear = [m.weight for m in block.modules() if isinstance(m, nn.Linear)]
        self.cast_elements = sum(weight.numel() for weight in linear if weight.dtype == torch.float32)
        self.size = sum(p.numel() * p.element_size() for p in block.parameters())

    def forward(self, *args: Any) -> Any:
        leaves, structure = tree_flatten(args)
        trains, grad = next(self.block.parameters()).requires_grad, torch.is_grad_enabled()
        shapes = tuple((t.shape, t.dtype, grad and t.requires_grad) if isinstance(t, Tensor) else t for t in leaves)
        key = (shapes, structure, trains, grad)
        if key not in self.costs:
            self.costs[key] = self._measure(leaves, structure, grad)
        cost, trace = self.costs[key], self.active.trace
        if trace.caching and trains and self.cast_elements and not (grad and cost.held):
            trace.casts.setdefault(id(self), torch.empty(self.cast_elements, dtype=torch.bfloat16, device="meta"))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        if grad and (trains or any(t.requires_grad for t in tensors)):
            outputs = list(_Repeat.apply(self, cost, trains, *tensors, *_anchor(trains)))
        else:
            trace.spike(cost.peak)
            trace.work.add(cost.forward)
            outputs = _empty(cost, tensors)
        found = [
            None if made is None else tensors[made] if isinstance(made, int) else out
            for made, out in zip(cost.outputs, outputs, strict=True)
        ]
        return tree_unflatten(found, cost.structure)

    def _measure(self, leaves: list[Any], structure: Any, grad: bool) -> BlockCost:
        outer = self.active.trace
        outer.paused = True
        self.active.trace = trace = Trace()
        trace.ignore(self.block)
        try:
            return self._run(leaves, structure, grad, trace)
        finally:
            self.active.trace, outer.paused = outer, False
            for parameter in self.block.parameters():
                parameter.grad = None

    def _run(self, leaves: list[Any], structure: Any, grad: bool, trace: Trace) -> BlockCost:
        places = [index for index, t in enumerate(leaves) if isinstance(t, Tensor)]
        roots = [torch.empty_like(leaves[i]).requires_grad_(grad and leaves[i].requires_grad) for i in places]
        fresh = [root.clone() for root in roots]
        inputs = {t.untyped_storage()._cdata: index for index, t in enumerate(fresh)}
        alive = [weakref.ref(t.untyped_storage()) for t in fresh]
        for tensor in fresh:
            trace.given(tensor)
        given: list[Any] = list(leaves)
        for index, place in enumerate(places):
            given[place] = fresh[index]
        with trace:
            out = self.block(*tree_unflatten(given, structure))
        outputs, out_structure = tree_flatten(out)
        made = tuple(None if t is None else inputs.get(t.untyped_storage()._cdata, (t.shape, t.dtype)) for t in outputs)
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in outputs if t is not None}
        own = sum(size for key, size in storages.items() if key not in inputs)
        forward, peak, kept = trace.work, int(trace.peak(0.0)), max(trace.live - own, 0)
        first = outputs[0]
        del given, fresh, out, outputs
        if not first.requires_grad:
            return BlockCost(structure=out_structure, outputs=made, forward=forward, peak=peak)
        held = tuple(ref() is not None for ref in alive)
        trace.work, before, trace.peaks = Work(), trace.live, {trace.gradient_bytes: trace.live}
        with trace:
            torch.autograd.backward(first, torch.empty_like(first))
        return BlockCost(
            structure=out_structure,
            outputs=made,
            forward=forward,
            peak=peak,
            kept=kept,
            held=held,
            backward=trace.work,
            backward_peak=max(int(trace.peak(0.0)) - before, 0),
        )


def _empty(cost: BlockCost, tensors: list[Tensor]) -> list[Tensor]:
    return [
        torch.empty(made[0], dtype=made[1], device="meta") if isinstance(made, tuple) else torch.empty(0, device="meta")
        for made in cost.outputs
    ]


def _anchor(trains: bool) -> tuple[Tensor, ...]:
    """Makes the outputs of a trained block require grad even where no input does."""
    return (torch.empty(0, device="meta", requires_grad=True),) if trains else ()


class _Repeat(torch.autograd.Function):
    """A call of a block that costs what the measured one did."""

    @staticmethod
    def forward(ctx, module: MeasuredBlock, cost: BlockCost, trains: bool, *tensors: Tensor):
        trace = module.active.trace
        trace.spike(cost.peak)
        trace.work.add(cost.forward)
        kept = torch.empty(cost.kept, dtype=torch.uint8, device="meta")
        ctx.module, ctx.cost, ctx.trains = module, cost, trains
        ctx.shapes = [(t.shape, t.dtype) for t in tensors]
        ctx.save_for_backward(kept, *(t for t, held in zip(tensors, cost.held, strict=False) if held))
        return tuple(_empty(cost, list(tensors)))

    @staticmethod
    def backward(ctx, *grads):
        module, cost = ctx.module, ctx.cost
        trace = module.active.trace
        if ctx.trains:
            trace.gradient(id(module), module.size)
        trace.spike(cost.backward_peak)
        trace.work.add(cost.backward)
        wanted = ctx.needs_input_grad[3:]
        found = [
            torch.empty(shape, dtype=dtype, device="meta") if need else None
            for (shape, dtype), need in zip(ctx.shapes, wanted, strict=True)
        ]
        return None, None, None, *found


def measure_blocks(model: nn.Module, active: Active) -> None:
    """Replaces the blocks of a backbone on meta tensors, and counts the gradients of its other parameters.

    Args:
        model: with its activation checkpoints.
        active: the trace that counts.
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleList):
        costs: dict[Any, BlockCost] = {}
        for index, block in enumerate(blocks):
            blocks[index] = MeasuredBlock(block, active, costs)
    for parameter in model.parameters():
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(lambda p: _move(p, active))


def _move(parameter: Tensor, active: Active) -> None:
    """Takes a gradient out of the memory that is alive and into the count of gradients."""
    active.trace.gradient(id(parameter), parameter.numel() * parameter.element_size())
    parameter.grad = None
