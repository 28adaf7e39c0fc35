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
    _check(state, output, table, step, seeds, noise, history, known, mask, slot)
    arguments = (state, output, table, step, seeds, noise, history, known, mask, slot)
    backend = _backends.choose("reverse_step", state.device.type)
    if backend == "reference" or state.dtype == torch.float64:  # kernels know float32 only
        reference(*arguments)
    elif backend == "triton":
        torch.ops.palette.reverse_step_triton(*arguments)
    else:
        torch.ops.palette.reverse_step(*arguments)


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
    wide = (torch.float32, torch.float64)
    _checks.dtype(op, "state", state, wide)
    if state.dim() != 4:
        raise ValueError(f"{op}: state has shape {list(state.shape)}, wanted [N, C, H, W]")
    for name, value, dtypes in (
        ("output", output, _checks.FLOATING),
        ("noise", noise, (state.dtype,)),
        ("history", history, (state.dtype,)),
        ("known", known, (state.dtype,)),
        ("slot", slot, _checks.FLOATING),
    ):
        if value is not None:
            _checks.tensor(op, name, value)
            _checks.dtype(op, name, value, dtypes)
            _checks.shape(op, name, value, state.shape, "state's shape")
            _checks.device(op, name, value, state, "state")
    for name, value in (("state", state), ("history", history), ("slot", slot)):
        if value is not None:
            _checks.writable(op, name, value)
    _check_table(op, state, table, step)
    if seeds is not None:
        _checks.tensor(op, "seeds", seeds)
        _checks.dtype(op, "seeds", seeds, (torch.int64,))
        _checks.shape(op, "seeds", seeds, (state.shape[0],), "one per sample")
        _checks.device(op, "seeds", seeds, state, "state")
        if noise is not None:
            raise ValueError(f"{op}: noise and seeds are both given, wanted one of them")
    _check_mask(op, state, known, mask)
    given = (state, output, noise, history, known, mask, slot)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given):
        raise ValueError(f"{op}: an argument requires a gradient, wanted a call under no_grad()")


def _check_table(op: str, state: Tensor, table: Tensor, step: Tensor) -> None:
    _checks.tensor(op, "table", table)
    _checks.dtype(op, "table", table, (state.dtype,))
    _checks.device(op, "table", table, state, "state")
    if table.dim() != 2 or table.shape[1] != 6 or table.shape[0] == 0:
        raise ValueError(
            f"{op}: table has shape {list(table.shape)}, wanted [S, 6] (a, b, c1, c2, c3, sigma)"
        )
    _checks.tensor(op, "step", step)
    _checks.dtype(op, "step", step, (torch.int64,))
    _checks.device(op, "step", step, state, "state")
    if step.dim() != 0 and tuple(step.shape) != (state.shape[0],):
        raise ValueError(
            f"{op}: step has shape {list(step.shape)}, wanted [] or [{state.shape[0]}]"
            " (one per sample)"
        )


def _check_mask(op: str, state: Tensor, known: Tensor | None, mask: Tensor | None) -> None:
    if (known is None) != (mask is None):
        missing = "known" if known is None else "mask"
        raise ValueError(f"{op}: {missing} is missing, wanted known and mask together or neither")
    if mask is None:
        return
    _checks.tensor(op, "mask", mask)
    _checks.dtype(op, "mask", mask, (state.dtype,))
    _checks.device(op, "mask", mask, state, "state")
    fits = mask.dim() <= 4 and all(
        size in (1, wanted)
        for size, wanted in zip(mask.shape[::-1], state.shape[::-1], strict=False)
    )
    if not fits:
        n, _, h, w = state.shape
        raise ValueError(
            f"{op}: mask has shape {list(mask.shape)}, wanted [{n}, 1, {h}, {w}] or a shape that"
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
    return None


register(
    "reverse_step(Tensor(a!) state, Tensor output, Tensor table, Tensor step, Tensor? seeds,"
    " Tensor? noise, Tensor(b!)? history, Tensor? known, Tensor? mask, Tensor(c!)? slot) -> ()",
    reference,
    _fake,
)
_backends.declare("reverse_step", BACKENDS)
