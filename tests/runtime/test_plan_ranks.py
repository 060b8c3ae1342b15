"""Plans for many ranks against what one of them holds and sends: real training steps in PyTorch's fake process group."""

from __future__ import annotations

import pytest
from fake_ranks import NODE, fake_stage

from sftk.runtime.plan import plan_stage
from sftk.runtime.plan_traffic import groups, share_across
from sftk.runtime.shards import local
from sftk.spec.recipe import load_recipe

POLICIES = {
    "accumulated": (8, ("batch.global=16",)),
    "kept": (8, ("parallel.reshard=false", "batch.global=16")),
    "hsdp": (64, ("parallel.shard=node",)),
    "offloaded": (8, ("models.real_score.parallel={shard: 1, offload: true}", "models.fake_score.parallel.offload=true")),
    "mixed": (64, ("models.generator.parallel.shard=1", "models.real_score.parallel.shard=node")),
    "half": (8, ("precision=bf16", "models.real_score.dtype=bf16")),
    "sequence over nodes": (64, ("parallel.sequence=4", "models.generator.checkpoint=full")),
    "512": (512, ()),
}
MORE = {
    "fsdp": (8, ()),
    "scattered": (8, ("batch.global=16", "parallel.accumulate=sharded", "phases.0.backward=replay")),
    "replayed": (8, ("phases.0.backward=replay", "batch.global=16")),
    "kept and replayed": (8, ("parallel.reshard=false", "phases.0.backward=replay")),
    "checkpoints": (8, ("models.generator.checkpoint=full", "models.fake_score.checkpoint=full")),
    "replicas": (64, ("parallel.shard=1",)),
    "sequence": (8, ("parallel.sequence=2", "parallel.shard=4")),
}
METHODS = {
    "sid": (),
    "sid kept": ("parallel.reshard=false", "batch.global=16"),
    "gan": ("batch.global=16",),
    "dmd2": ("parallel.accumulate=sharded", "batch.global=16"),
    "cd": ("parallel.reshard=false",),
    "tf": ("batch.global=16",),
    "df": ("parallel.sequence=3", "batch.global=8", "parallel.shard=1"),
}


def planned(plan):
    """Phase to kind to (collectives, bytes)."""
    found = {}
    for phase in plan.phases:
        kinds = found[phase.name] = {}
        for row in phase.traffic:
            calls, payload = kinds.get(row.kind, (0, 0))
            kinds[row.kind] = calls + row.calls, payload + row.payload
    return found


def sent(run, exits):
    """The same of real steps: the mean over exit steps, after a step that gathers what then stays."""
    run(0)
    found = {}
    for index in range(exits):
        for phase, kinds in run(index + 1, index).items():
            total = found.setdefault(phase, {})
            for kind, (calls, payload) in kinds.items():
                before = total.get(kind, (0, 0))
                total[kind] = before[0] + calls / exits, before[1] + payload / exits
    return found


def assert_planned(stage, world, exits, rel=1e-9):
    plan = plan_stage(stage, gpus=world, node=NODE)
    with fake_stage(stage, world) as (built, run):
        real, expected = sent(run, exits), planned(plan)
        for phase, kinds in expected.items():
            assert kinds.keys() == real[phase].keys()
            for kind, found in kinds.items():
                assert found == pytest.approx(real[phase][kind], rel=rel), (phase, kind)
        for role, held in plan.roles.items():
            assert held.weights == sum(local(p).nbytes for p in built.modules[role].state_dict().values())
            assert held.shards == built.mesh.shards(role)
        for role, optimizer in built.optimizers.items():
            moments = [local(t) for state in optimizer.state.values() for key, t in state.items() if key != "step"]
            # What has no gradient to reduce has no moments, either; they are a larger part of a rank's than of what it sends.
            assert plan.roles[role].optimizer == pytest.approx(sum(t.nbytes for t in moments), rel=3 * rel)
        for role, ema in built.emas.items():
            assert plan.roles[role].average == sum(local(t).nbytes for t in ema.state_dict().values())


def tiny_stage(tiny, world, policy):
    recipe = tiny()
    recipe.write_text(recipe.read_text().replace("num_heads: 2", "num_heads: 4"))
    return load_recipe(recipe, ["batch.per_rank=1", f"batch.global={world}", *policy])[0]


@pytest.mark.parametrize("name", POLICIES)
def test_a_rank_holds_and_sends_what_is_planned(tiny, name):
    world, policy = POLICIES[name]
    assert_planned(tiny_stage(tiny, world, policy), world, exits=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_policies(tiny, name):
    world, policy = MORE[name]
    assert_planned(tiny_stage(tiny, world, policy), world, exits=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_other_methods(name):
    """Gradient through frozen models, classifier branches, averages that are called, one phase alone.

    What a discriminator's backbone does not use (its head) is gathered, but has no gradient to reduce: 0.2% of it.
    """
    common = ["batch.per_rank=1", "batch.global=8", "latents.frames=3", *METHODS[name]]
    (stage,) = load_recipe(f"recipes/digits/{name.split()[0]}.yaml", common)
    assert_planned(stage, 24 if "df" in name else 8, exits=4, rel=0.002)


def test_sums_over_one_copy_are_no_traffic(tiny):
    plan = plan_stage(tiny_stage(tiny, 1, ()), gpus=1)
    assert [phase.traffic for phase in plan.phases] == [(), ()]
    assert {role.gathered for role in plan.roles.values()} == {0}


def test_links_are_counted_by_node():
    assert share_across(groups(64, 64), 8, ring=True) == 1 / 8
    assert share_across(groups(64, 6)[:2], 8, ring=True) == pytest.approx((0 + 2 / 6) / 2)
    # Of the pairs in a group of 16, each rank has 7 in its node and 8 in the other.
    assert share_across(groups(32, 16), 8, ring=False) == pytest.approx(8 / 15)
    assert share_across([range(first, 64, 8) for first in range(8)], 8, ring=True) == 1.0


@pytest.mark.parametrize(("dtype", "dimensions"), [("bf16", 2), ("fp32", 1)])
def test_narrow_weights_have_wide_sums_of_gradients(tiny, dtype, dimensions):
    """FSDP2 keeps sums over micro-batches in float32 where it may still have to reduce them over copies."""
    policy = ("precision=bf16", f"models.generator.dtype={dtype}", "batch.global=16", "parallel.accumulate=sharded")
    with fake_stage(tiny_stage(tiny, 8, policy), 8) as (built, _):
        meshes = [getattr(p, "device_mesh", None) for p in built.modules["generator"].parameters()]
        assert {mesh.ndim for mesh in meshes} == {dimensions}
        assert {p.device_mesh.ndim for p in built.modules["real_score"].parameters()} == {1}
