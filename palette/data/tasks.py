"""Tasks: plain functions from a picture to a batch entry.

A task is called with the picture, float32 [C, H, W] in [-1, 1], the sample's seed and its draws,
and returns a dict with ``target`` [C, H, W], ``condition`` [C', H, W] and, where only a hole is to
be filled, ``mask`` [1, H, W] (1 = hole), all float32; where the condition is noisy itself,
``level`` [] (its gamma, 1 = clean). A task that has an argument ``noise`` is
given the sample's normal numbers of stream 1, drawn for the whole batch at once, and one that has
an argument ``condition`` the second picture of a pair, [C, H, W] like the first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from palette import ops
from palette.data import degrade, masks
from palette.data.order import Draws

Entry = dict[str, Any]
Task = Callable[..., Entry]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as image programs turn colour to grey

TASKS: dict[str, Task] = {}


def register_task(name: str) -> Callable[[Task], Task]:
    """Decorator that lets a config name a task: ``task.name: <name>``.

    Raises ValueError when the name is taken.
    """

    def keep(task: Task) -> Task:
        if name in TASKS:
            raise ValueError(f"name: a task called '{name}' is registered already")
        TASKS[name] = task
        return task

    return keep


def make_task(name: str, *, mask: str | None = None, **options: Any) -> Task:
    """The task that a config names, with those of its options that it takes.

    ``mask`` names its hole (``masks.find_mask``); the other options are the keyword arguments of
    the tasks below. One that is None leaves the task its own default, and so does the mask "auto".
    Raises ValueError for an unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(sorted(TASKS))}, got '{name}'")
    task = TASKS[name]
    if takes(task, "parts"):
        chosen = {each: make_task(each, mask=mask, **options) for each in options["tasks"]}
        levels = any(takes(part, "augmentation") for part in chosen.values())
        options = {**options, "parts": chosen, "levels": levels and options["augmentation"] > 0}
    given = {key: value for key, value in options.items() if value is not None and takes(task, key)}
    if mask not in (None, "auto") and takes(task, "mask"):
        given["mask"] = masks.find_mask(mask)
    return functools.partial(task, **given) if given else task


def takes(task: Task, argument: str) -> bool:
    """Whether the task has an argument of this name."""
    return argument in inspect.signature(task).parameters


@register_task("inpaint")
def inpaint(
    image: Tensor,
    seed: int,
    draws: Draws,
    *,
    mask: masks.Mask = masks.hybrid,
    noise: Tensor | None = None,
) -> Entry:
    """Fill a hole; the condition is the picture [C, H, W] with noise in the hole."""
    hole = torch.from_numpy(mask(image.shape[1], image.shape[2], draws))
    hole = hole.to(image.dtype).unsqueeze(0)
    if noise is None:
        noise = condition_noise([seed], tuple(image.shape))[0]
    return {"target": image, "condition": fill_hole(image, hole, noise), "mask": hole}


@register_task("uncrop")
def uncrop(
    image: Tensor,
    seed: int,
    draws: Draws,
    *,
    mask: masks.Mask = masks.uncrop,
    noise: Tensor | None = None,
) -> Entry:
    """Continue a picture beyond its border: inpainting with the hole on the outside."""
    return inpaint(image, seed, draws, mask=mask, noise=noise)


@register_task("colorize")
def colorize(image: Tensor, seed: int, draws: Draws, *, condition: Tensor | None = None) -> Entry:
    """Give a grey picture colours; the condition is grey in three equal channels.

    It is made here from the colours unless the source has pairs. Raises ValueError when the picture
    has no colours to learn from.
    """
    if image.shape[0] != 3:
        raise ValueError(f"image must have shape [3, H, W] to colorize, got {list(image.shape)}")
    return {"target": image, "condition": grey(image) if condition is None else condition}


