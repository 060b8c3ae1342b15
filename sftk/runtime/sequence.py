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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from sftk.errors import SpecError
from sftk.functional.token_split import TokenSplit, degree_problem
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
        sftk.errors.SpecError: sequence 2 does not divide 3 attention heads; take one of 1, 3
    """
    if group.degree == 1:
        return model
    if isinstance(model, WanModel):
        problem = degree_problem(group.degree, model.config.num_heads)
        if problem is not None:
            raise SpecError(problem)
        model.exchange = group
    elif isinstance(model, ClassifierBranch):
        _count_once(model, group.degree)
    return model


@dataclasses.dataclass(frozen=True)
class TokenExchange:
    """The `Exchange` of one pass, over a process group; on meta tensors shapes are enough and nothing is sent.

    Args:
        name: of the process group.
        split: who has what.
    """

    name: str
    split: TokenSplit

    @property
    def degree(self) -> int:
        return self.split.degree

    def part(self, x: Tensor) -> Tensor:
        return self._apply("_cut", "_gather", x)[0]

    def whole(self, x: Tensor) -> Tensor:
        return self._apply("_gather", "_cut", x)[0]

    def shared(self, x: Tensor) -> Tensor:
        return self._apply("_same", "_sum", x)[0] if x.requires_grad else x

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._apply("_tokens_to_heads", "_heads_to_tokens", q, k, v)
        return q, k, v

    def to_tokens(self, x: Tensor) -> Tensor:
        return self._apply("_heads_to_tokens", "_tokens_to_heads", x)[0]

    def _apply(self, there: str, back: str, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> tuple[Tensor, ...]:
        """Applies a linear map between the ranks' tensors; `back` takes gradients from its results to its arguments."""
        # Dynamo traces no Function that has a forward mode; in forward mode blocks run eagerly.
        forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
        function = _ForwardMode if forward_mode else _Linear
        return function.apply(self, there, back, x, y, z)  # pyright: ignore[reportReturnType]

    def _same(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.view_as(x),)

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
        op = torch.ops._c10d_functional
        return op.wait_tensor(op.all_to_all_single(sent, come, go, self.name))


class _Linear(torch.autograd.Function):
    """A linear map and its transpose, which may be differentiated again: the transpose's transpose is the map.

    Maps are methods of an exchange, named, of one or three tensors: Dynamo traces a Function of so many arguments, but neither
    one of any number nor one that is given a function.
    """

    @staticmethod
    def forward(exchange: TokenExchange, there: str, back: str, x: Tensor, y: Any, z: Any) -> tuple[Tensor, ...]:
        return getattr(exchange, there)(*((x,) if y is None else (x, y, z)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.exchange, ctx.there, ctx.back = inputs[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rest = (None,) * (3 - len(grads))
        found = _Linear.apply(ctx.exchange, ctx.back, ctx.there, *grads, *rest)
        return None, None, None, *found, *rest  # pyright: ignore[reportGeneralTypeIssues]


class _ForwardMode(_Linear):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        return getattr(ctx.exchange, ctx.there)(*(tangent for tangent in tangents[3:] if tangent is not None))


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
