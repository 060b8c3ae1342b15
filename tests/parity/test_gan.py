"""Adversarial losses and penalties: the packaged specs over recorded logits."""

from typing import Any

import torch
from parity_cases import GRADIENT, Case
from torch import Tensor

from sftk import Graph
from sftk.functional import RecordedKey
from sftk.functional.schedule import TIMESTEPS

SIDES = ("fake", "real")


class Replay:
    """Behind both ports: hands the noisy latents through, keeps them, and returns recorded logits in the order of the calls."""

    features_at = (0,)

    def __init__(self, *logits: Tensor):
        self.seen: list[Tensor] = []
        self.logits = list(logits)

    def __call__(self, latents: Any, timestep: Tensor, *_: Any, **__: Any) -> Any:
        if isinstance(latents, tuple):
            return self.logits.pop(0)
        self.seen.append(latents)
        return latents, (), (latents,)


def params(case: Case) -> dict[str, Any]:
    return {
        "schedule": "table",
        "shift": case.meta["critic_timestep_shift"],
        "timestep_range": (case.meta["min_step"], case.meta["max_step"]),
        "frames_per_block": case.frames_per_block,
    }


def state(case: Case, noises: dict[str, str]) -> dict[str, Any]:
    """Inputs of a spec on given samples; a file without latents holds logits only, for which any latents do."""
    frames = case.tensors["timestep"].shape[1]
    some = torch.zeros(case["raw_timestep"].shape[0], frames, 4, 2, 2)
    fake, real = (case.get(f"x_{side}", some) for side in SIDES)
    tensors = {name: case[key] if key in case else torch.zeros_like(some) for name, key in noises.items()}
    tensors["score_timestep"] = case["raw_timestep"].reshape(-1, 1) / TIMESTEPS
    key = RecordedKey(tensors=tensors)
    return {"x0": fake, "latents": real, "prompt_embeds": torch.zeros(len(some), 1, 1), "key": key}


def leaves(case: Case, *names: str) -> tuple[Tensor, ...]:
    return tuple(case[name].clone().requires_grad_() for name in names)


def check_seen(case: Case, prefix: str, names: tuple[str, ...], seen: list[Tensor]) -> None:
    for name, latents in zip(names, seen, strict=True):
        case.check_if_stored(f"{prefix}.{name}", latents)


def test_gan(case: Case):
    for relativistic in (False, True):
        check_generator(case, relativistic)
        check_discriminator(case, relativistic)


def check_generator(case: Case, relativistic: bool) -> None:
    kind = "relativistic" if relativistic else "plain"
    spec = "specs/adversarial_relativistic.yaml" if relativistic else "specs/adversarial.yaml"
    fake, real = leaves(case, "logit_fake", "logit_real")
    replay = Replay(fake, real)
    graph = Graph.from_spec(spec, **params(case))
    graph = graph if not relativistic else with_gradient_of_real(graph)
    out = graph(state(case, {"score_noise": "g.noise_fake", "real_noise": "g.noise_real"}), dict.fromkeys(graph.ports, replay))
    check_seen(case, "g", ("noisy_fake", "noisy_real")[: len(replay.seen)], replay.seen)
    loss = case.meta["gan_g_weight"] * out["loss"] / out["loss_weight"]
    case.check(f"{kind}.g_loss", loss)
    case.check(f"{kind}.g_grad_logit_fake", torch.autograd.grad(loss, fake, retain_graph=True)[0], GRADIENT)
    if relativistic:
        case.check(f"{kind}.g_grad_logit_real", torch.autograd.grad(loss, real)[0], GRADIENT)


def with_gradient_of_real(graph: Graph) -> Graph:
    """The real logits carry no gradient in our graph, since nothing that the phase updates is behind them."""
    import attrs

    return graph.with_nodes(attrs.evolve(node, grad=True) for node in graph.nodes)


def check_discriminator(case: Case, relativistic: bool) -> None:
    kind, meta = "relativistic" if relativistic else "plain", case.meta
    fake, real, perturbed_real, perturbed_fake = leaves(
        case, "logit_fake", "logit_real", "logit_real_perturbed", "logit_fake_perturbed"
    )
    replay = Replay(fake, real, perturbed_real, perturbed_fake)
    graph = Graph.from_spec(
        "specs/discriminator.yaml",
        **params(case),
        relativistic=relativistic,
        **{name: meta[name] for name in ("r1_weight", "r1_sigma", "r2_weight", "r2_sigma")},
    )
    noises = {"score_noise": "d.noise_shared", "r1_noise": "d.r1_perturbation_noise", "r2_noise": "d.r2_perturbation_noise"}
    models = dict.fromkeys(graph.ports, replay)
    out = Graph(graph.nodes, inputs=graph.inputs, optional=graph.optional)(state(case, noises), models)
    check_seen(case, "d", ("noisy_fake", "noisy_real", "noisy_real_perturbed", "noisy_fake_perturbed"), replay.seen)
    case.check("timestep", out["score_timestep"])
    adversarial = meta["gan_d_weight"] * out["gan_loss"] / out["gan_loss_weight"]
    penalties = {name: out[f"{name}_loss"] / out[f"{name}_loss_weight"] for name in ("r1", "r2")}
    case.check(f"{kind}.d_loss", adversarial)
    for (name, loss), (side, logits) in zip(
        penalties.items(), (("real", perturbed_real), ("fake", perturbed_fake)), strict=True
    ):
        case.check(f"{name}_loss", loss)
        found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        case.check(f"{name}_grad_logit_{side}_perturbed", found, GRADIENT)
    total = adversarial + penalties["r1"] + penalties["r2"]
    for side, logits in (("fake", fake), ("real", real)):
        case.check(f"{kind}.total_grad_logit_{side}", torch.autograd.grad(total, logits, retain_graph=True)[0], GRADIENT)
