"""What kind a pass is, and what follows: its attention, the operations between its products, where its keys and values go."""

from __future__ import annotations

import dataclasses

import torch
from torch.autograd import forward_ad

from sftk.core.numerics import rounds_as_with_gradient
from sftk.functional.attention import Backend, Kernel, is_exact, settled
from sftk.functional.rooms import CachedKV
from sftk.models.block_ops import PLAIN, BlockOps
from sftk.models.past import attends_apart

FP8_TRAINING = 16384
"""Tokens of a pass with gradient from which attention in fp8 pays: shorter ones would wait for the host."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassKind:
    """What is known of a pass before its first block. All of it is settled here, so that no compiled block asks.

    Args:
        device: of the latents.
        dtype: of linear layers' outputs, and so of keys and values.
        tokens: of the pass itself.
        cached: tokens of the frames that came before.
        masked: whether some tokens do not see some others.

    Example:
        >>> kind = PassKind(device=torch.device("cpu"), dtype=torch.float32, tokens=12, cached=0, masked=False)
        >>> kind.attention("sdpa", fp8=True, trains=False), kind.writes
        ('sdpa', False)
        >>> with torch.no_grad():
        ...     kind.attention("sdpa", fp8=True, trains=False), kind.writes
        ('fp8', True)
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    cached: int
    masked: bool

    @property
    def once(self) -> bool:
        """Whether one backward pass is all that may follow: neither forward mode nor a derivative of a derivative."""
        return forward_ad._current_level < 0 and not is_exact()

    @property
    def half(self) -> bool:
        """Whether it computes on CUDA in half precision."""
        return self.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)

    @property
    def writes(self) -> bool:
        """Whether its keys and values may be written behind the cached ones: nobody differentiates it, nobody traces it.

        Where somebody traces a model or maps it over samples, nothing is written to what is not the trace's own.
        """
        traced = torch.compiler.is_compiling() or _mapped()
        return not (torch.is_grad_enabled() or traced or self.masked) and self.once

    def attention(self, backend: Backend, *, fp8: bool, trains: bool) -> Kernel:
        """Self-attention's kernel.

        Args:
            backend: the model's.
            fp8: it is to be in fp8 where it can be. trains: in long passes with gradient, too.
        """
        able = not rounds_as_with_gradient() or (trains and self.tokens >= FP8_TRAINING)
        if fp8 and able and self.once and not self.masked:
            return "fp8"
        keys = self.tokens + self.cached
        return backend if self.masked else settled(backend, self.tokens, keys, self.device, self.dtype)

    def text_attention(self, backend: Backend, text_tokens: int) -> Backend:
        """Cross-attention's kernel."""
        return settled(backend, self.tokens, text_tokens, self.device, self.dtype)

    def apart(self, past: tuple[tuple[CachedKV, ...], ...], kernel: Kernel) -> bool:
        """Whether blocks attend to what is cached without joining it: where a pass has gradient, or rounds as if it had."""
        return self.once and not _mapped() and rounds_as_with_gradient() and attends_apart(past, kernel, self.dtype)

    def ops(self, ops: BlockOps) -> BlockOps:
        """What computes between its products: the given operations where they can, and where they pay."""
        worth = self.tokens >= ops.worth or not rounds_as_with_gradient()
        return ops if self.half and self.once and worth else PLAIN


def _mapped() -> bool:
    """Whether a transformation of `torch.func` runs the model."""
    return torch._C._functorch.maybe_current_level() is not None  # pyright: ignore
