"""Draws the figures of the documentation as SVG: `python docs/figures/make.py`. Numbers and names come from the code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

import sftk
from sftk.core.transform import FunctionTransform, Node
from sftk.functional.cache import KVCache, append
from sftk.functional.context import window_context
from sftk.functional.layout import Layout
from sftk.functional.plan import Block, step_list
from sftk.functional.schedule import shift_sigma

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import graphs  # noqa: E402
from drawing import Drawing  # noqa: E402
from study import drift, study_table  # noqa: E402, F401


def method() -> Drawing:
    """Who computes what in a training step."""
    d = Drawing(372, "Distribution matching on the student's own rollout")
    d.box(24, 120, 150, 74, "blue", "student\ncausal, few steps,\nreads its own cache")
    d.arrow((174, 157), (214, 157))
    d.box(214, 132, 92, 50, "panel", "x0\nits rollout")
    d.arrow((306, 157), (342, 157))
    d.box(342, 132, 110, 50, "panel", "add_noise\nat a drawn level")
    d.arrow((452, 148), (476, 148), (476, 78), (504, 78))
    d.arrow((452, 166), (476, 166), (476, 206), (504, 206))
    d.box(504, 46, 150, 64, "green", "teacher\nfrozen, bidirectional,\nguided")
    d.box(504, 174, 150, 64, "orange", "critic\nbidirectional")
    d.arrow((654, 78), (742, 78), (742, 118), kind="gl")
    d.text(698, 70, "real_x0", kind="tg", size=12, anchor="middle")
    d.arrow((654, 206), (742, 206), (742, 182), kind="ol")
    d.text(698, 222, "fake_x0", kind="to", size=12, anchor="middle")
    d.box(666, 118, 170, 64, "panel", "dmd_gradient\n(fake_x0 − real_x0)\n/ mean |x0 − real_x0|")
    d.arrow((814, 118), (814, 24), (99, 24), (99, 120), kind="bl")
    d.text(112, 42, "generator phase: the gradient goes back through every exit step", kind="tb", size=12)
    d.box(504, 280, 150, 44, "panel", "denoising_loss")
    d.arrow((560, 238), (560, 280))
    d.arrow((598, 280), (598, 238), kind="ol")
    d.arrow((260, 182), (260, 302), (504, 302))
    d.text(382, 294, "x0, without gradient", kind="dim", size=12, anchor="middle")
    d.text(579, 350, "critic phase: learns what the student makes now", kind="to", size=12, anchor="middle")
    return d


def rollout() -> Drawing:
    """Blocks, steps, the exit step and the context pass."""
    steps, _ = step_list((1000, 750, 500, 250), 3.0, True)
    leave, columns = 2, 4
    d = Drawing(408, "A self-forcing rollout")
    x0, y0, w, h, gap = 150, 58, 130, 34, 40
    for i, step in enumerate(steps):
        d.text(x0 - 20, y0 + i * 46 + 22, f"timestep {step.timestep:g}", kind="dim", anchor="end", size=12)
    d.text(x0 - 20, y0 + 4 * 46 + 22, "context pass", kind="dim", anchor="end", size=12)
    d.text(x0 - 20, y0 + 5 * 46 + 34, "cache", kind="dim", anchor="end", size=12)
    top = y0 + 5 * 46 + 12
    for c in range(columns):
        x = x0 + c * (w + gap)
        last = c == columns - 1
        d.text(x + w / 2, 36, f"block {c}", anchor="middle", bold=True)
        for i in range(len(steps)):
            y = y0 + i * 46
            if i < leave:
                d.box(x, y, w, h, "grey", "denoise, renoise", size=12)
            elif i == leave:
                d.box(x, y, w, h, "blue", "exit step: x0, grad", size=12)
            else:
                d.box(x, y, w, h, "none", "not run", size=12, dash=True)
            if 0 < i <= leave:
                d.arrow((x + w / 2, y - 12), (x + w / 2, y))
        y = y0 + 4 * 46
        if last:
            d.box(x, y, w, h, "none", "not run", size=12, dash=True)
        else:
            d.arrow((x + 12, y0 + leave * 46 + h), (x + 12, y))
            d.box(x, y, w, h, "green", "clean x0, no grad", size=12)
            d.arrow((x + w / 2, y + h), (x + w / 2, top), kind="gl")
            d.arrow((x + w, top + 16), (x + w + 20, top + 16), (x + w + 20, y0 + 17), (x + w + gap, y0 + 17), kind="gl")
        for k in range(columns):
            size = (w - 12) / columns
            kind = "green" if k < c + (not last) else "none"
            d.box(x + k * (size + 4), top, size, h - 2, kind, str(k) if kind == "green" else "", size=12)
    d.text(
        x0,
        384,
        "One exit step is drawn for all blocks (same_step_across_blocks). Nothing follows the last block.",
        kind="dim",
        size=12,
    )
    return d


def state() -> Drawing:
    """Tensors and host values."""
    shown = (
        ("noise", "prompt_embeds", "x0", "timestep", "gradient_mask", "loss"),
        ("key", "blocks", "lead", "exit_from", "cache"),
    )
    about = {
        "noise": "[B, F, C, H, W]",
        "prompt_embeds": "[B, L, D]",
        "x0": "[B, F, C, H, W]",
        "timestep": "[B, F], 0 to 1000",
        "gradient_mask": "[B, F], bool",
        "loss": "[], a sum; loss_weight divides it",
        "key": "source of every random draw",
        "blocks": "the plan: lengths, exit steps",
        "lead": "steps before the exit step",
        "exit_from": "a timestep, for ts_schedule_max",
        "cache": "a value that holds tensors",
    }
    d = Drawing(266, "A State: tensors and host values under named keys")
    for column, (keys, kind, head, note) in enumerate(
        zip(
            shown,
            ("blue", "green"),
            ("tensors", "host values"),
            ("stay on their device", "decide control flow; never read back"),
            strict=True,
        )
    ):
        x = 24 + column * 412
        d.box(x, 20, 400, 226, "panel")
        d.text(x + 16, 44, head, bold=True)
        d.text(x + 384, 44, note, kind="dim", size=12, anchor="end")
        for i, key in enumerate(keys):
            d.box(x + 16, 58 + i * 30, 132, 24, kind, key, size=12)
            d.text(x + 160, 75 + i * 30, about[key], kind="dim", size=12)
    return d


def transform() -> Drawing:
    """Inputs, options, ports and outputs of one transform."""
    op = sftk.lookup("predict_x0_cfg")
    assert isinstance(op, FunctionTransform)
    d = Drawing(290, "The anatomy of a transform")
    d.box(300, 84, 260, 124, "panel", f"{op.name}\n{op.kind}")
    for i, name in enumerate(op.inputs):
        y = 86 + i * 32
        d.box(60, y, 150, 24, "blue", name, size=12)
        d.arrow((210, y + 12), (300, y + 12))
    for i, name in enumerate(op.ports):
        d.box(365, 24, 130, 26, "green", name, size=12)
        d.arrow((430, 50 + i), (430, 84))
    for i, name in enumerate(op.outputs):
        d.arrow((560, 146 + i * 32), (650, 146 + i * 32))
        d.box(650, 134 + i * 32, 120, 24, "blue", name, size=12)
    width = 86
    left = 430 - (len(op.options) * (width + 6) - 6) / 2
    for i, name in enumerate(op.options):
        d.box(left + i * (width + 6), 236, width, 24, "orange", name, size=12)
    d.arrow((430, 236), (430, 208))
    d.text(135, 74, "inputs: arguments", kind="tb", size=12, anchor="middle")
    d.text(710, 124, "outputs", kind="tb", size=12, anchor="middle")
    d.text(506, 41, "model port", kind="tg", size=12)
    d.text(430, 278, "options: keyword-only arguments, fixed when the graph is built", kind="to", size=12, anchor="middle")
    return d


def graph() -> Drawing:
    """The generator's graph and, unfolded, its rollout."""
    made = sftk.Graph.from_spec("specs/dmd_generator.yaml")
    rows: list[tuple[int, str, bool]] = []
    inner = next(node.op for node in made.nodes if isinstance(node.op, sftk.Graph))
    outer: list[tuple[int, Node]] = []

    def unfold(nodes, depth: int) -> None:
        for node in nodes:
            outer.append((depth, node))
            if isinstance(node.op, sftk.Graph) and node.op is not inner:
                unfold(node.op.nodes, depth + 1)

    def walk(nodes, depth: int) -> None:
        for node in nodes:
            fold = isinstance(node.op, sftk.Fold)
            rows.append((depth, f"for each {node.op.item} of {node.op.over}" if fold else node.op.name, fold))
            if fold:
                walk(node.op.nodes, depth + 1)

    unfold(made.nodes, 0)
    walk(inner.nodes, 0)
    step, top = 34, 64
    height = top + max(len(rows), len(outer)) * step + 18
    d = Drawing(height, "The graph of the generator phase")
    d.box(24, 20, 380, height - 36, "panel")
    d.text(40, 46, made.name, bold=True)
    d.text(388, 46, "a spec", kind="dim", size=12, anchor="end")
    kinds = {"generator": "blue", "real_score": "green", "fake_score": "orange"}
    for i, (depth, node) in enumerate(outer):
        roles = [role for _, role in node.roles]
        x, y = 40 + depth * 22, top + i * step
        if isinstance(node.op, sftk.Graph) and node.op is not inner:
            d.text(x + 4, y + 17, f"{node.op.name}: a graph inside", kind="dim", size=12)
            continue
        d.box(x, y, 160, 24, kinds.get(roles[0] if roles else "", "grey"), node.op.name, size=12)
        keys = ", ".join(node.writes)
        d.text(x + 170, y + 17, f"→ {keys if len(keys) < 26 else keys[:23].rsplit(',', 1)[0] + ', …'}", kind="dim", size=12)
        if node.op is inner:
            d.arrow((404, y + 12), (444, y + 12), kind="bl")
    d.box(444, 20, 392, height - 36, "panel")
    d.text(460, 46, inner.name, bold=True)
    d.text(820, 46, "a graph is a transform, so graphs nest", kind="dim", size=12, anchor="end")
    for i, (depth, name, fold) in enumerate(rows):
        x, y = 460 + depth * 22, top + i * step
        inside = 0
        for later in rows[i + 1 :]:
            if later[0] <= depth:
                break
            inside += 1
        if fold:
            d.box(x, y, 360 - depth * 44, 24 + inside * step + (4 if inside else 0), "none")
            d.text(x + 10, y + 17, name, kind="dim", size=12)
        else:
            d.box(x, y, 160, 24, "grey" if name not in CALLS else "blue", name, size=12)
    return d


