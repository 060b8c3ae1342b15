"""Sequence parallelism: several ranks share the tokens of a sample, and all-to-all over heads gives each its attention.

Each rank has a part of every frame's tokens, and computes everything that is done token by token for these alone. Before
self-attention the ranks trade queries, keys and values, so that each has all tokens of some heads; after it they trade back.
Cached keys and values stay with the rank that has their heads. Cross-attention needs no trade: every rank has the text.

**What gradients mean.** Outside a model all tensors are whole, and every rank computes the same loss from them. So a gradient
that comes to a model from outside is the whole one, the same on every rank, and so is the one that the model gives back for
its latents; that holds for gradients inside an objective, too, such as a penalty on them. A *parameter's* gradient is the part
that is due to the rank's own tokens (or heads): the gradient of the group's samples is the **sum** over its ranks. A trainer
that averages over all ranks, as FSDP and DDP do, has to multiply by the degree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from sftk.errors import SpecError
from sftk.functional.token_split import TokenSplit
from sftk.models.branch import ClassifierBranch
from sftk.models.wan import WanModel


@dataclasses.dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share samples: called with the size of a pass, it gives the pass's exchange.

    Holds the name of the process group, not the group, so that models that have one can be copied and compiled.

    Args:
        name: of the process group. rank: this one's place in it. degree: how many they are.

    Example:
        >>> SequenceGroup(name="", rank=0, degree=2)(3, 16).split.sizes
        (8, 8)
    """

    name: str
    rank: int
    degree: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> SequenceGroup:
        """The group's, for this rank."""
        return cls(name=group.group_name, rank=dist.get_rank(group), degree=dist.get_world_size(group))

    def __call__(self, frames: int, tokens: int) -> TokenExchange:
        return TokenExchange(name=self.name, split=TokenSplit(frames, tokens, self.degree, self.rank))


def share_sequence(model: nn.Module, group: SequenceGroup) -> nn.Module:
    """Makes a model share its tokens with the other ranks of a group, in place, and returns it.

    Its calls then take and give whole tensors as before, on every rank the same; only cached keys and values have the rank's
    heads alone. Every rank of the group must make the same calls. The loss is computed on every rank; each rank's gradient of
    a parameter is then its tokens' part of the whole one, so that gradients are to be **summed** over the group. A classifier
    branch reads whole hidden states on every rank; its gradients count `1 / degree` on each, so that the same sum is right.

    Args:
        model: a backbone or a classifier branch, before it is compiled or sharded.
        group: with a degree of 1 nothing changes.

    Raises:
        SpecError: the degree does not divide the heads.

    Example:
        >>> from sftk.models import preset
        >>> share_sequence(WanModel(preset("digits")), SequenceGroup(name="", rank=0, degree=2))
        Traceback (most recent call last):
        ...
        sftk.errors.SpecError: a sequence degree of 2 does not divide 3 heads; take one of 1, 3
    """
    if group.degree == 1:
        return model
    if isinstance(model, WanModel):
        problem = heads_problem(model.config.num_heads, group.degree)
        if problem is not None:
            raise SpecError(problem)
        model.exchange = group
    elif isinstance(model, ClassifierBranch):
        _count_once(model, group.degree)
    return model


def heads_problem(heads: int, degree: int) -> str | None:
    """What is wrong with a degree for so many heads, or None.

    Example:
        >>> heads_problem(12, 8)
        'a sequence degree of 8 does not divide 12 heads; take one of 1, 2, 3, 4, 6, 12'
    """
    if heads % degree == 0:
        return None
    fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    return f"a sequence degree of {degree} does not divide {heads} heads; take one of {fits}"


@dataclasses.dataclass(frozen=True)
class TokenExchange:
    """The `Exchange` of one pass, over a process group; on meta tensors nothing is sent.

    Args:
        name: of the process group.
        split: who has what.
    """

    name: str
    split: TokenSplit

    def part(self, x: Tensor) -> Tensor:
        return _linear(self._cut, self._gather, x)[0]

    def whole(self, x: Tensor) -> Tensor:
        return _linear(self._gather, self._cut, x)[0]

    def shared(self, x: Tensor) -> Tensor:
        return _linear(_same, self._sum, x)[0] if x.requires_grad else x

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _linear(self._tokens_to_heads, self._heads_to_tokens, *tensors)

    def to_tokens(self, x: Tensor) -> Tensor:
        return _linear(self._heads_to_tokens, self._tokens_to_heads, x)[0]

    def _cut(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.split.part(x),)

    def _gather(self, x: Tensor) -> tuple[Tensor, ...]:
        for_each = x.unsqueeze(2).expand(-1, -1, self.split.degree, -1)
        return (self._tokens_to_heads(for_each)[0].squeeze(2),)

    def _sum(self, x: Tensor) -> tuple[Tensor, ...]:
        op = torch.ops._c10d_functional
        return (op.wait_tensor(op.all_reduce(x.contiguous(), "sum", self.name)),)

    def _tokens_to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        sent = self.split.split_heads(tensors)
        received = self._send(sent, *self.split.sizes_to_heads(sent.numel()))
        return self.split.join_tokens(received, tensors[0].shape, len(tensors))

    def _heads_to_tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        sent = self.split.split_tokens(tensors)
        received = self._send(sent, *self.split.sizes_to_tokens(sent.numel()))
        return self.split.join_heads(received, tensors[0].shape, len(tensors))

    def _send(self, sent: Tensor, come: list[int], go: list[int]) -> Tensor:
        if sent.is_meta:
            return sent.new_empty(sum(come))
        op = torch.ops._c10d_functional
        return op.wait_tensor(op.all_to_all_single(sent, come, go, self.name))


Map = Callable[..., tuple[Tensor, ...]]


def _linear(there: Map, back: Map, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Applies a linear map between the ranks' tensors; `back` takes gradients from its results to its arguments."""
    # Dynamo traces no Function that has a forward mode; in forward mode blocks run eagerly.
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    return (_ForwardMode if forward_mode else _Linear).apply(there, back, *tensors)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    """A linear map and its transpose, which may be differentiated again: the transpose's transpose is the map."""

    @staticmethod
    def forward(there: Map, back: Map, *tensors: Tensor) -> tuple[Tensor, ...]:
        return there(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.there, ctx.back = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_Linear.apply(ctx.back, ctx.there, *grads)  # pyright: ignore[reportGeneralTypeIssues]


class _ForwardMode(_Linear):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        return ctx.there(*tangents[2:])


def _same(x: Tensor) -> tuple[Tensor, ...]:
    return (x.view_as(x),)


def _count_once(branch: ClassifierBranch, degree: int) -> None:
    """Makes a module that every rank runs whole count once in a sum over `degree` ranks: its gradients are divided by the
    degree, those of its hidden states are not."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features, *rest = args
        return tuple(_weighted(x, degree) for x in features), *rest

    def after(_: nn.Module, args: tuple[Any, ...], logits: Any) -> Tensor:
        return _weighted(logits, 1 / degree)

    branch.register_forward_pre_hook(before)
    branch.register_forward_hook(after)


def _weighted(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied on its way back."""
    if not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda grad: grad * factor)
    return x
