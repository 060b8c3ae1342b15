"""What sequence parallelism must leave unchanged, as functions of the group; run as a script, one rank of several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import run_ranks
from torch import Tensor, nn

from sftk.core import Graph, Tape, replayed
from sftk.functional import Key, classify, predict_flow, predict_flow_teacher_forced
from sftk.functional.attention import exact_derivatives
from sftk.functional.tangent import flow_tangent
from sftk.models import BranchConfig, ClassifierBranch, WanConfig, WanModel
from sftk.runtime.parallelize import parallelize
from sftk.runtime.sequence import SequenceGroup, share_sequence

Results = dict[str, Tensor]
Case = Callable[[int, SequenceGroup | None], Results]
CASES: dict[str, Case] = {}
HEADS = {2: 6, 3: 6, 4: 4}
"""Degree to heads."""
ROLLOUTS: dict[str, dict[str, Any]] = {
    "full": {},
    "windowed": {"window": 4},
    "sink": {"window": 5, "sink": 1},
    "relative": {"window": 5, "sink": 1, "rope": "relative"},
    "straight_through": {"context_gradient": "straight_through"},
    "noised_context": {"context_noise": 100.0},
}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def config(heads: int, **changes: Any) -> WanConfig:
    sizes = {"dim": 8 * heads, "ffn_dim": 20, "num_layers": 2, "in_dim": 4, "out_dim": 4, "freq_dim": 8}
    return WanConfig(**(sizes | {"num_heads": heads, "text_dim": 8, "text_len": 4} | changes))


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Random everywhere, a fresh model's head is zero; alike on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 + (parameter.dim() == 1))
    return model


def backbone(heads: int, group: SequenceGroup | None, seed: int = 0, *, checkpoint: str = "none", **changes: Any) -> Any:
    model = randomised(WanModel(config(heads, **changes)), seed)
    if group is not None:
        share_sequence(model, group)
    return parallelize(model, checkpoint=checkpoint)


def inputs(frames: int, height: int = 6, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (9 tokens a frame: 2 and 4 do not divide them), timesteps that differ by frame, text."""
    options: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(7), "dtype": torch.float64, "device": "cpu"}
    latents = torch.randn(batch, frames, 4, height, 6, **options)
    timestep, embeds = torch.rand(batch, frames, **options) * 1000, torch.randn(batch, 4, 8, **options)
    device = torch.get_default_device()
    return latents.to(device), timestep.to(device), embeds.to(device)


