"""Fused ops put into somebody else's network, in place, and taken out again.

``accelerate`` looks for GroupNorm with SiLU (and scale and shift) and for attention in diffusers'
blocks, in guided-diffusion's blocks whoever wrote them, and in any ``nn.Sequential``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from palette.acceleration import diffusers, guided_diffusion
from palette.acceleration.exchange import Fused, Swap, exchange, restore, watched, wrapper
from palette.acceleration.norms import PROJECTIONS, PairedSiLU, exchange_pair, match_sequential
from palette.models.layers import Attention, GroupNormSiLU

__all__ = ["Report", "accelerate", "decelerate"]

_MATCHERS = (diffusers.match, guided_diffusion.match, match_sequential)


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` found. Keys are paths as in ``named_modules``; "" is the module itself.

    Attributes:
        replaced: what runs on fused ops now, also where an earlier call did it.
        left: which norms, attentions and known blocks stay as they are, and why.
        own: layers of this package, which are made of the fused ops.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced) or 'nothing'}", *_grouped(self.replaced)]
        lines += [f"left as it is: {len(self.left) or 'nothing'}", *_grouped(self.left)]
        if self.own:
            lines.append(f"already made of the fused ops: {len(self.own)} layers of palette's own")
        return "\n".join(lines)


def accelerate(module: nn.Module) -> Report:
    """Let the module run on the fused ops, in place; results stay the same to rounding.

    Replaced are: in diffusers, ResnetBlock2D, the Attention over a feature map, UNet2DModel's
    output norm and its like; in networks after guided-diffusion, ResBlock, AttentionBlock and
    QKVAttention; everywhere, GroupNorm and SiLU next to each other in an ``nn.Sequential``. Every
    block is tried out before and stays as it is where it computes something else. Names,
    parameters, state dict and hooks do not change. Calling it again finds what is new
    and what has changed.

    A layer that is no longer called, since an op does its work, runs again as soon as it gets a
    hook, a forward of its own or a replacement; hooks for all modules at once do not see it.
    UNet2DModel's ``conv_norm_out`` called by itself applies the SiLU of ``conv_act`` as well.
    Second derivatives need ``palette.ops.use("reference")``. Accelerate first, then wrap in FSDP;
    undo it before ``torch.jit.script`` and exports that know no custom ops. ``copy.deepcopy`` and
    pickles of the module are accelerated too; a pickle needs this package to be read.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: module is no ``nn.Module``.
    """
    _check("accelerate", module)
    _release_stale(module)
    report = Report()
    covered: set[int] = set()  # layers that an op does the work of
    uses = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    pairs = {
        id(owner.get_submodule(names[0])): (owner, *names)
        for owner in module.modules()
        if (names := diffusers.pair(owner))
    }
    for name, part in list(module.named_modules()):
        if isinstance(part, Fused):
            _note_fused(report, covered, name, part)
        elif id(part) in covered:
            continue
        elif isinstance(part, (GroupNormSiLU, Attention)):
            report.own.append(name)
        elif type(part).__module__.startswith("palette."):
            continue
        elif id(part) in pairs:
            _consider_pair(report, uses, name, *pairs[id(part)])
        else:
            _consider(report, covered, name, part)
    return report


def decelerate(module: nn.Module) -> list[str]:
    """Undo ``accelerate``: every module gets its own class back, and nothing else is left behind.

    Also undoes it in copies and in what was read from a pickle, and in part where ``module`` is a
    part of what was accelerated.

    Returns:
        The paths of the modules that got their code back.

    Raises:
        TypeError: module is no ``nn.Module``.
        ValueError: something else changed the class of an accelerated module since.
    """
    _check("decelerate", module)
    fused = [(name, part) for name, part in module.named_modules() if isinstance(part, Fused)]
    for name, part in fused:
        if (outer := wrapper(part)) is not None:
            raise ValueError(
                f"decelerate: '{name}' has been made a {outer} since it was accelerated; "
                "undo that first"
            )
    for _, part in fused:
        if isinstance(part, Fused):  # its partner may have taken it along
            restore(part)
    return [name for name, _ in fused]


def _check(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: module is {type(module).__name__}, wanted an nn.Module")


def _release_stale(module: nn.Module) -> None:
    """Give their own code back to parts whose layers have changed, so that they are seen anew."""
    for part in list(module.modules()):
        if isinstance(part, Fused) and part.stale() and wrapper(part) is None:
            restore(part)


def _note_fused(report: Report, covered: set[int], name: str, part: Fused) -> None:
    if part._palette_swap is None or id(part) in covered or isinstance(part, PairedSiLU):
        return  # the layer around it or the norm before it speaks for it
    if part.stale():
        kind = part._palette_recipe[1].__name__
        report.left[name] = f"{kind}: it has changed since, and been made a {wrapper(part)}"
        return
    report.replaced[name] = part._palette_swap.what
    _cover(covered, part, part._palette_parts)


def _cover(covered: set[int], part: nn.Module, paths: Iterable[str]) -> None:
    """Note the layers at those paths, and the sequences in the part that they are taken from."""
    for path in paths:
        covered.add(id(part.get_submodule(path)))
        outer = path.rpartition(".")[0]
        if outer:
            covered.add(id(part.get_submodule(outer)))


def _consider(report: Report, covered: set[int], name: str, part: nn.Module) -> None:
    """Exchange the part where a matcher knows it, otherwise say why it stays."""
    for match in _MATCHERS:
        try:
            found = match(part)
        except AttributeError as error:
            found = f"it is of an unknown version: {error}"
        if isinstance(found, Swap):
            exchange(part, found)
            report.replaced[name] = found.what
            _cover(covered, part, found.parts)
            return
        if found is not None:
            report.left[name] = f"{type(part).__name__}: {found}"
            return
    if any(name.startswith(f"{outer}.") or outer == "" for outer in report.left):
        return  # the block around it has been spoken of
    if isinstance(part, nn.GroupNorm):
        report.left[name] = f"{type(part).__name__}: no SiLU is known to follow it"
    elif "Attention" in type(part).__name__ and _computes(part):
        report.left[name] = f"{type(part).__name__}: an unknown kind of attention"


def _computes(part: nn.Module) -> bool:
    """Whether the part is more than a container of other blocks."""
    children = list(part.children())
    return not children or any(isinstance(each, PROJECTIONS) for each in children)


def _consider_pair(
    report: Report, uses: Counter[int], name: str, owner: nn.Module, *names: str
) -> None:
    """Let the norm do the work of the activation that its owner calls next."""
    layers = [owner.get_submodule(each) for each in names]
    if any(uses[id(layer)] > 1 for layer in layers):
        report.left[name] = "GroupNorm: it or its activation is also used elsewhere"
    elif any(map(watched, layers)):
        report.left[name] = "GroupNorm: it or its activation has a hook"
    else:
        report.replaced[name] = exchange_pair(owner, *names)


def _grouped(entries: dict[str, str]) -> list[str]:
    """One line for each text, with how often it occurs and the first path."""
    paths: dict[str, list[str]] = {}
    for path, text in entries.items():
        paths.setdefault(text, []).append(path or "the module itself")
    return [
        f"  {len(where)} x {text} ({where[0]}{', ...' * (len(where) > 1)})"
        for text, where in paths.items()
    ]
