"""What stands behind a role in a graph: a module, called under the run's precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sftk.models.branch import ClassifierBranch


class Port:
    """Calls a module with plain tensors, under autocast when the run is in half precision.

    Args:
        module: a backbone.
        dtype: compute dtype of autocast; None calls the module as it is.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> port = Port(WanModel(preset("digits")), None)
        >>> port(torch.zeros(1, 3, 4, 8, 8), torch.zeros(1, 3), torch.zeros(1, 4, 32))[0].shape
        torch.Size([1, 3, 4, 8, 8])
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None):
        self.module, self.dtype = module, dtype

    def __call__(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.dtype is None or latents.is_meta:
            return self.module(latents, *args, **kwargs)
        with torch.autocast(latents.device.type, self.dtype):
            flow, kv, features = self.module(latents, *args, **kwargs)
        return flow.to(latents.dtype), kv, features


class BranchPort:
    """Calls a classifier branch with plain tensors, under autocast when the run is in half precision; logits in float32.

    Args:
        module: the branch.
        dtype: compute dtype of autocast; None calls the module as it is.

    Example:
        >>> from sftk.models import BranchConfig, ClassifierBranch, preset
        >>> port = BranchPort(ClassifierBranch(preset("digits"), BranchConfig(layers=(0,))), None)
        >>> port((torch.zeros(1, 16, 96),), torch.zeros(1, 1)).shape
        torch.Size([1, 1])
    """

    def __init__(self, module: ClassifierBranch, dtype: torch.dtype | None):
        self.module, self.dtype, self.features_at = module, dtype, module.features_at

    def __call__(self, features: tuple[Tensor, ...], timestep: Tensor) -> Tensor:
        if self.dtype is None or timestep.is_meta:
            return self.module(features, timestep)
        with torch.autocast(timestep.device.type, self.dtype):
            return self.module(features, timestep).float()


def make_port(module: nn.Module, dtype: torch.dtype | None) -> Port | BranchPort:
    """The port of a backbone or of a classifier branch.

    Example:
        >>> from sftk.models import WanModel, preset
        >>> type(make_port(WanModel(preset("digits")), None)).__name__
        'Port'
    """
    return BranchPort(module, dtype) if isinstance(module, ClassifierBranch) else Port(module, dtype)