CALLS = ("denoise_step", "exit_step", "commit_context", "commit_given")


def recipe() -> Drawing:
    """Roles, optimisers, phases and the course of steps."""
    d = Drawing(290, "A recipe binds roles, optimisers and graphs, and says when each phase runs")
    heads = ((24, 150, "models"), (204, 150, "optimizers"), (384, 190, "phases"), (604, 232, "steps (generator: every 2)"))
    for x, width, head in heads:
        d.text(x + width / 2, 36, head, anchor="middle", bold=True)
    roles = (("generator", "blue"), ("fake_score", "orange"), ("real_score", "green"))
    for i, (role, kind) in enumerate(roles):
        d.box(24, 58 + i * 66, 150, 44, kind, role)
        if i < 2:
            d.box(204, 58 + i * 66, 150, 44, kind, "AdamW\nof " + role)
    d.text(99, 250, "weights, sizes, EMA", kind="dim", size=12, anchor="middle")
    d.text(279, 212, "none: never updated", kind="tg", size=12, anchor="middle")
    phases = (("generator", "specs/dmd_generator.yaml", "blue", 2), ("critic", "specs/score_critic.yaml", "orange", 1))
    for i, (name, spec, kind, every) in enumerate(phases):
        y = 58 + i * 66
        d.arrow((354, y + 22), (384, y + 22))
        d.box(384, y, 190, 44, kind, f"{name}\n{spec}", size=12)
        for step in range(8):
            x = 604 + step * 29
            runs = step % every == 0
            d.box(x, y + 10, 25, 24, kind if runs else "none", "", dash=not runs)
    for step in range(8):
        d.text(604 + step * 29 + 12.5, 184, str(step), kind="dim", size=12, anchor="middle")
    notes = (
        (384, "the data gives latents, prompts;", "the runner gives noise and key"),
        (604, "in each: run the graph, backward,", "clip, step the optimizer, average"),
    )
    for x, first, second in notes:
        d.text(x, 214, first, kind="dim", size=12)
        d.text(x, 231, second, kind="dim", size=12)
    d.text(24, 276, "A phase may read outputs of the phases above it: in: {x0: generator.x0}", kind="dim", size=12)
    return d


