"""Weights that other programs saved, renamed into ours and checked name by name.

Nothing here opens a file: a state dict comes in (``palette.checkpoint.load_torch``), weights for
one of our U-Nets go out. Recognised by their names:

* ``palette``: ``<E>_Network.pth`` of the published code, its schedule buffers beside
  ``denoise_fn.*``; ``<E>_Network_ema.pth``, ``denoise_fn.*`` alone.
* ``sr3``: ``I*_E*_gen.pth`` of the SR3 repository, other buffers beside ``denoise_fn.*``; the
  network is told sqrt(gamma).
* ``guided_diffusion``: ``model*.pt`` and ``ema_*.pt`` of guided-diffusion, told a time step.
* ``unet``: the weights of one of our networks under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from palette.models.noise_level import Embedding
from palette.upstream.adapt import LABELS, adapt
from palette.upstream.network import SCHEDULE_BUFFERS

Format = Literal["palette", "sr3", "guided_diffusion", "unet"]

EMBEDDINGS: dict[Format, Embedding | None] = {
    "palette": "gamma",
    "sr3": "sqrt_gamma",
    "guided_diffusion": "timestep",
    "unet": None,
}
"""How the weights of each format want to be told the noise level; None: as they were trained."""

_SR3_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
_PREFIX = "denoise_fn."


@dataclass(frozen=True)
class Converted:
    """Weights that load strictly, and what was done to get them.

    Attributes:
        format: what the state dict was recognised as.
        weights: name -> tensor, complete for the network they were converted for.
        dropped: names that were left out: the schedule, which is not a weight.
        changes: one line for each tensor whose shape was adapted.
    """

    format: Format
    weights: dict[str, Tensor]
    dropped: list[str]
    changes: list[str]

    @property
    def embedding(self) -> Embedding | None:
        """The ``embedding`` the network needs for these weights; None: any."""
        return EMBEDDINGS[self.format]


def recognise(state: Mapping[str, Any]) -> Format:
    """The format of a state dict, by its names.

    Raises:
        ValueError: it holds no weights of a network known here; says what it looks like.
    """
    names = {_bare(str(name)) for name in state}
    if "optimizers" in names and "schedulers" in names:
        raise ValueError("a training state (.state), not weights; give the .pth file beside it")
    if any(name.startswith(_PREFIX) for name in names):
        return "sr3" if "betas" in names or "alphas_cumprod" in names else "palette"
    if any(name.startswith("time_embed.") for name in names):
        return "guided_diffusion"
    if names & {"cond_embed.0.weight", "downs.0.weight"}:
        return "unet"
    some = ", ".join(sorted(names)[:3]) or "nothing"
    raise ValueError(
        f"not the weights of a Palette, SR3 or guided-diffusion network; it holds {some}"
    )


def convert_state_dict(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> Converted:
    """Rename a foreign state dict into weights for a U-Net of ours.

    Args:
        state: any of the formats above, with or without the ``module.`` of DistributedDataParallel.
        expected: the ``state_dict()`` of the U-Net (tensors on the meta device will do).

    guided-diffusion weights are adapted where the network differs by design: learned variances are
    cut off, the condition's input channels come first or get zeros, and a zero row stands for "no
    label".

    Raises:
        ValueError: one line with the name of every tensor that is missing, unexpected, of another
            shape or type, or not finite.
    """
    form, weights, dropped = _rename(state)
    guided = form == "guided_diffusion"
    changes = adapt(weights, expected, guided=True) if guided else []
    _compare(weights, expected, form)
    typed = {name: weights[name].to(expected[name].dtype) for name in expected}
    return Converted(form, typed, dropped, changes)


@dataclass(frozen=True)
class Fitted:
    """Weights to begin a training from, some of them perhaps fresh.

    Attributes:
        format: what the state dict was recognised as.
        weights: name -> tensor, complete for the network they were fitted to.
        changes: one line for each tensor whose shape was adapted.
        fresh: names that the state dict does not hold, or not for these classes.
        unused: names that the network does not have, or not for these classes.
    """

    format: Format
    weights: dict[str, Tensor]
    changes: list[str]
    fresh: list[str]
    unused: list[str]


def fit_state_dict(state: Mapping[str, Any], network: Mapping[str, Tensor]) -> Fitted:
    """What of a state dict another network can begin its training from.

    Args:
        state: as for :func:`convert_state_dict`, of a network that may differ from the new one in
            its channels at both ends, its classes, and in having parts that the other has not.
        network: the ``state_dict()`` of the new network, which is kept where ``state`` has nothing.

    Raises:
        ValueError: one line with the name of every tensor that cannot be adapted, or where nothing
            can be taken.
    """
    form, weights, _ = _rename(state)
    changes = adapt(weights, network, guided=form == "guided_diffusion")
    unused = [name for name in weights if name not in network]
    labels = [weights.get(LABELS), network.get(LABELS)]
    if len({len(rows) for rows in labels if isinstance(rows, Tensor)}) > 1:  # of other classes
        del weights[LABELS]
        unused.append(LABELS)
    taken = [name for name in network if name in weights]
    if not taken:
        raise ValueError(f"{form} weights: none is of this network; one is {next(iter(weights))}")
    faults = [f"{n} {fault}" for n in taken if (fault := _fault(weights[n], network[n]))]
    if faults:
        raise ValueError(f"{form} weights cannot be adapted to the network: {', '.join(faults)}")
    fitted = {n: weights.get(n, value).to(value.dtype) for n, value in network.items()}
    return Fitted(
        form,
        fitted,
        changes,
        [name for name in network if name not in weights],
        unused,
    )


@dataclass(frozen=True)
class TrainingState:
    """A published ``<E>.state`` file by parameter name.

    Attributes:
        epoch: epochs finished.
        iteration: samples seen per process (the published counter adds the batch size).
        moments: parameter name -> Adam's ``step``, ``exp_avg``, ``exp_avg_sq`` in float32; empty
            for parameters that had no gradient yet.
        options: Adam's learning rate, betas, eps and weight decay.
    """

    epoch: int
    iteration: int
    moments: dict[str, dict[str, Tensor]]
    options: dict[str, Any]


def convert_training_state(
    state: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> TrainingState:
    """Read a published ``.state`` file, which numbers the parameters in the network's order.

    Args:
        state: what ``palette.checkpoint.load_torch`` gives for the file.
        parameters: ``dict(unet.named_parameters())`` of the network its weights belong to.

    Raises:
        ValueError: in one line, when it is no such file or belongs to another network; it names
            the part of the optimizer's state, and its parameter, that is missing or unfit.
    """
    missing = [key for key in ("epoch", "iter", "optimizers") if key not in state]
    if missing:
        raise ValueError(f"not a published training state: no {', '.join(missing)}")
    try:
        adam = state["optimizers"][0]
        group = adam["param_groups"][0]
        order = [int(number) for number in group["params"]]
        slots = {int(number): dict(slot) for number, slot in adam["state"].items()}
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise ValueError(f"optimizers: not the state of one Adam optimizer ({error!r})") from None
    if len(order) != len(parameters):
        raise ValueError(
            f"optimizers: of a network with {len(order)} parameters, this one has {len(parameters)}"
        )
    moments = {
        name: _moments(slots.get(number, {}), name, parameter)
        for number, (name, parameter) in zip(order, parameters.items(), strict=True)
    }
    options = {key: value for key, value in group.items() if key != "params"}
    epoch, iteration = _count(state["epoch"], "epoch"), _count(state["iter"], "iter")
    return TrainingState(epoch, iteration, moments, options)


def _moments(slot: Mapping[Any, Any], name: str, parameter: Tensor) -> dict[str, Tensor]:
    """What Adam keeps of one parameter, checked; ValueError names the part and the parameter."""
    if not slot:
        return {}
    for part in ("exp_avg", "exp_avg_sq"):
        fault = _fault(slot[part], parameter) if part in slot else "is missing"
        if fault:
            raise ValueError(f"optimizers: {part} of {name} {fault}")
    steps = _count(slot.get("step"), f"optimizers: step of {name}")
    return {
        "step": torch.tensor(float(steps)),
        "exp_avg": slot["exp_avg"].float(),
        "exp_avg_sq": slot["exp_avg_sq"].float(),
    }


def _count(value: Any, what: str) -> int:
    """A number of things done, a tensor or, in older releases of PyTorch, an int."""
    try:
        number = int(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        number = -1
    if number < 0:
        found = " ".join(repr(value).split())[:60]
        raise ValueError(f"{what} is {found}, expected a whole number, at least 0")
    return number


def _rename(state: Mapping[str, Any]) -> tuple[Format, dict[str, Any], list[str]]:
    """The format of a state dict, its weights under our names, and the names of the others."""
    form = recognise(state)
    buffers = {"palette": SCHEDULE_BUFFERS, "sr3": _SR3_BUFFERS}.get(form, ())
    weights: dict[str, Any] = {}
    dropped = []
    for name, value in state.items():
        bare = _bare(str(name))
        if bare in buffers:
            dropped.append(bare)
        elif _renamed(bare, form) in weights:
            raise ValueError(f"{form} weights: {bare} is there twice, with and without 'module.'")
        else:
            weights[_renamed(bare, form)] = value
    return form, weights, dropped


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _renamed(name: str, form: Format) -> str:
    if form == "guided_diffusion" and name.startswith("time_embed."):
        return name.replace("time_embed.", "cond_embed.", 1)
    # A name without the prefix stays as it is, to be reported as unexpected.
    return name.removeprefix(_PREFIX) if form in ("palette", "sr3") else name


def _compare(weights: Mapping[str, Any], expected: Mapping[str, Tensor], form: Format) -> None:
    """Raise ValueError unless the names and shapes are exactly the expected ones."""
    complaints = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "unfit": [
            f"{name} {fault}"
            for name, wanted in expected.items()
            if name in weights and (fault := _fault(weights[name], wanted))
        ],
    }
    found = [f"{len(all_)} {kind}: {', '.join(all_)}" for kind, all_ in complaints.items() if all_]
    if found:
        raise ValueError(f"{form} weights do not fit the network: {'; '.join(found)}")


def _fault(value: Any, wanted: Tensor) -> str:
    """What is wrong with a weight, in words; empty when nothing is."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, expected a tensor"
    if not value.is_floating_point() or value.layout != torch.strided:
        return f"is {value.dtype} {value.layout}, expected dense floating-point numbers"
    if value.shape != wanted.shape:
        return f"is {_shape(value)}, expected {_shape(wanted)}"
    return "" if bool(value.isfinite().all()) else "holds values that are not finite"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
