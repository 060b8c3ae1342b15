"""Draws the packaged specs: nested ones unfolded, nodes coloured by the role that they call, and what they write."""

from __future__ import annotations

from pathlib import Path

from drawing import Drawing

import sftk
from sftk.core.transform import Node

FOLDER = Path(__file__).parent / "specs"
SPECS = (
    "dmd_generator", "score_critic", "sid_generator", "gan_generator", "gan_discriminator", "dmd2_generator", "dmd2_critic",
    "ode_regression", "teacher_forcing", "diffusion_forcing", "consistency", "dmd_teacher_forced", "dmd_diffusion_forced",
    "meanflow", "scm", "dmd_reward",
)  # fmt: skip
ROLES = {
    "generator": "blue", "denoiser": "blue", "real_score": "green", "teacher": "green", "target": "green",
    "fake_score": "orange", "discriminator": "orange", "decoder": "green", "reward": "green",
}  # fmt: skip
ROW, LEFT, INDENT, BOX = 32, 28, 24, 236


def spec_figure(name: str) -> Drawing:
    """One spec: a row for each node, top to bottom."""
    graph = sftk.Graph.from_spec(f"specs/{name}.yaml")
    rows: list[tuple[int, Node]] = []

    def unfold(nodes: tuple[Node, ...], depth: int) -> None:
        for node in nodes:
            rows.append((depth, node))
            if isinstance(node.op, sftk.Graph) and node.op.name != "rollout":
                unfold(node.op.nodes, depth + 1)

    unfold(graph.nodes, 0)
    d = Drawing(64 + ROW * len(rows) + 30, f"The graph of specs/{name}.yaml")
    d.text(LEFT, 32, f"specs/{name}.yaml", bold=True, size=14)
    d.text(832, 32, "reads " + ", ".join(graph.inputs), kind="dim", size=12, anchor="end")
    for i, (depth, node) in enumerate(rows):
        x, y = LEFT + depth * INDENT, 50 + i * ROW
        roles = list(dict.fromkeys(role for _, role in node.roles))
        inside = isinstance(node.op, sftk.Graph)
        kind = ROLES.get(roles[0], "grey") if roles and not (inside and node.op.name != "rollout") else "grey"
        if inside and node.op.name != "rollout":
            d.text(x + 2, y + 17, f"specs/{node.op.name}.yaml", size=12, bold=True)
        else:
            d.box(x, y, BOX, 24, kind, node.op.name, size=12)
            d.text(x + BOX + 12, y + 17, ", ".join(roles) + ("" if node.grad or not roles else ", no gradient"), size=12)
        keys = ", ".join(node.writes)
        d.text(
            832,
            y + 17,
            "→ " + (keys if len(keys) < 44 else keys[:42].rsplit(",", 1)[0] + ", …"),
            kind="dim",
            size=12,
            anchor="end",
        )
    d.text(832, 64 + ROW * len(rows) + 12, "returns " + ", ".join(graph.outputs), kind="dim", size=12, anchor="end")
    return d


def write_all() -> None:
    """Writes `specs/<name>.svg` for each."""
    FOLDER.mkdir(exist_ok=True)
    for name in SPECS:
        (FOLDER / f"{name}.svg").write_text(spec_figure(name).svg(), encoding="utf-8")
