"""A loss of one's own: a transform, a graph that reuses the toolkit's, ten training steps; then the same graph from YAML.

Run it from anywhere: `python examples/custom_loss.py`. As a plugin (see examples/custom_loss.yaml) it only registers the
transform.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sftk import Graph, transform
from sftk.functional import add_noise, draw_noise, draw_timestep, predict_x0
from sftk.objectives.dmd import at_least_float32


@transform(
    out=("loss", "loss_weight"),
    kind="reduced",
    example=lambda batch, randn: {"x0_pred": randn(batch, 3, 4, 2, 2), "latents": randn(batch, 3, 4, 2, 2)},
)
def motion_loss(x0_pred: Tensor, latents: Tensor, *, weight: float = 1.0):
    """Squared error of the frames plus `weight` times that of the differences between neighbouring frames.

    Args:
        x0_pred, latents: [B, F, C, H, W], F at least 2.
        weight: of the motion.

    Returns:
        loss: [] float32, the sum. loss_weight: [], the number of elements.

    Example:
        >>> motion_loss(torch.zeros(1, 2, 1, 1, 1), torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1, 1), weight=0.5)
        (tensor(1.5000), tensor(2.))
    """
    error = at_least_float32(x0_pred) - at_least_float32(latents)
    loss = error.square().sum() + weight * error.diff(dim=1).square().sum()
    return loss, torch.full_like(loss.detach(), float(error.numel()))


def make_graph(weight: float = 0.5) -> Graph:
    """A causal denoiser's pass over noised clips, judged by `motion_loss`."""
    return Graph(
        [
            draw_timestep.node(in_={"like": "latents"}, shift=3.0, per="block"),
            draw_noise.node(in_={"like": "latents"}),
            add_noise.node(in_={"x0": "latents"}),
            predict_x0.node(models={"denoiser": "student"}, out={"x0": "x0_pred"}, frames_per_block=3),
            motion_loss.node(weight=weight),
        ],
        inputs=("latents", "prompt_embeds", "key"),
        outputs=("loss", "loss_weight"),
        ports=("student",),
        name="motion",
    )


RECIPE = {
    "version": 1,
    "latents": {"frames": 21, "channels": 4, "height": 8, "width": 8},
    "data": {"use": "digits", "with": {"split": "train"}},
    "models": {"student": {"size": "digits", "weights": "assets/digits/init.safetensors"}},
    "optimizers": {"student": {"lr": 1e-4}},
    "phases": [{"name": "motion", "update": "student", "clip": 1.0}],
    "train": {"steps": 10},
    "batch": {"global": 4},
}


def main() -> None:
    """Trains ten steps with the graph above, then as many with the one in YAML; both end at the same loss."""
    from sftk.runtime.run import run_recipe

    print(make_graph().to_tree())
    with tempfile.TemporaryDirectory() as folder:
        mine = run_recipe(RECIPE, run_dir=Path(folder) / "python", graphs={"motion": make_graph()})
        theirs = run_recipe(Path(__file__).with_suffix(".yaml"), run_dir=Path(folder) / "yaml")
        last = [run.metrics.read_text().splitlines()[-1] for run in (mine, theirs)]
    print("from Python:", last[0])
    print("from YAML:  ", last[1])


if __name__ == "__main__":
    sys.exit(main())