def gradients(**models: nn.Module) -> Results:
    """Those of the parameters; `grad.` says that the ranks' are to be summed."""
    return {
        f"grad.{role}.{name.replace('_checkpoint_wrapped_module.', '')}": parameter.grad
        for role, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def weighed(x: Tensor) -> Tensor:
    """A loss to which every element counts differently."""
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() + x.square().mean()


@case
def bidirectional(heads: int, group: SequenceGroup | None) -> Results:
    model = backbone(heads, group)
    latents, timestep, embeds = (x.requires_grad_() for x in inputs(3))
    flow, _, features = model(latents, timestep, embeds, features_at=(0, -1))
    (weighed(flow) + sum(weighed(x) for x in features)).backward()
    found = {"flow": flow, "features": torch.stack(features), "timestep": timestep.grad, "embeds": embeds.grad}
    return found | {"latents": latents.grad} | gradients(model=model)


@case
def one_timestep(heads: int, group: SequenceGroup | None) -> Results:
    model = backbone(heads, group, checkpoint="full")
    latents, timestep, embeds = inputs(3, height=8)
    flow, _, _ = model(latents, timestep[:, 0], embeds)
    weighed(flow).backward()
    return {"flow": flow} | gradients(model=model)


@case
def block_causal(heads: int, group: SequenceGroup | None) -> Results:
    model = backbone(heads, group)
    flow = predict_flow(model, *inputs(5), frames_per_block=2, independent_first_frame=True, window=4, sink=1)
    weighed(flow).backward()
    return {"flow": flow} | gradients(model=model)


@case
def teacher_forcing(heads: int, group: SequenceGroup | None) -> Results:
    model = backbone(heads, group)
    noisy, timestep, embeds = inputs(4)
    flow = predict_flow_teacher_forced(model, noisy, timestep, noisy.flip(0), embeds, frames_per_block=2)
    weighed(flow).backward()
    return {"flow": flow} | gradients(model=model)


def rollout_case(options: dict[str, Any], replay: bool = False) -> Case:
    def run(heads: int, group: SequenceGroup | None) -> Results:
        model = backbone(heads, group, checkpoint="full")
        graph = Graph.from_spec("specs/rollout.yaml", steps=(1000, 500), frames_per_block=2, commit_last=True, **options)
        graph, tape = replayed(graph) if replay else (graph, Tape())
        noise, _, embeds = inputs(6)
        state = {"noise": noise, "prompt_embeds": embeds, "key": Key(seed=1, samples=(0, 1))}
        out = graph(state, models={"denoiser": model})
        weighed(out["x0"]).backward()
        tape.pull_back()
        here = {len(layer[0][0, 0]) for chunk in out["cache"].chunks for layer in chunk.layers}
        assert here == {heads // (1 if group is None else group.degree)}
        own = {key.untyped_storage().nbytes() / (key.numel() * 8) for key, _ in out["cache"].chunks[-1].layers}
        assert own == {1.0}, "a cached key keeps other tensors alive"
        return {"x0": out["x0"]} | gradients(model=model)

    return run


CASES |= {f"rollout_{name}": rollout_case(options) for name, options in ROLLOUTS.items()}
CASES |= {f"replay_{name}": rollout_case(ROLLOUTS[name], replay=True) for name in ("sink", "straight_through")}


@case
def dmd(heads: int, group: SequenceGroup | None) -> Results:
    """A generator step and a critic step, with guidance; the scores have other sizes than the student."""
    roles = {"generator": backbone(heads, group, 0, checkpoint="full")}
    roles |= {role: backbone(2 * heads, group, i + 1) for i, role in enumerate(("real_score", "fake_score"))}
    noise, _, embeds = inputs(6)
    state = {"noise": noise, "prompt_embeds": embeds, "negative_embeds": -embeds, "key": Key(seed=2, samples=(4, 5))}
    found = {}
    for spec, updated, options in (
        ("specs/dmd_generator.yaml", "generator", {"guidance": 3.0}),
        ("specs/score_critic.yaml", "fake_score", {}),
    ):
        graph = Graph.from_spec(spec, steps=(1000, 500), **options)
        for role, model in roles.items():
            model.requires_grad_(role == updated)
        out = graph({name: state[name] for name in graph.inputs}, models={name: roles[name] for name in graph.ports})
        out["loss"].backward()
        found |= {f"{updated}_loss": out["loss"]} | gradients(**{updated: roles[updated]})
    return found


@case
def discriminator(heads: int, group: SequenceGroup | None) -> Results:
    """Gradients of a branch, of the backbone that it reads and of the latents that it judges."""
    model = backbone(heads, group)
    branch = ClassifierBranch(config(heads), BranchConfig(layers=(0, -1), registers=2, time_embedding=True))
    randomised(branch, 5)
    if group is not None:
        share_sequence(branch, group)
    latents, timestep, embeds = inputs(3)
    logits = classify(model, branch, latents.requires_grad_(), timestep, embeds)
    weighed(logits).backward()
    return {"logits": logits, "latents": latents.grad} | gradients(model=model, branch=branch)


@case
def second_derivative(heads: int, group: SequenceGroup | None) -> Results:
    model = backbone(heads, group)
    latents, timestep, embeds = inputs(2)
    with exact_derivatives():
        flow, _, _ = model(latents.requires_grad_(), timestep, embeds)
    (first,) = torch.autograd.grad(flow.square().sum(), latents, create_graph=True)
    first.square().sum().backward()
    return {"first": first, "second": latents.grad} | gradients(model=model)


@case
def forward_mode(heads: int, group: SequenceGroup | None) -> Results:
    model = backbone(heads, group, checkpoint="full", interval_embedding=True)
    latents, timestep, embeds = inputs(2)
    flow, tangent = flow_tangent(model, latents, timestep, embeds, latents.sin(), timestep / 2)
    return {"flow": flow, "tangent": tangent}


@case
def compiled(heads: int, group: SequenceGroup | None) -> Results:
    """Blocks compiled without a break, one graph for each kind of call, however often the model is called."""
    model, noise, embeds = backbone(heads, group, checkpoint="full"), inputs(6)[0], inputs(6)[2]
    if group is not None:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    graph = Graph.from_spec("specs/rollout.yaml", steps=(1000, 500), frames_per_block=2, window=4)
    counts = []
    for update in range(3):
        key = Key(seed=1, update=update, samples=(0, 1))
        out = graph({"noise": noise, "prompt_embeds": embeds, "key": key}, models={"denoiser": model})
        weighed(out["x0"]).backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[1] == counts[2], counts
    return {"x0": out["x0"]} | gradients(model=model)


def run_alone(name: str, degree: int) -> Results:
    """A case on one rank, with the heads that it has for a degree."""
    return {key: value.detach().cpu() for key, value in CASES[name](HEADS[degree], None).items()}


def run_rank(rank: int, device: str, folder: Path, degrees: list[int], names: list[str]) -> None:
    """Runs the cases in the groups that this rank is in, and keeps what they found, gradients summed."""
    torch.set_num_threads(1)
    torch.set_default_device(device)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", rank=rank, world_size=max(degrees), init_method=f"file://{folder / 'store'}"
    )
    for degree in degrees:
        group = dist.new_group(list(range(degree)))
        for name in names if rank < degree else ():
            found = {key: value.detach() for key, value in CASES[name](HEADS[degree], SequenceGroup.of(group)).items()}
            flat = torch.cat([value.flatten() for value in found.values()])
            dist.all_reduce(flat, group=group)
            for (key, value), summed in zip(found.items(), flat.split([v.numel() for v in found.values()]), strict=True):
                if key.startswith("grad."):
                    found[key] = summed.clone().view_as(value)
                else:  # whole tensors are the same on every rank
                    torch.testing.assert_close(value, summed.view_as(value) / degree, rtol=1e-12, atol=1e-12)
            if rank == 0:
                torch.save({key: value.cpu() for key, value in found.items()}, folder / f"{name}_{degree}.pt")
    dist.destroy_process_group()


def launch(folder: Path, degrees: Sequence[int], names: Sequence[str], device: str = "cpu") -> None:
    """`run_rank` in as many processes as the largest degree."""
    what = [device, str(folder), ",".join(map(str, degrees)), ",".join(names)]
    run_ranks(Path(__file__), [[str(rank), *what] for rank in range(max(degrees))], folder, timeout=1000)


def assert_equal(together: Results, alone: Results, tolerance: float = 1e-9) -> None:
    """Largest difference over largest value, tensor by tensor."""
    overall = max(value.abs().max().item() for value in alone.values())
    assert together.keys() == alone.keys()
    for key, expected in alone.items():
        # A gradient that is zero but for rounding, a bias that the softmax cancels, is measured against the others.
        scale = max(expected.abs().max().item(), 1e-6 * overall)
        difference = (together[key] - expected).abs().max().item() / scale
        assert difference < tolerance, f"{key}: {difference}"


if __name__ == "__main__":
    rank, device, folder, degrees, names = sys.argv[1:]
    run_rank(int(rank), device, Path(folder), [int(n) for n in degrees.split(",")], names.split(","))