def schedule() -> Drawing:
    """Shift curves and a warped step list."""
    d = Drawing(380, "The shift of the time axis")
    left, top, size = 84, 30, 280

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * size, top + (1 - y) * size

    d.box(left, top, size, size, "panel")
    shifts = ((1.0, "line"), (3.0, "bl"), (5.0, "gl"), (8.0, "ol"))
    for k, kind in shifts:
        points = [at(i / 60, shift_sigma(i / 60, k)) for i in range(61)]
        d.arrow(*points, kind=kind, head=False)
    for t in (250, 500, 750, 1000):
        x, y = at(t / 1000, shift_sigma(t / 1000, 5.0))
        d.parts.append(f'<circle cx="{x:g}" cy="{y:.1f}" r="4.5" class="green"/>')
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(tick, tick)
        d.text(x, top + size + 18, f"{1000 * tick:g}", kind="dim", size=12, anchor="middle")
        d.text(left - 8, y + 4, f"{tick:g}", kind="dim", size=12, anchor="end")
    d.text(left + size / 2, top + size + 42, "timestep in the step list", kind="dim", size=12, anchor="middle")
    d.parts.append(f'<g transform="translate(34 {top + size / 2}) rotate(-90)">')
    d.text(0, 0, "sigma after the shift", kind="dim", size=12, anchor="middle")
    d.parts.append("</g>")
    for i, (k, kind) in enumerate(reversed(shifts)):
        y = 62 + i * 24
        d.arrow((410, y), (440, y), kind=kind, head=False)
        d.text(450, y + 4, f"shift {k:g}" + (": the axis as it is" if k == 1 else ""), size=12)
    d.text(410, 184, "steps [1000, 750, 500, 250]", bold=True)
    for i, k in enumerate((3.0, 5.0)):
        entries, _ = step_list((1000, 750, 500, 250), k, True)
        text = ", ".join(f"{entry.timestep:.1f}".removesuffix(".0") for entry in entries)
        d.text(410, 210 + i * 24, f"shift {k:g}, warp: true", kind="dim", size=12)
        d.text(560, 210 + i * 24, f"[{text}]", size=12)
    d.text(410, 258, "warp: false", kind="dim", size=12)
    d.text(560, 258, "the list as it stands", size=12)
    d.text(410, 296, "shift(s) = k s / (1 + (k − 1) s), applied exactly once", kind="dim", size=12)
    return d


