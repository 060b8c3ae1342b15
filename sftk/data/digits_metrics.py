"""Metrics of generated digit clips: is it the digit, does it move as asked, how far is the distribution from real clips.

`python -m sftk.data.digits_metrics` makes the shipped reference statistics again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sftk.data.digits import ASSETS, CANVAS, DIRECTIONS, STEPS, DigitClips, decode_latents, parse_prompt
from sftk.data.digits_classifier import load_classifier
from sftk.errors import DataError, NonFiniteError, ShapeError

REFERENCE = ASSETS / "reference.safetensors"
CLIPS, FRAMES = 600, 21
"""Clips behind the reference statistics, and the frames of each."""

_REFERENCE_SEED = 20_260_101
_CHUNK = 100
_SHIFTS = ((0, 0), *STEPS, (-1, -1), (-1, 1), (1, -1), (1, 1))
_SCALES = (("digit", 0.65), ("shift", 5.5), ("look", 20.0), ("consistency", 10.0))


@attrs.frozen(kw_only=True, eq=False)
class Statistics:
    """Mean [D] and unbiased covariance [D, D] of clip features, float64 on the CPU."""

    mean: Tensor
    cov: Tensor


def digit_accuracy(log_probs: Tensor, digits: Tensor) -> Tensor:
    """The share of clips whose most probable digit is the prompt's.

    Args:
        log_probs: [B, 10], of `classify_clips`.
        digits: [B], integers in 0..9.

    Returns:
        A scalar in [0, 1], float32.

    Raises:
        ShapeError: axes differ from the above.

    Example:
        >>> digit_accuracy(torch.eye(10)[[3, 4]], torch.tensor([3, 5])).item()
        0.5
    """
    if log_probs.ndim != 2 or digits.shape != log_probs.shape[:1]:
        raise ShapeError(f"log_probs {tuple(log_probs.shape)} and digits {tuple(digits.shape)}; expected [B, 10] and [B]")
    return (log_probs.argmax(-1) == digits.to(log_probs.device)).float().mean()


def direction_accuracy(video: Tensor, directions: Tensor) -> Tensor:
    """The share of clips that move as the prompt says.

    For each transition the best of five shifts on the torus is found by correlation: none, left, right, up, down. A clip is
    right when its direction got more votes than any other shift. Ties count for no motion, so a blank clip is wrong.

    Args:
        video: [B, F, 16, 16] with F at least 2.
        directions: [B], integers into `DIRECTIONS`.

    Returns:
        A scalar in [0, 1], float32.

    Raises:
        ShapeError: axes differ from the above.

    Example:
        >>> clips = DigitClips("test").__getitems__(range(4))
        >>> video = decode_latents(clips["latents"])
        >>> direction_accuracy(video, clips["direction"]).item(), direction_accuracy(video.flip(1), clips["direction"]).item()
        (1.0, 0.0)
    """
    _check(video)
    if directions.shape != video.shape[:1]:
        raise ShapeError(f"directions has shape {tuple(directions.shape)}; expected [{video.shape[0]}], one for each clip")
    best = _shift_profile(video.float(), _SHIFTS[:5]).argmax(-1)
    votes = nn.functional.one_hot(best, 5).sum(1)
    asked = nn.functional.one_hot(directions.to(video.device).long() + 1, 5).bool()
    return (votes[asked] > votes.masked_fill(asked, -1).amax(-1)).float().mean()


def clip_features(classifier: nn.Module, video: Tensor) -> Tensor:
    """The space in which the Frechet distance is taken: 48 numbers a clip, each group scaled by a fixed number.

    - 32, digit: the classifier's features, mean over frames;
    - 9, shift: the correlation of each frame with the one before, moved by -1, 0 or 1 pixels along both axes (where it moves);
    - 4, look: mean, root mean square, mean absolute step between neighbours, and mean v (1 - v) (greyness) of pixels;
    - 3, consistency: the residual (root mean square) of the best shift, the deviation over frames of brightness, and that of
      the classifier's features.

    Args:
        classifier: frames [N, 16, 16] -> (log-probabilities, features [N, 32]).
        video: [B, F, 16, 16], in [0, 1], with F at least 2.

    Returns:
        [B, 48] float32.

    Raises:
        ShapeError: axes or sizes differ from the above.

    Example:
        >>> clip_features(load_classifier(), torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 48])
    """
    return _describe(classifier, video)[1]


def feature_statistics(features: Tensor) -> Statistics:
    """Mean and covariance of features [B, D], in float64.

    Raises:
        DataError: fewer than two clips.

    Example:
        >>> feature_statistics(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).cov.tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise DataError(f"features has shape {tuple(features.shape)}; expected [B, D] of at least two clips")
    features = features.detach().to(device="cpu", dtype=torch.float64)
    return Statistics(mean=features.mean(0), cov=torch.atleast_2d(torch.cov(features.T)))


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) between two Gaussians (Dowson and Landau 1982), in float64.

    Only symmetric eigenproblems are solved, so singular covariances do no harm.

    Args:
        mean1, mean2: [D].
        cov1, cov2: [D, D], symmetric and positive semidefinite.

    Raises:
        ShapeError: sizes disagree.
        NonFiniteError: an input holds NaN or infinities.

    Example:
        >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))
        4.0
    """
    size = mean1.numel()
    if mean1.shape != mean2.shape or mean1.ndim != 1 or not cov1.shape == cov2.shape == (size, size):
        found = ", ".join(str(tuple(value.shape)) for value in (mean1, cov1, mean2, cov2))
        raise ShapeError(f"found means and covariances of shapes {found}; expected [D], [D, D], [D], [D, D]")
    mean1, cov1, mean2, cov2 = (value.detach().to(device="cpu", dtype=torch.float64) for value in (mean1, cov1, mean2, cov2))
    if not all(value.isfinite().all() for value in (mean1, cov1, mean2, cov2)):
        raise NonFiniteError("a mean or a covariance of the Frechet distance is not finite; look for NaN in the clips")
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    product = root @ cov2 @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2.0).clamp_min(0.0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2.0 * overlap
    return max(distance.item(), 0.0)


@functools.cache
def reference_statistics() -> Statistics:
    """The shipped statistics of 600 real clips of 21 frames of the `test` split.

    Real motion is uniform and its start is random, so they serve every window of a long clip, and other lengths too (with 5
    frames the distance of the same clips is 0.003).

    Raises:
        DataError: the shipped file cannot be read.

    Example:
        >>> reference_statistics().cov.shape
        torch.Size([48, 48])
    """
    try:
        return Statistics(**load_file(REFERENCE))
    except (OSError, SafetensorError, TypeError) as error:
        hint = "`python -m sftk.data.digits_metrics` makes it again"
        raise DataError(f"cannot read the reference statistics in {REFERENCE}: {error}; {hint}") from error


def compute_reference(frames: int = FRAMES) -> Statistics:
    """What `reference_statistics` ships, made again with the shipped classifier (about 2 s on one CPU thread).

    Example:
        >>> made, shipped = compute_reference(frames=2), reference_statistics()
        >>> frechet_distance(made.mean, made.cov, shipped.mean, shipped.cov) < 0.1
        True
    """
    clips = DigitClips("test", frames=frames, seed=_REFERENCE_SEED, size=CLIPS).__getitems__(range(CLIPS))
    return feature_statistics(_describe_chunks(load_classifier(), decode_latents(clips["latents"]))[1])


def evaluate_clips(video: Tensor, prompts: Sequence[str], *, classifier: nn.Module | None = None) -> dict[str, float]:
    """Digit accuracy, direction accuracy and Frechet distance to real clips. About 3 s for 600 clips on one CPU thread.

    Args:
        video: [B, F, 16, 16], in [0, 1]: any window of the clips, usually of 21 frames. The distance is biased upwards
            for few clips: take 600, with prompts drawn like those of `DigitClips`.
        prompts: B prompts.
        classifier: what `load_classifier` gives, on the device of `video`; None loads it. The reference belongs to it.

    Returns:
        `digit_accuracy`, `direction_accuracy` in [0, 1], and `frechet`.

    Raises:
        ShapeError: axes or sizes differ from the above.
        DataError: a prompt cannot be read, or there are fewer than two clips.
        NonFiniteError: the clips hold NaN or infinities.

    Example:
        >>> clips = DigitClips("test", seed=3).__getitems__(range(8))
        >>> scores = evaluate_clips(decode_latents(clips["latents"]), clips["prompt"])
        >>> scores["direction_accuracy"], sorted(scores)
        (1.0, ['digit_accuracy', 'direction_accuracy', 'frechet'])
    """
    _check(video)
    if len(prompts) != video.shape[0]:
        raise ShapeError(f"found {len(prompts)} prompts for {video.shape[0]} clips; expected one for each")
    if not video.isfinite().all():
        raise NonFiniteError("the clips hold NaN or infinities; the model that made them diverged")
    asked = [parse_prompt(prompt) for prompt in prompts]
    digits = torch.tensor([digit for digit, _ in asked])
    directions = torch.tensor([DIRECTIONS.index(direction) for _, direction in asked])
    log_probs, features = _describe_chunks(classifier or load_classifier(video.device), video)
    found, reference = feature_statistics(features), reference_statistics()
    return {
        "digit_accuracy": digit_accuracy(log_probs, digits).item(),
        "direction_accuracy": direction_accuracy(video, directions).item(),
        "frechet": frechet_distance(found.mean, found.cov, reference.mean, reference.cov),
    }


def evaluate_real(
    count: int = CLIPS, *, frames: int = FRAMES, seed: int = 1, classifier: nn.Module | None = None
) -> dict[str, float]:
    """The same scores for `count` real clips of the `test` split, drawn independently of the reference's.

    Example:
        >>> evaluate_real(16, seed=2)["direction_accuracy"]
        1.0
    """
    clips = DigitClips("test", frames=frames, seed=seed, size=count).__getitems__(range(count))
    return evaluate_clips(decode_latents(clips["latents"]), clips["prompt"], classifier=classifier)


def _check(video: Tensor) -> None:
    if video.ndim != 4 or video.shape[1] < 2 or video.shape[2:] != (CANVAS, CANVAS):
        raise ShapeError(f"video has shape {tuple(video.shape)}; expected [B, F, {CANVAS}, {CANVAS}] with F at least 2")


def _shift_profile(video: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """[B, F - 1, S]: the correlation coefficient of each frame with the one before, moved by each of S shifts."""
    frames = video - video.mean((2, 3), keepdim=True)
    frames = frames / frames.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-6)
    before, after = frames[:, :-1], frames[:, 1:]
    return torch.stack([(before.roll(shift, (2, 3)) * after).sum((2, 3)) for shift in shifts], dim=-1)


def _describe(classifier: nn.Module, video: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, 10] and features [B, 48] of clips [B, F, 16, 16]."""
    _check(video)
    video = video.float()
    log_probs, digit = (value.unflatten(0, video.shape[:2]) for value in classifier(video.flatten(0, 1)))
    profile = _shift_profile(video, _SHIFTS)
    moved = torch.stack([video[:, :-1].roll(shift, (2, 3)) for shift in _SHIFTS[:5]], dim=2)
    residual = (moved - video[:, 1:, None]).square().mean((3, 4)).amin(2).sqrt().mean(1)
    edges = torch.stack([(video - video.roll(1, axis)).abs() for axis in (2, 3)]).sum(0).mean((1, 2, 3))
    look = (video.mean((1, 2, 3)), video.square().mean((1, 2, 3)).sqrt(), edges, (video * (1.0 - video)).mean((1, 2, 3)))
    brightness = video.mean((2, 3)).std(1, correction=0)
    flicker = digit.var(1, correction=0).mean(-1).sqrt()
    groups = {
        "digit": digit.mean(1),
        "shift": profile.mean(1),
        "look": torch.stack(look, dim=-1),
        "consistency": torch.stack((residual, brightness, 0.1 * flicker), dim=-1),
    }
    return log_probs.mean(1), torch.cat([scale * groups[name] for name, scale in _SCALES], dim=-1)


@torch.no_grad()
def _describe_chunks(classifier: nn.Module, video: Tensor) -> tuple[Tensor, Tensor]:
    parts = [_describe(classifier, chunk) for chunk in video.split(_CHUNK)]
    return torch.cat([log_probs for log_probs, _ in parts]), torch.cat([features for _, features in parts])


if __name__ == "__main__":
    made = compute_reference()
    REFERENCE.write_bytes(save({"mean": made.mean, "cov": made.cov}))
    print(f"{REFERENCE}: {REFERENCE.stat().st_size} bytes")
