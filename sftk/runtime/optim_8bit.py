"""AdamW with states of a byte each, through torchao: made, and its states taken in and out of checkpoints as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sftk.errors import SftkError
from sftk.runtime.shards import local
from sftk.spec.optimizer import OptimizerSection


def make_adamw_8bit(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    """torchao's AdamW with 8-bit states; of a sharded parameter each rank quantises its own rows.

    Raises:
        SftkError: torchao is not installed.

    Source: block-wise quantised states, arXiv 2110.02861.
    """
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        message = "optimizers with use: adamw_8bit need the package torchao"
        raise SftkError(f"{message}; install it with `pip install 'sftk[lowp]'`, or take use: adamw") from error
    return AdamW8bit(groups, lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)


def plain_state(value: Any) -> Tensor:
    """A state as a plain tensor: a quantised one as the float32 values that it stands for, on the CPU; others as they are.

    Example:
        >>> plain_state(torch.ones(1))
        tensor([1.])
    """
    if not hasattr(local(value), "dequantize") or not hasattr(local(value), "codes"):
        return value
    values = local(value).to("cpu").dequantize()
    if not isinstance(value, DTensor):
        return values
    mesh, placements = value.device_mesh, value.placements
    made = DTensor.from_local(values, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
    return made.to("cpu")  # from_local moves it to the mesh's device


def quantized_states(
    optimizer: torch.optim.Optimizer, found: Mapping[Tensor, Mapping[str, Tensor]]
) -> dict[Tensor, dict[str, Tensor]]:
    """Restored states as the optimiser keeps them: values that stood for codes become the same codes again, with scales that
    are the same to rounding (and new ones where a block is split over other ranks).

    Args:
        optimizer: any; one without quantised states gets them as they are.
        found: parameter to name to plain tensor.
    """
    make = getattr(optimizer, "_new_buffer", None)
    states = {parameter: dict(values) for parameter, values in found.items()}
    if make is None:
        return states
    for parameter, values in states.items():
        for name, value in values.items():
            if name.startswith("exp_avg"):
                values[name] = make(parameter, name == "exp_avg")
                _fill(local(values[name]), local(value))
    return states


def _fill(state: Any, values: Tensor) -> None:
    """Quantises values that stood for codes. torchao's own way takes a block's largest value for its scale, but the most
    negative code stands for a little less than the scale."""
    if not hasattr(state, "codes"):
        state.copy_(values)
        return
    blocks, qmap = values.to(state.codes.device).reshape(-1, state.block_size), state.qmap
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = torch.where(largest < 0, largest / qmap.min(), largest / qmap.max()).clip(1e-12)
    between = (qmap[1:] + qmap[:-1]) / 2
    state.scale.copy_(scale.flatten())
    state.codes.copy_(torch.bucketize(blocks / scale, between).reshape(state.codes.shape))
