"""Multistep solvers of the probability-flow ODE, through diffusers' schedulers, as values."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import attrs
from torch import Tensor

from sftk.core.extras import import_extra
from sftk.functional.plan import Step
from sftk.functional.schedule import TIMESTEPS

SolverName = Literal["euler", "unipc", "dpm++"]

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
}


@attrs.frozen(eq=False)
class MultistepSolver:
    """One of diffusers' schedulers between two steps. `step` returns the next one and changes nothing.

    Args:
        scheduler: holds the flows of the steps before.

    Source: UniPC, arXiv 2302.04867; DPM-Solver++, arXiv 2211.01095; on the flow-matching path, as Wan 2.1 samples.

    Example:
        >>> import torch
        >>> solver, steps = start_multistep("unipc", 2, shift=5.0)
        >>> noisy, solver = solver.step(torch.ones(1, 3), torch.zeros(1, 3))
        >>> noisy.shape, [step.timestep for step in steps]
        (torch.Size([1, 3]), [999.0, 833.0])
    """

    scheduler: Any

    def step(self, noisy: Tensor, flow: Tensor) -> tuple[Tensor, MultistepSolver]:
        """The latents at the next timestep, and the solver for the step from there.

        Args:
            noisy, flow: [B, ...], at the step's timestep.
        """
        following = copy.copy(self.scheduler)
        for name, value in vars(following).items():
            if isinstance(value, list):  # what it remembers, which it writes in place
                setattr(following, name, list(value))
        index = following.step_index or 0
        found = following.step(flow, following.timesteps[index], noisy, return_dict=False)[0]
        return found.to(noisy.dtype), MultistepSolver(following)


def start_multistep(name: str, steps: int, shift: float) -> tuple[MultistepSolver, tuple[Step, ...]]:
    """A solver before its first step, and its steps: the scheduler's own timesteps, which are whole numbers.

    Raises:
        SftkError: diffusers is not installed.

    Example: see `MultistepSolver`.
    """
    kind, options = _SCHEDULERS[name]
    library = import_extra("diffusers", f"the solver {name!r}")
    scheduler = getattr(library, kind)(
        num_train_timesteps=TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **options
    )
    with warnings.catch_warnings():  # of NumPy, about how diffusers calls it
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    times = (*(float(time) for time in scheduler.timesteps), 0.0)
    plan = tuple(Step(index=i, timestep=times[i], next_timestep=times[i + 1]) for i in range(len(times) - 1))
    return MultistepSolver(scheduler), plan
