"""Cases of the parity folder: which files there are, what they hold, and whether everything in them was compared."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sftk.models import WanConfig, WanModel

FOLDER = Path(os.environ.get("SFTK_PARITY_DIR") or Path(__file__).parent / "vectors")

FORWARD = 2e-5
GRADIENT = 1e-4
LOW_CLAMP = 1e-3
"""Tolerances of the vectors' own description, as maximum absolute difference over maximum absolute reference value."""

ROLLOUT_INPUTS = r"noise|prompt_embeds|initial_latent|renoise_b\d+_s\d+|context_noise_b\d+|cotangent"
SCORE_INPUTS = "x0|noise|prompt_embeds|negative_prompt_embeds|raw_timestep|gradient_mask"
FAMILIES = {
    "weights": "",
    "schedule": r"shift[\d.]+\.(x0|noise|flow|query\.timestep|infer\d+\.step_timestep)",
    "timestep_sampling": r"raw|.+\.raw",
    "wan_forward": "x|t|prompt_embeds|cotangent",
    "causal_forward": "x|t|prompt_embeds|cotangent",
    "teacher_forcing": "x|t|prompt_embeds|cotangent|clean_x|aug_t",
    "rollout": ROLLOUT_INPUTS,
    "inference": ROLLOUT_INPUTS,
    "critic_flow": SCORE_INPUTS,
    "denoising_losses": "x|noise|x_pred|noise_pred|flow_pred|alphas_cumprod|timestep",
    "dmd_generator_step": ROLLOUT_INPUTS + "|negative_prompt_embeds|score_noise|raw_timestep",
    "dmd": SCORE_INPUTS,
    "sid": SCORE_INPUTS,
    "gan": r"logit_(real|fake)(_perturbed)?|x_real|x_fake|raw_timestep|[dg]\.(noise_\w+|r\d_perturbation_noise)",
    "ode_regression": "ode_latent|prompt_embeds|raw_random_index",
    "lmdb": "",
}
"""File name prefix, after which the test that runs the file is named, and the keys that are inputs; all others are results."""

DEFAULTS = {"score_shift": 8.0, "min_step": 20, "max_step": 980}
"""The reference's built-in values, for a case that does not record them in a folder that does not either."""


def family_of(name: str) -> str | None:
    """The longest known prefix of a file's name."""
    known = [prefix for prefix in FAMILIES if re.match(rf"{prefix}(?![a-z])", name)]
    return max(known, key=len, default=None)


@functools.lru_cache(maxsize=1)
def case_names() -> tuple[str, ...]:
    """Names of all files in the folder, without their ending."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


@functools.lru_cache(maxsize=256)
def read_metadata(name: str) -> dict[str, Any]:
    """A file's metadata, decoded from JSON."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: json.loads(text) for key, text in (file.metadata() or {}).items()}