@register_task("paired")
def paired(image: Tensor, seed: int, draws: Draws, *, condition: Tensor | None = None) -> Entry:
    """Make one picture of a pair from the other.

    Raises ValueError when the source has no pairs.
    """
    if condition is None:
        raise ValueError("source: must give pairs for the task 'paired', such as data.source=pairs")
    return {"target": image, "condition": condition}


@register_task("restore_jpeg")
def restore_jpeg(image: Tensor, seed: int, draws: Draws, *, quality: int | None = None) -> Entry:
    """Undo JPEG compression of a ``quality`` of 1 to 100, by default drawn as in the paper.

    Works for any number of channels; see :func:`degrade.jpeg`.
    """
    chosen = degrade.paper_quality(draws) if quality is None else quality
    return {"target": image, "condition": degrade.jpeg(image, chosen)}


@register_task("upscale")
def upscale(
    image: Tensor,
    seed: int,
    draws: Draws,
    *,
    factor: float = 4.0,
    augmentation: float = 0.0,
    noise: Tensor | None = None,
) -> Entry:
    """Raise the resolution; the condition is the picture at 1/factor, enlarged again (bicubic).

    With ``augmentation`` in [0, 1) a part of the condition's variance, uniform from 0 to it, is
    noise, and the network is told how much. So a stage of a cascade learns to mend what the stage
    before it draws (Ho et al. 2022, "Cascaded Diffusion Models", section 4; Saharia et al. 2022,
    "Imagen", section 2.3).
    """
    size = (image.shape[1], image.shape[2])
    condition = degrade.enlarge(degrade.lower(image, factor), size)
    if augmentation == 0.0:
        return {"target": image, "condition": condition}
    if noise is None:
        noise = condition_noise([seed], tuple(image.shape))[0]
    share = draws.real(0.0, augmentation)
    condition = degrade.blur_with_noise(condition, noise, share)
    return {"target": image, "condition": condition, "level": torch.tensor(1.0 - share)}


@register_task("generate")
def generate(image: Tensor, seed: int, draws: Draws) -> Entry:
    """Make pictures from nothing: the condition has no channels."""
    return {"target": image, "condition": image[:0]}


@register_task("mixture")
def mixture(
    image: Tensor,
    seed: int,
    draws: Draws,
    *,
    parts: Mapping[str, Task],
    weights: Sequence[float],
    levels: bool = False,
    noise: Tensor | None = None,
) -> Entry:
    """One of several tasks, drawn by weight: the paper's generalist; ``task`` says which it is.

    Every entry has a mask, all hole where its task has none, and, with ``levels``, a level. In
    training ``parts`` are the tasks that a config names, with its options.
    """
    left = draws.real() * sum(weights)
    for name, weight in zip(parts, weights, strict=True):  # noqa: B007 - the last one stays
        left -= weight
        if left < 0:
            break
    part = parts[name]
    extra = {"noise": noise} if noise is not None and takes(part, "noise") else {}
    entry = {"mask": torch.ones_like(image[:1]), **part(image, seed, draws, **extra)}
    if levels:
        entry.setdefault("level", torch.tensor(1.0))
    return {**entry, "task": name}


def grey(image: Tensor) -> Tensor:
    """Luma of an RGB picture [3, H, W] in three channels, rounded to the 256 greys of a file."""
    weights = torch.tensor(_LUMA, dtype=image.dtype, device=image.device)
    luma = torch.einsum("c,chw->hw", weights, image)
    return luma.add(1).mul(127.5).round().div(127.5).sub(1).clamp(-1, 1).expand(3, -1, -1).clone()


def condition_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Normal numbers [N, *shape] that fill the holes of the conditions of these seeds."""
    return ops.noise(torch.tensor(seeds, dtype=torch.int64), 0, shape, stream=ops.philox.CONDITION)


def fill_hole(image: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """The picture outside the hole, exactly, and the noise inside."""
    return torch.where(mask > 0.5, noise.to(image.dtype), image)
