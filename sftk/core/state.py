"""States: TensorDicts with no batch size, in which each key documents its own axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, is_tensor_collection

KEYS: dict[str, str] = {
    "latents": "[B, F, C, H, W] clean latents of the data",
    "ode_latents": "[B, S, F, C, H, W] states of a solver's trajectory, noisiest first and clean last",
    "noise": "[B, F, C, H, W] standard normal, the start of a rollout",
    "x0": "[B, F, C, H, W] clean latents that a model predicts",
    "noisy": "[B, F, C, H, W] (1 - sigma) x0 + sigma noise",
    "flow": "[B, F, C, H, W] noise - x0",
    "timestep": "[B, F] in [0, 1000], what a network is told",
    "interval": "[B, F] timesteps from an earlier time up to `timestep`, over which a flow is an average",
    "sigma": "[B, F] in [0, 1], share of noise",
    "prompt_embeds": "[B, L, D] text embeddings",
    "negative_embeds": "[B, L, D] unconditional text embeddings",
    "initial_latents": "[B, F0, C, H, W] given frames that a rollout continues",
    "gradient_mask": "[B, F] bool, frames that carry gradient",
    "cache": "KVCache of the frames so far",
    "key": "Key, from which every random draw of the step comes (host value)",
    "blocks": "tuple of Block, the plan of a rollout (host value)",
    "loss": "[] sum of the loss over the batch",
    "loss_weight": "[] what the sum is divided by, once it is reduced over the global batch",
}
"""What the keys of a State hold: axes, units and meaning."""


def to_state(values: Mapping[str, Any], like: Any = None) -> Any:
    """Values as a State: a TensorDict when `like` is one (host values become `NonTensorData`), else a plain dict.

    Example:
        >>> state = to_state({"x": torch.zeros(2, 3), "steps": (1000, 750)}, like=TensorDict())
        >>> state["x"].shape, state["steps"]
        (torch.Size([2, 3]), (1000, 750))
    """
    if not is_tensor_collection(like):
        return dict(values)
    state = TensorDict()
    for key, value in values.items():
        if isinstance(value, torch.Tensor) or is_tensor_collection(value):
            state[key] = value
        else:
            state.set_non_tensor(key, value)
    return state


def from_state(state: Any) -> dict[str, Any]:
    """The entries of a State as a plain dict, host values unwrapped. Tensors are shared, not copied.

    Example:
        >>> from_state(to_state({"steps": (1, 2)}, like=TensorDict()))
        {'steps': (1, 2)}
    """
    if not is_tensor_collection(state):
        return dict(state)
    found = {}
    for key in state.keys():  # noqa: SIM118 - a TensorDict iterates over its batch, not its keys
        value = state.get(key)
        found[key] = value.data if isinstance(value, NonTensorData) else value
    return found
