"""States: TensorDicts with no batch size, in which each key documents its own axes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

KEYS: dict[str, str] = {
    # data
    "latents": "[B, F, C, H, W] clean latents of the data",
    "ode_latents": "[B, S, F, C, H, W] states of a solver's trajectory, noisiest first and clean last",
    "initial_latents": "[B, F0, C, H, W] given frames that a rollout continues",
    "prompt_embeds": "[B, L, D] text embeddings",
    "negative_embeds": "[B, L, D] unconditional text embeddings",
    "labels": "[B, ...] what a reward compares samples with",
    # draws
    "key": "Key, from which every random draw of the step comes (host value)",
    "noise": "[B, F, C, H, W] standard normal, the start of a rollout",
    "timestep": "[B, F] in [0, 1000], what a network is told",
    "interval": "[B, F] timesteps from an earlier time up to `timestep`, over which a flow is an average",
    # predictions
    "x0": "[B, F, C, H, W] clean latents that a model predicts",
    "noisy": "[B, F, C, H, W] (1 - sigma) x0 + sigma noise, with sigma = timestep / 1000",
    "flow": "[B, F, C, H, W] noise - x0",
    "samples": "[B, F, C, H, W] the student's, from an earlier phase",
    "states": "tuple of [B, F, C, H, W], a solver's state after each step",
    # rollout
    "blocks": "tuple of Block, the plan of a rollout (host value)",
    "cache": "KVCache of the frames so far",
    "exit_from": "unshifted timestep of the exit step that all blocks share, else None (host value)",
    "exit_to": "unshifted timestep of the step after it, 0 after the last, else None (host value)",
    "gradient_mask": "[B, F] bool, frames that carry gradient",
    "rollout_x0": "[B, F, C, H, W] a whole rollout, of which `x0` is the window that is judged",
    "student_timestep": "[B, F] in [0, 1000], an entry of the student's step list for each block",
    "student_noisy": "[B, F, C, H, W] latents noised to it",
    # scores
    "score_timestep": "[B, F] in [0, 1000], where scores are compared",
    "score_noise": "[B, F, C, H, W] standard normal",
    "score_noisy": "[B, F, C, H, W] x0 noised to `score_timestep`",
    "fake_x0": "[B, F, C, H, W] what the critic takes `score_noisy` for",
    "real_x0": "[B, F, C, H, W] what the guided teacher takes it for",
    "grad": "[B, F, C, H, W] gradient of the loss with respect to x0",
    "gradient_weight": "[B, F] or [B, 1] weights of the samples' gradients",
    "fake_logits": "[B, K] the discriminator's, of the student's noised samples; high where they look real",
    "real_logits": "[B, K] those of noised real latents",
    "score": "[B] a reward's judgement; higher is better",
    # losses and what is watched
    "loss": "[] sum of the loss over the batch",
    "loss_weight": "[] what the sum is divided by, once it is reduced over the global batch",
    "denoising_loss": "[] the critic's own part of a sum of losses",
    "gan_loss": "[] the adversarial part",
    "r1_loss": "[] penalty on real latents, weighted",
    "r2_loss": "[] penalty on the student's samples, weighted",
    "gradient_norm": "[] mean magnitude of `grad`",
    "error": "[] mean squared error, where the loss is divided by it",
}
"""What the keys of a State hold: axes, units and meaning."""


def _is_tensordict(value: Any) -> bool:
    """Without an import, which takes as long as torch's own: where tensordict was not imported, nobody made one."""
    tensordict = sys.modules.get("tensordict")
    return tensordict is not None and tensordict.is_tensor_collection(value)


def to_state(values: Mapping[str, Any], like: Any = None) -> Any:
    """Values as a State: a TensorDict when `like` is one (host values become `NonTensorData`), else a plain dict.

    Example:
        >>> from tensordict import TensorDict
        >>> state = to_state({"x": torch.zeros(2, 3), "steps": (1000, 750)}, like=TensorDict())
        >>> state["x"].shape, state["steps"]
        (torch.Size([2, 3]), (1000, 750))
    """
    if not _is_tensordict(like):
        return dict(values)
    from tensordict import TensorDict

    state = TensorDict()
    for key, value in values.items():
        if isinstance(value, torch.Tensor) or _is_tensordict(value):
            state[key] = value
        else:
            state.set_non_tensor(key, value)
    return state


def detached(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without history for backward; tensors in tuples and caches, too.

    Example:
        >>> x0 = torch.ones(1, requires_grad=True)
        >>> found = detached({"x0": x0, "blocks": (x0,), "exit_from": None})
        >>> found["x0"].requires_grad, found["blocks"][0].requires_grad, found["exit_from"]
        (False, False, None)
    """
    return {key: pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value) for key, value in values.items()}


def from_state(state: Any) -> dict[str, Any]:
    """The entries of a State as a plain dict, host values unwrapped. Tensors are shared, not copied.

    Example:
        >>> from tensordict import TensorDict
        >>> from_state(to_state({"steps": (1, 2)}, like=TensorDict()))
        {'steps': (1, 2)}
    """
    if not _is_tensordict(state):
        return dict(state)
    from tensordict import NonTensorData

    found = {}
    for key in state.keys():  # noqa: SIM118 - a TensorDict iterates over its batch, not its keys
        value = state.get(key)
        found[key] = value.data if isinstance(value, NonTensorData) else value
    return found
