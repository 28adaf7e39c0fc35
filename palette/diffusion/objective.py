"""The training loss: noise a clean batch to random levels and compare what the network predicts.

Every random choice is a function of the samples' seeds (Philox streams 2, 4 and 5), so the loss of
a sample depends neither on the batch around it nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palette import ops
from palette.diffusion.schedule import Schedule
from palette.diffusion.solvers import PREDICTIONS, REGRESSION

LOSSES: tuple[str, ...] = ("l2", "l1", "huber")


class Loss(NamedTuple):
    """What one batch cost."""

    total: Tensor
    """Scalar, the mean of ``per_sample``: what to call backward on."""
    per_sample: Tensor
    """[N], weighted."""
    gamma: Tensor
    """[N], the noise levels drawn."""


def loss(
    network: Callable[..., Tensor],
    schedule: Schedule,
    batch: Mapping[str, Tensor],
    seeds: Tensor | None,
    *,
    prediction: str = "epsilon",
    kind: str = "l2",
    normalise: bool = True,
    huber_delta: float = 1.0,
    min_snr: float | None = None,
    label_drop: float = 0.0,
    null_label: int | None = None,
    noise: Tensor | None = None,
    gamma: Tensor | None = None,
) -> Loss:
    """The denoising loss of a batch (Palette eq. 3; the public code's training step).

    Args:
        network: called as ``network(x, gamma, label, seeds)`` with x = [condition, noisy target]
            [N, C'+C, H, W], gamma float32 [N], label int64 [N] or None, and ``level=`` where the
            batch has one; returns [N, C, H, W].
        schedule: where the noise levels come from.
        batch: ``target`` [N, C, H, W] in [-1, 1], ``condition`` [N, C', H, W], and where the task
            has them ``mask`` [N, 1, H, W] (1 = hole: the network sees clean pixels outside it, and
            only the hole counts), ``label`` int64 [N] and ``level`` [N] (of the condition).
        seeds: int64 [N], one per sample; may be None where ``noise`` and ``gamma`` are given.
        prediction: "epsilon", "x0", "v", or "regression": the network sees neither the target nor
            noise in the hole, at the lowest level, and is to answer with the target.
        kind: "l2", "l1" or "huber" (linear beyond ``huber_delta``).
        normalise: with a mask, divide by the area of the hole. False is the published mean over
            all pixels, which shrinks with the hole.
        min_snr: weight samples by min(SNR, min_snr) in units of the x0 loss (Hang et al. 2023: 5).
        label_drop: probability of training a sample as ``null_label``, for guidance.
        noise, gamma: [N, C, H, W] and [N], used in place of those drawn from the seeds.

    Raises ValueError for an unknown name, a number out of range, and missing seeds.
    """
    _check(prediction, kind, huber_delta, min_snr, label_drop, null_label)
    target, mask = batch["target"], batch.get("mask")
    if prediction == REGRESSION:
        gamma = target.new_full((len(target),), schedule.range[0], dtype=torch.float32)
        noise = torch.zeros_like(target)
    if gamma is None:
        draws = ops.philox.uniform(_given(seeds), (2,), stream=ops.philox.NOISE_LEVEL)
        gamma = schedule.draw(draws[:, 0], draws[:, 1])
    if noise is None:
        noise = ops.noise(_given(seeds), 0, target.shape[1:], stream=ops.philox.TRAINING)
    level = gamma[:, None, None, None]
    noisy = level.sqrt() * target + (1.0 - level).sqrt() * noise
    if prediction == REGRESSION:
        noisy = noise  # the lowest level still shows a trace of the target
    if mask is not None:
        mask = mask.to(target.dtype)
        noisy = mask * noisy + (1.0 - mask) * target
    label = _dropped(batch.get("label"), seeds, label_drop, null_label)
    told = {"level": batch["level"]} if "level" in batch else {}
    output = network(torch.cat((batch["condition"], noisy), dim=1), gamma, label, seeds, **told)
    wanted = prediction_target(prediction, target, noise, gamma)
    per_sample = _distance(output.to(wanted.dtype), wanted, mask, kind, huber_delta, normalise)
    if min_snr is not None:
        per_sample = per_sample * _min_snr_weight(prediction, gamma, min_snr)
    return Loss(per_sample.mean(), per_sample, gamma)


def prediction_target(prediction: str, target: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """What a perfect network answers, [N, C, H, W]: the noise, the image, or v between the two.

    v = sqrt(gamma) epsilon - sqrt(1 - gamma) x0 (Salimans and Ho 2022). ``gamma`` is [N].
    """
    if prediction == "epsilon":
        return noise
    if prediction in ("x0", REGRESSION):
        return target
    level = gamma[:, None, None, None]
    return level.sqrt() * noise - (1.0 - level).sqrt() * target


def _distance(
    output: Tensor,
    wanted: Tensor,
    mask: Tensor | None,
    kind: str,
    huber_delta: float,
    normalise: bool,
) -> Tensor:
    """Mean distance of every sample [N], inside the hole where there is a mask."""
    if mask is not None:
        output, wanted = mask * output, mask * wanted
    if kind == "l2":
        distance = F.mse_loss(output, wanted, reduction="none")
    elif kind == "l1":
        distance = F.l1_loss(output, wanted, reduction="none")
    else:
        distance = F.huber_loss(output, wanted, reduction="none", delta=huber_delta)
    mean = distance.mean(dim=(1, 2, 3))
    if mask is None or not normalise:
        return mean
    share = mask.mean(dim=(1, 2, 3))
    return mean / share.clamp(min=1.0 / mask[0].numel())  # an image without a hole costs nothing


def _min_snr_weight(prediction: str, gamma: Tensor, limit: float) -> Tensor:
    """Weight [N] that makes the loss of any prediction the x0 loss times min(SNR, limit)."""
    snr = gamma / (1.0 - gamma)
    weight = snr.clamp(max=limit)
    if prediction == "epsilon":
        return weight / snr
    if prediction == "v":
        return weight / (snr + 1.0)
    return weight


def _dropped(
    label: Tensor | None, seeds: Tensor | None, probability: float, null_label: int | None
) -> Tensor | None:
    """The labels [N], each replaced by the null label with the given probability."""
    if label is None or null_label is None or probability == 0.0:
        return label
    drawn = ops.philox.uniform(_given(seeds), (), stream=ops.philox.LABEL_DROP)
    return torch.where(drawn < probability, null_label, label)


def _given(seeds: Tensor | None) -> Tensor:
    if seeds is None:
        raise ValueError("seeds is None, expected int64 [N] unless noise and gamma are given")
    return seeds


def _check(
    prediction: str,
    kind: str,
    huber_delta: float,
    min_snr: float | None,
    label_drop: float,
    null_label: int | None,
) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is '{prediction}', expected one of {', '.join(PREDICTIONS)}")
    if kind not in LOSSES:
        raise ValueError(f"loss kind is '{kind}', expected one of {', '.join(LOSSES)}")
    if not huber_delta > 0.0:
        raise ValueError(f"huber_delta is {huber_delta}, expected a number above 0")
    if min_snr is not None and not min_snr > 0.0:
        raise ValueError(f"min_snr is {min_snr}, expected a number above 0")
    if not 0.0 <= label_drop < 1.0:
        raise ValueError(f"label_drop is {label_drop}, expected a probability in [0, 1)")
    if label_drop > 0.0 and null_label is None:
        raise ValueError(f"null_label is None, expected a class with label_drop {label_drop}")
