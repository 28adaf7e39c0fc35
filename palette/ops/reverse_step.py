"""One step of the solver, in place and in one op.

With (a, b, c1, c2, c3, sigma) = table[step]: x0 = clamp(a * y + b * output, -1, 1), which the row
makes an epsilon, x0 or v prediction, and y' = c1 * x0 + c2 * y + c3 * history + sigma * z. For the
ancestral solver that is the posterior mean of DDPM (arXiv:2006.11239, eq. 7) with the clamped x0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palette.ops import _backends, _checks
from palette.ops._registration import register
from palette.ops.noise import noise as draw_noise

_WIDE = (torch.float32, torch.float64)
_COUNTS = (torch.int64,)
BACKENDS = ("reference", "cpp", "cuda", "triton")


def reverse_step(
    state: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    slot: Tensor | None = None,
) -> None:
    """Advance ``state`` by one step, in place.

    Args:
        state: [N, C, H, W] float32, y_t; becomes y_{t-1}. Any strides. (float64 too, with the other
            float32 arguments in float64: for measuring.)
        output: [N, C, H, W], the network's, in float32, bfloat16 or float16.
        table: [S, 6] float32, a row (a, b, c1, c2, c3, sigma) per step.
        step: int64 on state's device, scalar or [N], in [0, S): the row to use. Not advanced here.
        seeds: [N] int64; z is ``palette.ops.noise`` of stream 0 at step + 1 (the initial noise is
            step 0).
        noise: [N, C, H, W] float32, z itself, in place of seeds. With neither there is no noise.
        history: [N, C, H, W] float32; the x0 of the previous step, replaced by the new x0.
        known, mask: [N, C, H, W] float32 and [N, 1, H, W] (or any shape that broadcasts to state),
            1 in the hole; y' becomes known * (1 - mask) + mask * y'. Both or neither.
        slot: [N, C, H, W] in any floating dtype and layout, a channel slice of the next network
            input; y' is written into it.

    Raises:
        TypeError: an argument has a dtype that the op does not take.
        ValueError: a shape or a device does not fit, arguments exclude each other, or a gradient is
            wanted (the op has none).
    """
    arguments = (state, output, table, step, seeds, noise, history, known, mask, slot)
    try:
        if (
            _backends.in_cpp("reverse_step", state)
            and state.dtype == torch.float32
            and not (torch.is_grad_enabled() and _wants_gradient(*arguments))
        ):
            _OP(*arguments)
            return
    except Exception:  # it knows that something does not fit, and not how to say it
        _check(*arguments)
        raise
    _check(*arguments)
    backend = _backends.choose("reverse_step", state.device.type)
    if backend == "reference" or state.dtype == torch.float64:  # which no kernel knows
        reference(*arguments)
    elif backend == "triton":
        _backends.in_triton(torch.ops.palette.reverse_step_triton, *arguments)
    else:
        _OP(*arguments)


def reference(
    state: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    slot: Tensor | None = None,
) -> None:
    """The op in plain PyTorch, every product and sum rounded in the published order."""
    rows = table.index_select(0, step.reshape(-1))  # [1 or N, 6]
    a, b, c1, c2, c3, sigma = rows.reshape(*rows.shape, 1, 1, 1).unbind(1)  # [1 or N, 1, 1, 1] each
    x0 = (a * state + b * output.to(state.dtype)).clamp(-1, 1)
    y = c1 * x0 + c2 * state
    if history is not None:
        y = y + c3 * history
        history.copy_(x0)
    if seeds is not None:
        noise = draw_noise(seeds, step + 1, state.shape[1:])
    if noise is not None:
        y = y + sigma * noise
    if known is not None and mask is not None:
        y = known * (1 - mask) + mask * y
    state.copy_(y)
    if slot is not None:
        slot.copy_(y)


def _check(
    state: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    history: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    slot: Tensor | None,
) -> None:
    op = "reverse_step"
    _checks.tensor(op, "state", state)
    # Read once: of a small picture this function is a good part of the step.
    shape, dtype, device = state.shape, state.dtype, state.device
    _checks.dtype(op, "state", state, _WIDE)
    if len(shape) != 4:
        raise ValueError(f"{op}: state has shape {list(shape)}, wanted [N, C, H, W]")
    wide = (dtype,)
    for name, value, dtypes in (
        ("output", output, _checks.FLOATING),
        ("noise", noise, wide),
        ("history", history, wide),
        ("known", known, wide),
        ("slot", slot, _checks.FLOATING),
    ):
        if value is not None:
            _checks.tensor(op, name, value)
            _checks.dtype(op, name, value, dtypes)
            _checks.shape(op, name, value, shape, "state's shape")
            _checks.device(op, name, value, device, "state")
    for name, value in (("state", state), ("history", history), ("slot", slot)):
        if value is not None:
            _checks.writable(op, name, value)
    _check_table(op, table, step, shape, wide, device)
    if seeds is not None:
        _checks.tensor(op, "seeds", seeds)
        _checks.dtype(op, "seeds", seeds, _COUNTS)
        _checks.shape(op, "seeds", seeds, shape[:1], "one per sample")
        _checks.device(op, "seeds", seeds, device, "state")
        if noise is not None:
            raise ValueError(f"{op}: noise and seeds are both given, wanted one of them")
    _check_mask(op, known, mask, shape, wide, device)
    if torch.is_grad_enabled() and _wants_gradient(
        state, output, noise, history, known, mask, slot
    ):
        raise ValueError(f"{op}: an argument requires a gradient, wanted a call under no_grad()")


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return any(each is not None and each.requires_grad for each in tensors)


def _check_table(
    op: str,
    table: Tensor,
    step: Tensor,
    shape: torch.Size,
    dtypes: tuple[torch.dtype],
    device: torch.device,
) -> None:
    _checks.tensor(op, "table", table)
    _checks.dtype(op, "table", table, dtypes)
    _checks.device(op, "table", table, device, "state")
    found = table.shape
    if len(found) != 2 or found[1] != 6 or found[0] == 0:
        raise ValueError(
            f"{op}: table has shape {list(found)}, wanted [S, 6] (a, b, c1, c2, c3, sigma)"
        )
    _checks.tensor(op, "step", step)
    _checks.dtype(op, "step", step, _COUNTS)
    _checks.device(op, "step", step, device, "state")
    if step.dim() != 0 and step.shape != shape[:1]:
        raise ValueError(
            f"{op}: step has shape {list(step.shape)}, wanted [] or [{shape[0]}] (one per sample)"
        )


def _check_mask(
    op: str,
    known: Tensor | None,
    mask: Tensor | None,
    shape: torch.Size,
    dtypes: tuple[torch.dtype],
    device: torch.device,
) -> None:
    if mask is None or known is None:
        if mask is known:
            return
        missing = "known" if known is None else "mask"
        raise ValueError(f"{op}: {missing} is missing, wanted known and mask together or neither")
    _checks.tensor(op, "mask", mask)
    _checks.dtype(op, "mask", mask, dtypes)
    _checks.device(op, "mask", mask, device, "state")
    n, c, h, w = shape
    found = mask.shape
    if found == (n, 1, h, w):
        return
    fits = len(found) <= 4 and all(
        size in (1, wanted) for size, wanted in zip(found[::-1], (w, h, c, n), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{op}: mask has shape {list(found)}, wanted [{n}, 1, {h}, {w}] or a shape that"
            " broadcasts to state"
        )


def _fake(
    state: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    history: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    slot: Tensor | None,
) -> None:
    # Not only a shape function: an argument on the device "meta" takes a call in C++ here.
    _check(state, output, table, step, seeds, noise, history, known, mask, slot)


register(
    "reverse_step(Tensor(a!) state, Tensor output, Tensor table, Tensor step, Tensor? seeds,"
    " Tensor? noise, Tensor(b!)? history, Tensor? known, Tensor? mask, Tensor(c!)? slot) -> ()",
    reference,
    _fake,
)
_OP = torch.ops.palette.reverse_step.default
_backends.declare("reverse_step", BACKENDS)
