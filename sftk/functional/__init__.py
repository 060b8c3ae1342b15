"""Pure tensor mathematics: schedule, noise, guidance, keyed sampling, attention, caches, rollout, solvers."""

from sftk.functional.attention import attention, available_backends, exact_derivatives
from sftk.functional.cache import KVCache, append, forget_text, window
from sftk.functional.classify import Discriminator, classify
from sftk.functional.context import commit_context, commit_given, start_cache, window_context
from sftk.functional.discrete import clean_state, draw_grid_step, draw_step, pick_ode_states
from sftk.functional.frame_noise import FrameNoise
from sftk.functional.guidance import guide
from sftk.functional.interval import draw_interval, ramp
from sftk.functional.keys import Key, RecordedKey
from sftk.functional.last_frames import PictureCodec, first_frames, last_frames_with_image, last_picture
from sftk.functional.layout import Layout
from sftk.functional.noise import (
    add_noise,
    alpha_bar,
    flow_target,
    flow_to_noise,
    flow_to_x0,
    follow_flow,
    interpolate,
    noise_to_x0,
    read_x0,
    x0_to_flow,
)
from sftk.functional.plan import Block, Step, plan_blocks, plan_few_steps, plan_rollout
from sftk.functional.predict import Denoiser, predict_flow, predict_flow_teacher_forced, predict_x0, predict_x0_cfg
from sftk.functional.rollout import begin_block, denoise_step, exit_step, join_blocks, renoise
from sftk.functional.sampling import crop_length, draw_noise, draw_timestep, drop_condition
from sftk.functional.schedule import euler_step, shift_sigma, timestep_to_sigma, warp_steps
from sftk.functional.solvers import plan_ode, predict_step, solver_step
from sftk.functional.tangent import flow_tangent

__all__ = [
    "Block",
    "Denoiser",
    "Discriminator",
    "FrameNoise",
    "KVCache",
    "Key",
    "Layout",
    "PictureCodec",
    "RecordedKey",
    "Step",
    "add_noise",
    "alpha_bar",
    "append",
    "attention",
    "available_backends",
    "begin_block",
    "classify",
    "clean_state",
    "commit_context",
    "commit_given",
    "crop_length",
    "denoise_step",
    "draw_grid_step",
    "draw_interval",
    "draw_noise",
    "draw_step",
    "draw_timestep",
    "drop_condition",
    "euler_step",
    "exact_derivatives",
    "exit_step",
    "first_frames",
    "flow_tangent",
    "flow_target",
    "flow_to_noise",
    "flow_to_x0",
    "follow_flow",
    "forget_text",
    "guide",
    "interpolate",
    "join_blocks",
    "last_frames_with_image",
    "last_picture",
    "noise_to_x0",
    "pick_ode_states",
    "plan_blocks",
    "plan_few_steps",
    "plan_ode",
    "plan_rollout",
    "predict_flow",
    "predict_flow_teacher_forced",
    "predict_step",
    "predict_x0",
    "predict_x0_cfg",
    "ramp",
    "read_x0",
    "renoise",
    "shift_sigma",
    "solver_step",
    "start_cache",
    "timestep_to_sigma",
    "warp_steps",
    "window",
    "window_context",
    "x0_to_flow",
]