def read_tensors(name: str) -> dict[str, Tensor]:
    """A file's tensors."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


@functools.lru_cache(maxsize=8)
def load_model(role: str, config_json: str, checkpointing: bool) -> WanModel:
    """The model of a role, with the weights that have this config; with checkpointing, around each of its blocks."""
    config = json.loads(config_json)
    files = [name for name in case_names() if family_of(name) == "weights" and weights_role(name) == role]
    fitting = [name for name in files if read_metadata(name).get("model", config) == config]
    assert len(fitting) == 1, f"{len(fitting)} weights files for {role} with {config} in {FOLDER}"
    model = WanModel(wan_config(config))
    model.load_state_dict(read_tensors(fitting[0]))
    if checkpointing:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = checkpoint_wrapper(block)
    return model


def weights_role(name: str) -> str:
    """The role whose weights a file holds."""
    return read_metadata(name).get("role", name.removeprefix("weights_"))


def wan_config(config: Mapping[str, Any]) -> WanConfig:
    """The metadata's model entry as a config."""
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    return WanConfig(**sizes | {"patch_size": tuple(sizes["patch_size"])})


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Maximum absolute difference over maximum absolute reference value."""
    difference = (value.detach().double() - reference.double()).abs().max().item()
    return difference / (reference.double().abs().max().item() or 1.0)


class Case(Mapping[str, Tensor]):
    """One file. Reading a key by index says that it is an input; `check` compares a result with it.

    Args:
        name: of the file, without its ending.
        tensors, meta: what it holds; read from the file when they are not given.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor] | None = None, meta: Mapping[str, Any] | None = None):
        self.name, self.family = name, family_of(name)
        self.tensors = dict(read_tensors(name) if tensors is None else tensors)
        self.meta = dict(read_metadata(name) if meta is None else meta)
        self.read: set[str] = set()
        self.errors: dict[str, float] = {}

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return self.tensors[key]

    def __contains__(self, key: object) -> bool:
        return key in self.tensors

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def check(self, key: str, value: Tensor, tolerance: float = FORWARD) -> None:
        """Compares a result with the stored one; integers and flags must be equal."""
        reference = self.tensors[key]
        assert value.shape == reference.shape, f"{self.name}: {key} is {list(value.shape)}, expected {list(reference.shape)}"
        exact = not reference.is_floating_point() and not value.is_floating_point()
        error = relative_error(value, reference)
        assert error <= (0.0 if exact else tolerance), f"{self.name}: {key} is off by {error:.2e}, allowed is {tolerance:.0e}"
        self.errors[key] = max(error, self.errors.get(key, 0.0))

    def check_if_stored(self, key: str, value: Tensor, tolerance: float = FORWARD) -> None:
        """As `check`, when the file has the key."""
        if key in self.tensors:
            self.check(key, value, tolerance)

    def check_gradients(self, prefix: str, total: Tensor, model: WanModel, tolerance: float = GRADIENT) -> None:
        """Compares the gradient of a scalar with every weight's that is stored under the prefix."""
        weights = {name.replace("_checkpoint_wrapped_module.", ""): weight for name, weight in model.named_parameters()}
        names = [name for name in self.names(prefix) if name in weights]
        assert names, f"{self.name}: no gradient is stored under {prefix!r}"
        found = torch.autograd.grad(total, [weights[name] for name in names])
        for name, gradient in zip(names, found, strict=True):
            self.check(prefix + name, gradient, tolerance)

    def names(self, prefix: str) -> list[str]:
        """What follows the prefix in the keys that have it."""
        return [key.removeprefix(prefix) for key in self.tensors if key.startswith(prefix)]

    def model(self, role: str | None = None, checkpointing: bool = False) -> WanModel:
        """The model of a role, or of the one that the metadata names."""
        return load_model(role or self.meta["weights"], json.dumps(self.meta["model"], sort_keys=True), checkpointing)

    def option(self, key: str, default: Any) -> Any:
        """A metadata value, or a default where it is absent or null."""
        return default if self.meta.get(key) is None else self.meta[key]

    def setting(self, key: str) -> Any:
        """A setting of the run: this file's, else that on which the rest of the folder agrees, else the built-in one."""
        if self.meta.get(key) is not None:
            return self.meta[key]
        found = {meta[key] for meta in map(read_metadata, case_names()) if meta.get(key) is not None}
        return found.pop() if len(found) == 1 else DEFAULTS[key]

    @property
    def frames_per_block(self) -> int:
        """Frames of a block."""
        return self.meta["num_frame_per_block"]

    @property
    def window(self) -> int | None:
        """Frames that attention spans; the files write -1 for all."""
        size = self.option("local_attn_size", -1)
        return size if size > 0 else None

    @property
    def first_frame_alone(self) -> bool:
        """The first block has one frame."""
        return self.option("independent_first_frame", False)

    def assert_complete(self) -> None:
        """Every stored tensor was used, results by a comparison."""
        assert self.family in FAMILIES
        assert self.errors, f"{self.name}: nothing was compared"
        inputs = {key for key in self.tensors if re.fullmatch(FAMILIES[self.family], key)}
        unused = set(self.tensors) - self.read - set(self.errors)
        assert not unused, f"{self.name}: stored but never used: {sorted(unused)}"
        results = set(self.tensors) - inputs - set(self.errors)
        assert not results, f"{self.name}: results that were read but not compared: {sorted(results)}"
