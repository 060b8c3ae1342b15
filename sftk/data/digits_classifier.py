"""A small classifier of single frames of the digits task, for metrics and rewards.

`python -m sftk.data.digits_classifier` fits it again and writes the shipped weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from sftk.data.digits import ASSETS, CANVAS, load_digits, render_clips
from sftk.errors import CheckpointError, ShapeError

WEIGHTS = ASSETS / "classifier.safetensors"
FEATURES = 32
"""Width of the penultimate layer."""


class DigitClassifier(nn.Module):
    """Three convolutions that wrap around the edges, mean and maximum over positions, two linear layers: 27,754 parameters.

    The parameters of a new one are uninitialised (no global random state is touched): fit it or load weights.

    Example:
        >>> sum(parameter.numel() for parameter in DigitClassifier().parameters())
        27754
    """

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        wrap = {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "device": "meta"}
        self.stem = nn.Conv2d(1, 16, **wrap)
        self.middle = nn.Conv2d(16, 32, **wrap)
        self.top = nn.Conv2d(32, 64, **wrap)
        self.project = nn.Linear(2 * 64, FEATURES, device="meta")
        self.head = nn.Linear(FEATURES, 10, device="meta")
        self.to_empty(device=device)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [N, 16, 16] in [0, 1] to log-probabilities [N, 10] and features [N, 32]."""
        hidden = F.avg_pool2d(F.silu(self.stem(frames.unsqueeze(1))), 2)
        hidden = F.silu(self.top(F.silu(self.middle(hidden))))
        features = F.silu(self.project(torch.cat((hidden.mean((2, 3)), hidden.amax((2, 3))), dim=1)))
        return self.head(features).log_softmax(-1), features


def classify_clips(classifier: nn.Module, video: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and features of clips, each the mean over frames. Differentiable with respect to `video`.

    Args:
        classifier: frames [N, 16, 16] -> (log-probabilities [N, 10], features [N, D]).
        video: [B, F, 16, 16], in [0, 1].

    Returns:
        log_probs [B, 10] and features [B, D], float32. The log-probabilities are averaged, not renormalised.

    Raises:
        ShapeError: `video` has other axes or sizes, or no frames.

    Example:
        >>> digits = load_digits("test")
        >>> video = render_clips(digits.images[:2], torch.tensor([0, 2]), torch.zeros(2, 2, dtype=torch.long), frames=4)
        >>> log_probs, features = classify_clips(load_classifier(), video)
        >>> log_probs.argmax(-1).tolist() == digits.labels[:2].tolist(), features.shape
        (True, torch.Size([2, 32]))
    """
    if video.ndim != 4 or video.shape[1] < 1 or video.shape[2:] != (CANVAS, CANVAS):
        raise ShapeError(f"video has shape {tuple(video.shape)}; expected [B, F, {CANVAS}, {CANVAS}] with F at least 1")
    log_probs, features = classifier(video.flatten(0, 1).float())
    shape = (*video.shape[:2], -1)
    return log_probs.reshape(shape).mean(1), features.reshape(shape).mean(1)


def load_classifier(device: torch.device | str = "cpu", path: str | Path = WEIGHTS) -> DigitClassifier:
    """The shipped classifier in fp32 and eval mode, its parameters frozen (gradients still reach its input).

    Raises:
        CheckpointError: the file is missing or holds other weights.

    Example:
        >>> any(parameter.requires_grad for parameter in load_classifier().parameters())
        False
    """
    classifier = DigitClassifier(device)
    try:
        weights = load_file(path, device=str(device))
        classifier.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        message = f"cannot load the digits classifier from {path}: {error}"
        raise CheckpointError(f"{message}; `python -m sftk.data.digits_classifier` makes the file again") from error
    return classifier.eval().requires_grad_(False)


def fit_classifier(seed: int = 0, steps: int = 2400, batch: int = 96) -> DigitClassifier:
    """Train a classifier on the `train` split: slightly warped digits at random places, half of them noisy and blurred.

    About 40 seconds on one CPU thread. Deterministic for one machine, torch version and number of threads.

    Args:
        seed: seeds initialisation, order and augmentation.
        steps: AdamW updates, under a one-cycle learning rate.
        batch: frames in an update.

    Example:
        >>> a, b = (fit_classifier(seed=1, steps=2, batch=4).head.weight for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    classifier = DigitClassifier()
    for parameter in classifier.parameters():
        bound = (3.0 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.0
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.02)
    digits = load_digits("train")
    for step in range(steps):
        rate = 4e-3 * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(digits.labels), (batch,), generator=generator)
        frames = _augment(digits.images[chosen], generator)
        loss = F.nll_loss(classifier(frames)[0], digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval().requires_grad_(False)


def save_classifier(classifier: nn.Module, path: str | Path = WEIGHTS) -> Path:
    """Write the weights in half precision, as `load_classifier` reads them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_classifier(load_classifier(), Path(folder, "weights.safetensors"))
        ...     torch.equal(load_classifier(path=path).head.weight, load_classifier().head.weight)
        True
    """
    path = Path(path)
    path.write_bytes(save({key: value.half().contiguous().cpu() for key, value in classifier.state_dict().items()}))
    return path


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Frames [B, 16, 16] of digits [B, 8, 8], most of them slightly warped, at random places on the torus.

    Contrast, focus and noise of a random half of them differ, as they do in generated frames.
    """
    batch = images.shape[0]
    affine = torch.eye(2, 3) + 0.1 * (2.0 * torch.rand(batch, 2, 3, generator=generator) - 1.0)
    grid = F.affine_grid(affine, [batch, 1, *images.shape[1:]], align_corners=False)
    warped = F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
    images = torch.where(torch.rand(batch, 1, 1, generator=generator) < 0.3, images, warped)
    starts = torch.randint(CANVAS, (batch, 2), generator=generator)
    clean = render_clips(images, torch.zeros(batch, dtype=torch.long), starts, frames=1)
    spread = F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    strength, contrast, blur, noise = torch.rand(4, batch, 1, 1, 1, generator=generator)
    blurred = clean.lerp(spread, 0.6 * blur) * (0.7 + 0.4 * contrast)
    noisy = blurred + 0.2 * noise * torch.randn(clean.shape, generator=generator)
    return torch.where(strength < 0.5, clean, noisy.clamp(0.0, 1.0)).squeeze(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    written = save_classifier(fit_classifier(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
    print(f"{written}: {written.stat().st_size} bytes")
