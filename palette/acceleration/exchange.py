"""Exchanging the class of one module for one that computes the same with fused ops, and back.

Only the class of the instance changes. Parameters, buffers, children, hooks and attributes stay
where they are, so state dicts, optimizers, ``isinstance``, ``repr``, ``copy.deepcopy``, pickling,
DataParallel's replicas and ``torch.compile`` see the module they know.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Swap:
    """What a module computes from now on.

    Attributes:
        kind: the class with the fused code.
        what: one line for the report.
        parts: path and class of each layer inside the module that the fused code does not call.
        method: the method of the module that the fused code stands for.
    """

    kind: type[Fused]
    what: str
    parts: Mapping[str, type[nn.Module]]
    method: str = "forward"


class Fused(nn.Module):
    """Base of the classes with fused code; it comes before the module's own class."""

    # kind, original class, method
    _palette_recipe: ClassVar[tuple[type[Fused], type[nn.Module], str]]
    _palette_swap: Swap | None = None  # None in what nn.Sequential makes of a slice of itself

    @property
    def _palette_parts(self) -> Mapping[str, type[nn.Module]]:
        return {} if self._palette_swap is None else self._palette_swap.parts

    def fits(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``fused`` computes this call; if not, the module's own code does."""
        raise NotImplementedError

    def fused(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own method in fused ops."""
        raise NotImplementedError

    def stale(self) -> bool:
        """Whether its layers are no longer those that it was exchanged for."""
        return any(type(_at(self, path)) is not kind for path, kind in self._palette_parts.items())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in no module, so copies and pickles carry what it is made of.
        state = super().__reduce_ex__(protocol)[2]
        return _revive, self._palette_recipe, state


_made: dict[tuple[type[Fused], type[nn.Module], str], type[Fused]] = {}


def _revive(kind: type[Fused], original: type[nn.Module], method: str) -> Fused:
    made = _fused_class(kind, original, method)
    return made.__new__(made)


def _fused_class(kind: type[Fused], original: type[nn.Module], method: str) -> type[Fused]:
    """The one class of that kind for that original class."""
    recipe = (kind, original, method)
    if recipe not in _made:
        _made[recipe] = _make(*recipe)
    return _made[recipe]


def _make(kind: type[Fused], original: type[nn.Module], method: str) -> type[Fused]:
    own: Callable[..., Any] = getattr(original, method)

    @functools.wraps(own)
    def choose(self: Fused, *args: Any, **kwargs: Any) -> Any:
        swap = self._palette_swap
        known = swap is not None and touched(self, swap.parts) is None
        if known and self.fits(*args, **kwargs):
            return self.fused(*args, **kwargs)
        return own(self, *args, **kwargs)

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_palette_recipe": (kind, original, method),
        method: choose,
    }
    return type(original.__name__, (kind, original), namespace)


def exchange(module: nn.Module, swap: Swap) -> None:
    """Give the module, and no other instance of its class, the fused code."""
    made = _fused_class(swap.kind, type(module), swap.method)
    module._palette_swap = swap  # type: ignore[assignment]
    module.__class__ = made


def wrapper(module: Fused) -> str | None:
    """The class that somebody has put over the fused one since; None where there is none."""
    return None if "_palette_recipe" in vars(type(module)) else type(module).__name__


def restore(module: Fused) -> None:
    """Undo ``exchange``: the module is again what it was, and its partner, if any, as well."""
    vars(module).pop("_palette_swap", None)
    pair = vars(module).pop("_palette_pair", None)
    module.__class__ = module._palette_recipe[1]  # type: ignore[assignment]
    for partner in () if pair is None else pair.layers.values():
        if isinstance(partner, Fused):
            restore(partner)


def touched(module: nn.Module, parts: Mapping[str, type[nn.Module]]) -> str | None:
    """What has become of the layers that fused code does not call; None where all are as expected.

    Whoever put a hook on such a layer, or another layer in its place, wants it to be called.
    """
    for path, kind in parts.items():
        part = _at(module, path)
        if part is None or type(part) is not kind:
            return f"its {path} is no {kind.__name__}"
        if watched(part):
            return f"its {path} has a hook"
    return None


def _at(module: nn.Module, path: str) -> nn.Module | None:
    part: nn.Module | None = module
    for name in path.split("."):
        part = None if part is None else part._modules.get(name)
    return part


def watched(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class says: hooks, or a forward of its own."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def verified(module: nn.Module, swap: Swap, *shapes: Shape | None) -> Swap | str:
    """The swap, where it computes what the module does on arguments of these shapes (None: None).

    Otherwise why not, for the report. The comparison is made on a copy with random weights, since
    many published layers begin at zero, on the CPU in float32, evaluating and training.
    """
    if "forward" in vars(module):
        return "its forward has been replaced"
    if any(type(parameter) is not nn.Parameter for parameter in module.parameters()):
        return "its parameters are no plain tensors"
    reason = touched(module, swap.parts)
    if reason is not None:
        return reason
    try:
        twin = stand_in(module)
        before = _outputs(twin, swap.method, shapes)
        exchange(twin, swap)
        after = _outputs(twin, swap.method, shapes)
        if not all(map(same, after, before)):
            return "it computes something else than the known block of its kind"
    except Exception as error:  # foreign code: whatever it raises, it stays as it is
        reason = traceback.format_exception_only(error)[0].splitlines()[0]
        return f"it could not be tried out: {reason}"
    return swap


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """In which foreign code is tried: on the CPU, without gradients and without autocast."""
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


def stand_in(module: nn.Module) -> nn.Module:
    """A copy of the module on the CPU in float32, with random weights and without hooks."""
    generator = torch.Generator().manual_seed(0)
    plain: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name in _HOOKS:
            memo[id(getattr(part, name))] = OrderedDict()
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        bound = (3 / max(fan_in, 1)) ** 0.5
        value = torch.empty(parameter.shape, **plain).uniform_(generator=generator)
        memo[id(parameter)] = nn.Parameter(bound * (2 * value - 1), requires_grad=False)
    return copy.deepcopy(module, memo).to(**plain)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal to rounding, with the same shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


def _outputs(module: nn.Module, method: str, shapes: Sequence[Shape | None]) -> list[Tensor]:
    """The results on random arguments, some of usual size and some so small that eps matters."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    with trial(), torch.random.fork_rng(devices=()):
        for training in (False, True):
            module.train(training)
            for size in (1.0, 0.003):
                arguments = [_argument(shape, size, generator) for shape in shapes]
                torch.manual_seed(2)  # the same dropout before and after
                outputs.append(getattr(module, method)(*arguments))
    return outputs


def _argument(shape: Shape | None, size: float, generator: torch.Generator) -> Tensor | None:
    if shape is None:
        return None
    return size * (0.5 + torch.randn(shape, generator=generator, dtype=torch.float32))
