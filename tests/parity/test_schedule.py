"""Schedule tables, conversions, Euler steps and the sampling of timesteps."""

import re

import torch
from parity_cases import Case

from sftk.core.geometry import split_blocks
from sftk.functional import (
    RecordedKey,
    add_noise,
    draw_timestep,
    euler_step,
    flow_target,
    flow_to_x0,
    interpolate,
    warp_steps,
    x0_to_flow,
)
from sftk.functional.sampling import shape_timestep, spread_blocks
from sftk.functional.schedule import (
    TIMESTEPS,
    inference_timesteps,
    next_table_sigma,
    sigma_table,
    table_index,
    timestep_to_sigma,
    training_weights,
)


def test_schedule(case: Case):
    prefixes = {match[0]: float(match[1]) for key in case if (match := re.match(r"shift(\d+(?:\.\d+)?)\.", key))}
    assert prefixes
    for prefix, shift in prefixes.items():
        check_tables(case, prefix, shift)
        check_conversions(case, prefix, shift)
        check_steps(case, prefix, shift)
        check_sampler(case, prefix, shift)
        steps = case.meta["denoising_step_list"]
        case.check(prefix + "warped_list", torch.tensor(warp_steps(steps, shift)))
        case.check(prefix + "warped_list_with0", torch.tensor(warp_steps([*steps, 0], shift)))


def check_tables(case: Case, prefix: str, shift: float) -> None:
    count = case.meta["num_train_timesteps"]
    case.check(f"{prefix}train{count}.sigmas", sigma_table(shift, count))
    case.check(f"{prefix}train{count}.timesteps", sigma_table(shift, count) * TIMESTEPS)
    case.check(f"{prefix}train{count}.weights", training_weights(shift, count))
    index = table_index(case[prefix + "query.timestep"], shift, count)
    case.check(prefix + "query.index", index)
    case.check(prefix + "query.sigma", sigma_table(shift, count)[index])
    case.check(prefix + "query.sigma", timestep_to_sigma(case[prefix + "query.timestep"], "table", shift))
    case.check(prefix + "query.weight", training_weights(shift, count)[index])


def check_conversions(case: Case, prefix: str, shift: float) -> None:
    x0, noise, flow, timestep = (case[prefix + key] for key in ("x0", "noise", "flow", "query.timestep"))
    sigma = timestep_to_sigma(timestep, "table", shift)
    noisy = add_noise(x0, noise, timestep, schedule="table", shift=shift)
    case.check(prefix + "add_noise", noisy)
    case.check(prefix + "add_noise", interpolate(x0, noise, sigma))
    case.check(prefix + "flow_to_x0", flow_to_x0(noisy, flow, sigma))
    # A difference of nearly equal numbers is divided by sigma here, so it starts from the stored numbers.
    case.check(prefix + "x0_to_flow", x0_to_flow(case[prefix + "add_noise"], x0, sigma))
    case.check(prefix + "target", flow_target(x0, noise))


def check_steps(case: Case, prefix: str, shift: float) -> None:
    count = case.meta["num_train_timesteps"]
    noisy, flow, timestep = (case[prefix + key] for key in ("add_noise", "flow", "query.timestep"))
    sigma = timestep_to_sigma(timestep, "table", shift)
    following = next_table_sigma(timestep, shift, count)
    inside = slice(len(case.tensors[prefix + "step_interior"]))
    case.check(prefix + "step_interior", euler_step(noisy[inside], flow[inside], sigma[inside], following[inside]))
    final = slice(len(case.tensors[prefix + "step_to_final"]))
    case.check(prefix + "step_to_final", euler_step(noisy[final], flow[final], sigma[final], torch.zeros_like(sigma[final])))

    whole_batch = next_table_sigma(timestep, shift, count, whole_batch_end=True)
    case.check(prefix + "step_mixed_with_last", euler_step(noisy, flow, sigma, whole_batch))
    # Ours goes to 0 only where an element itself is at the last entry.
    last = table_index(timestep, shift, count) == count - 1
    assert last.any()
    assert torch.equal(following == 0, last)
    ours = euler_step(noisy, flow, sigma, following)
    torch.testing.assert_close(ours[last], case.tensors[prefix + "step_mixed_with_last"][last])
    assert not torch.allclose(ours[~last], case.tensors[prefix + "step_mixed_with_last"][~last])


def check_sampler(case: Case, prefix: str, shift: float) -> None:
    noisy, flow = case[prefix + "add_noise"], case[prefix + "flow"]
    names = {match[0]: int(match[1]) for key in case if (match := re.match(re.escape(prefix) + r"infer(\d+)\.", key))}
    assert names
    for name, count in names.items():
        case.check(name + "sigmas", sigma_table(shift, count))
        case.check(name + "timesteps", torch.tensor(inference_timesteps(count, shift)))
        timestep = case[name + "step_timestep"]
        first = slice(len(timestep))
        sigma = sigma_table(shift, count)[table_index(timestep, shift, count)]
        following = next_table_sigma(timestep, shift, count)
        case.check(name + "step", euler_step(noisy[first], flow[first], sigma, following))
        first = slice(len(case.tensors[name + "step_last"]))
        sigma = sigma_table(shift, count)[-1:]
        case.check(name + "step_last", euler_step(noisy[first], flow[first], sigma, torch.zeros_like(sigma)))


def test_timestep_sampling(case: Case):
    meta = case.meta
    clamp = (meta["min_step"], meta["max_step"])
    case.check("timestep", shape_timestep(case["raw"].float(), meta["generator_shift"], clamp))
    timestep = case["timestep"]
    case.check("sigma_noise_added", timestep_to_sigma(timestep, "table", meta["generator_shift"]))
    case.check("sigma_score_model", timestep_to_sigma(timestep, "table", meta["score_shift"]))
    case.check("index_score_model", table_index(timestep, meta["score_shift"]))

    key = RecordedKey(tensors={"timestep": case["raw"].float()[:, None] / TIMESTEPS})
    drawn = draw_timestep(key, torch.empty(len(timestep), 1, 1), shift=meta["generator_shift"], clamp=clamp)
    case.check("timestep", drawn[:, 0])

    for name in [found.removesuffix(".raw") for found in case if found.endswith(".raw")]:
        raw = case[name + ".raw"]
        independent = name.endswith("independent_first")
        like = torch.empty(*case.tensors[name + ".timestep"].shape, 1)
        blocks = split_blocks(like.shape[1], case.frames_per_block, independent) if raw.shape[1] > 1 else (like.shape[1],)
        case.check(name + ".timestep", spread_blocks(raw.expand(like.shape[:2]), blocks))
        drawn = draw_timestep(
            RecordedKey(tensors={"timestep": raw / TIMESTEPS}),
            like,
            per="block" if raw.shape[1] > 1 else "sample",
            frames_per_block=case.frames_per_block,
            independent_first_frame=independent,
        )
        case.check(name + ".timestep", drawn)