def context() -> Drawing:
    """Which frames a block sees under the window options."""
    block = Block(index=6, start=18, frames=3, offset=18)
    k = torch.zeros(1, 18, 1, 2)
    cache = append(KVCache(), ((k, k, k, k),), tuple(range(18)))
    cases = (
        ("all frames", {}),
        ("window: 12", {"window": 12}),
        ("window: 12, sink: 3", {"window": 12, "sink": 3}),
        ("max_context_frames: 6", {"max_context_frames": 6}),
        ("… keep_first_frame: true", {"max_context_frames": 6, "keep_first_frame": True}),
    )
    d = Drawing(76 + len(cases) * 38 + 34, "What the seventh block sees")
    left, size = 216, 29
    for frame in range(21):
        d.text(left + frame * size + 12.5, 40, str(frame), kind="dim", size=12, anchor="middle")
    d.text(24, 40, "frame", kind="dim", size=12)
    for row, (label, options) in enumerate(cases):
        seen, y = window_context(cache, block, **options).positions, 56 + row * 38
        d.text(24, y + 17, label, size=13)
        for frame in range(21):
            kind = "blue" if frame >= block.start else "green" if frame in seen else "none"
            d.box(left + frame * size, y, 25, 25, kind, dash=kind == "none")
    y = 76 + len(cases) * 38
    for x, kind, text in (
        (216, "blue", "the block itself"),
        (360, "green", "context it reads from the cache"),
        (606, "none", "dropped"),
    ):
        d.box(x, y - 4, 16, 16, kind, dash=kind == "none")
        d.text(x + 24, y + 9, text, kind="dim", size=12)
    return d


