"""Parameter names of the Wan transformer: the original ones, which are ours, and those of diffusers, from one table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Naming = Literal["original", "diffusers"]

MODULES: tuple[tuple[str, str], ...] = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)
"""Modules (and bare parameters) outside the blocks: original name, diffusers' name."""

BLOCK_MODULES: tuple[tuple[str, str], ...] = (
    ("modulation", "scale_shift_table"),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    *(
        (f"{ours}.{part}", f"{theirs}.{other}")
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, other in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
)
"""The same inside `blocks.<index>`."""

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Components that FSDP, activation checkpointing and torch.compile put into names, anywhere."""

_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def _table(rules: tuple[tuple[str, str], ...], to: Naming) -> dict[str, str]:
    return dict(rules) if to == "diffusers" else {theirs: ours for ours, theirs in rules}


_TABLES = {to: (_table(MODULES, to), _table(BLOCK_MODULES, to)) for to in ("original", "diffusers")}


def rename(name: str, to: Naming) -> str:
    """A parameter's name under the other naming; one that no rule knows stays as it is.

    Args:
        name: in the naming that is not `to`.
        to: the naming wanted.

    Example:
        >>> rename("blocks.3.cross_attn.o.weight", "diffusers")
        'blocks.3.attn2.to_out.0.weight'
        >>> rename("blocks.3.norm2.bias", "original"), rename("scale_shift_table", "original")
        ('blocks.3.norm3.bias', 'head.modulation')
    """
    outside, inside = _TABLES[to]
    match = _BLOCK.fullmatch(name)
    prefix, rest = match.groups() if match else ("", name)
    table = inside if match else outside
    if rest in table:
        return prefix + table[rest]
    module, dot, parameter = rest.rpartition(".")
    return f"{prefix}{table[module]}{dot}{parameter}" if module in table else name


def unwrap(name: str) -> str:
    """A name without what wrappers added: `WRAPPERS` anywhere, and `module.` and `model.` in front.

    Example:
        >>> unwrap("model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod.ffn.0.bias")
        'blocks.0.ffn.0.bias'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in ("module", "model"):
        parts = parts[1:]
    return ".".join(parts)


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether names are diffusers'.

    Example:
        >>> is_diffusers(["condition_embedder.time_proj.weight"]), is_diffusers(["time_projection.1.weight"])
        (True, False)
    """
    return any(name.startswith("condition_embedder.") or ".attn1." in name for name in names)