def gradient() -> Drawing:
    """Where gradient flows between blocks."""
    d = Drawing(318, "Gradient between blocks")
    for column, name in enumerate(("detach", "straight_through")):
        x = 24 + column * 412
        d.box(x, 20, 400, 278, "panel")
        d.text(x + 16, 44, f"context_gradient: {name}", bold=True)
        d.box(x + 20, 66, 130, 46, "blue", "exit step\nof block i")
        d.box(x + 20, 150, 130, 46, "green", "context pass\nno gradient")
        d.box(x + 20, 236, 130, 42, "green", "keys, values", size=12)
        d.box(x + 250, 66, 130, 46, "blue", "exit step\nof block i + 1")
        d.arrow((x + 85, 112), (x + 85, 150))
        d.text(x + 92, 136, "x0", kind="dim", size=12)
        d.arrow((x + 85, 196), (x + 85, 236))
        d.arrow((x + 150, 268), (x + 340, 268), (x + 340, 112))
        if column == 0:
            d.arrow((x + 300, 112), (x + 300, 246), (x + 222, 246), kind="ol", dash=True)
            d.text(x + 206, 251, "×", kind="to", size=20, anchor="middle", bold=True)
            d.text(x + 290, 180, "stops at the cache", kind="to", size=12, anchor="end")
        else:
            d.arrow((x + 300, 112), (x + 300, 246), (x + 196, 246), (x + 196, 89), (x + 150, 89), kind="ol", dash=True)
            for i, line in enumerate(("to the exit", "step's own", "keys, values")):
                d.text(x + 206, 160 + i * 17, line, kind="to", size=12)
    return d


def layouts() -> Drawing:
    """Who sees whom in one pass."""
    d = Drawing(316, "Layouts of one forward pass")
    blocks = (1, 2, 2)
    cases = (
        ("bidirectional", "teacher, critic", torch.ones(5, 5, dtype=torch.bool)),
        ("block-causal", "student, all blocks at once", Layout(kind="block_causal", blocks=blocks).frame_mask()),
        ("teacher forcing", "clean frames, then noisy", Layout(kind="teacher_forcing", blocks=blocks).frame_mask()),
    )
    for i, (name, note, mask) in enumerate(cases):
        x, count = 60 + i * 270, len(mask)
        size = 200 / count
        d.text(x, 36, name, bold=True)
        d.text(x, 54, note, kind="dim", size=12)
        for q in range(count):
            for k in range(count):
                noisy = count > 5 and k >= 5
                kind = ("orange" if noisy else "blue") if mask[q, k] else "none"
                d.parts.append(
                    f'<rect x="{x + k * size:g}" y="{68 + q * size:g}" width="{size - 2:g}" height="{size - 2:g}" '
                    f'rx="2" class="{kind}"/>'
                )
    d.text(60, 296, "Rows ask, columns are seen. Blocks of 1, 2 and 2 frames.", kind="dim", size=12)
    d.box(600, 284, 14, 14, "blue")
    d.text(620, 296, "clean or only copy", kind="dim", size=12)
    d.box(740, 284, 14, 14, "orange")
    d.text(760, 296, "noisy copy", kind="dim", size=12)
    return d


FIGURES: tuple[Callable[[], Drawing], ...] = (
    method, rollout, state, transform, graph, recipe, schedule, context, gradient, layouts, drift,
)  # fmt: skip


if __name__ == "__main__":
    graphs.write_all()
    for figure in FIGURES:
        (HERE / f"{figure.__name__}.svg").write_text(figure().svg(), encoding="utf-8")
