"""The inputs that every backend of every op is held to, and how far it may be from float64.

Loaded by conftest.py, which hands each case to the tests as a fixture.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from palette import ops

NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: mmap names it from 3.13 on
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "PALETTE_EMULATED" in os.environ  # tests/cuda: CUDA kernels under the name of the CPU's

SHORT = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    None: "none",
}


def within(
    value: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    factor: float,
    name: str = "value",
    beside: Tensor | None = None,
) -> None:
    """Fail where ``value`` is further from ``exact`` (float64) than ``factor`` roundings to dtype.

    The distance is the Euclidean norm over the whole tensor; one rounding is what ``exact`` itself
    loses when it is stored in ``dtype``, and at least a quarter of the format's epsilon, so that
    numbers that happen to be representable leave room. ``beside`` gives the size to compare with
    where ``exact`` can vanish.
    """
    exact = exact.detach().cpu()
    value = value.detach().cpu()
    assert value.shape == exact.shape, f"{name} has shape {value.shape}, wanted {exact.shape}"
    error = (value.double() - exact).norm()
    rounding = (exact.to(dtype).double() - exact).norm()
    size = exact if beside is None else torch.stack((exact.norm(), beside.detach().cpu().norm()))
    rounding = torch.maximum(rounding, size.norm() * torch.finfo(dtype).eps / 4)
    if INTERPRETED and dtype == torch.bfloat16:
        factor *= 2.2  # Triton's interpreter stores bfloat16 truncated instead of rounded
    assert error <= factor * rounding, (
        f"{name} is {(error / rounding).item():.3g} roundings from float64, allowed {factor:g}"
    )


def places(op: str) -> list[tuple[str, str]]:
    """(backend, device) for all that runs here; under Triton's interpreter only what it serves."""
    cpu = [name for name in ops.backends(op) if name not in ("cuda", "triton")]
    if INTERPRETED:
        return [("triton", "cpu")] if "triton" in ops.backends(op) else []
    found = [(name, "cpu") for name in cpu]
    if torch.cuda.is_available():
        found += [(name, "cuda") for name in ops.backends(op) if name != "cpp"]
    return found


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers as a kernel stores them in ``dtype``."""
    if INTERPRETED and dtype == torch.bfloat16:  # truncated, see within
        return (value.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    return value.to(dtype)


def strides(x: Tensor) -> tuple[int, ...]:
    """The strides that matter: those of dimensions longer than 1."""
    return tuple(step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1)


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with their tensors on a device, in the same strides, also those of 0."""
    return {
        name: value.to(device).as_strided(value.shape, value.stride())
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def _channel_slice(values: Tensor) -> Tensor:
    """Channels 1 ... C of a channels-last tensor of C + 3."""
    n, c, *rest = values.shape
    wide = values.new_full((n, *rest, c + 3), float("nan")).movedim(-1, 1)
    wide[:, 1 : c + 1] = values
    return wide[:, 1 : c + 1]


def _wide_rows(values: Tensor) -> Tensor:
    """The leading columns of a contiguous tensor with rows two longer."""
    wide = values.new_full((*values.shape[:-1], values.shape[-1] + 2), float("nan"))
    wide[..., :-2] = values
    return wide[..., :-2]


def _offset(values: Tensor) -> Tensor:
    """Contiguous, but one element past an aligned address."""
    flat = values.new_full((values.numel() + 1,), float("nan"))
    flat[1:] = values.reshape(-1)
    return flat[1:].view(values.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.contiguous(),
    "channels_last": lambda values: values.movedim(1, -1).contiguous().movedim(-1, 1),
    "channel_slice": _channel_slice,
    "wide_rows": _wide_rows,
    "transposed": lambda values: values.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda values: values[:1].contiguous().expand(values.shape),
    "offset": _offset,
}


FAR = 2**30 + 2**20  # elements from a sample to the next: a stride that fits into 32 bits


def far(values: Tensor) -> Tensor:
    """The same numbers, three samples, the last further away than 32-bit offsets reach.

    Memory that is never touched costs nothing on a CPU.
    """
    n, *_ = values.shape
    assert 2**31 < (n - 1) * FAR < 2**32
    total = (n - 1) * FAR + values.numel()
    if values.device.type == "cpu":
        size = total * values.element_size()
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        flat = torch.frombuffer(memory, dtype=values.dtype)
    else:
        torch.cuda.empty_cache()
        gigabytes = total * values.element_size() / 1e9
        if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
            pytest.skip(f"needs {gigabytes:.1f} GB more of the GPU's memory")
        flat = torch.empty(total, dtype=values.dtype, device=values.device)
    return flat.as_strided(values.shape, (FAR, *values.stride()[1:])).copy_(values)


def _scales(x: Tensor) -> Tensor:
    """Neighbouring channels a factor of up to 1e6 apart."""
    exponents = torch.linspace(-3, 3, x.shape[1]).reshape(1, -1, *(1,) * (x.dim() - 2))
    return x * 10**exponents


def _with_first(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.reshape(-1)[0] = value
    return x


DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: 0.5 * x - 0.3,
    "far": lambda x: x + 1e4,  # the mean is 1e4 standard deviations away from zero
    "constant": lambda x: torch.full_like(x, 3.0),
    "zero": torch.zeros_like,
    "outlier": lambda x: _with_first(x, 1e4),
    "tiny": lambda x: x * 1e-40,  # denormal in float32
    "scales": _scales,
    "large": lambda x: x * 1e4,  # its square overflows float16
}


@dataclass(frozen=True)
class NormCase:
    """Arguments of group_norm_silu."""

    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    affine: torch.dtype | None = torch.float32
    film: torch.dtype | None = None
    silu: bool = True
    data: str = "normal"
    big: bool = False  # too slow for an interpreter

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        parts = [f"{shape}g{self.groups}", SHORT[self.dtype], self.layout, self.data]
        parts += [f"affine-{SHORT[self.affine]}", f"film-{SHORT[self.film]}"]
        return "-".join(parts + (["silu"] if self.silu else ["linear"]))

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        g = torch.Generator().manual_seed(sum(self.shape) + self.groups)
        x = DATA[self.data](torch.randn(self.shape, generator=g)).to(device, self.dtype)
        n, c = self.shape[:2]

        def vector(shape: tuple[int, ...], centre: float, dtype: torch.dtype | None) -> Any:
            if dtype is None:
                return None
            return (centre + 0.3 * torch.randn(shape, generator=g)).to(device, dtype)

        # scale and shift as a network makes them: the two halves of one linear layer's output
        film = vector((n, 2 * c), 0.0, self.film)
        return {
            "x": LAYOUTS[self.layout](x),
            "weight": vector((c,), 1.0, self.affine),
            "bias": vector((c,), 0.0, self.affine),
            "groups": self.groups,
            "eps": 1e-5,
            "scale": None if film is None else film[:, :c],
            "shift": None if film is None else film[:, c:],
            "silu": self.silu,
        }


def conditioning(arguments: dict[str, Any]) -> float:
    """How many standard deviations the mean of a group is away from zero, at least 1.

    Rounding the mean to float32 moves the normalised x by this many units in its last place.
    """
    x = arguments["x"].detach().cpu().double()
    if x.numel() == 0 or arguments["x"].dtype == torch.float64:
        return 1.0
    grouped = x.reshape(x.shape[0], arguments["groups"], -1)
    spread = (grouped.var(-1, correction=0) + arguments["eps"]).sqrt()
    return max(1.0, (grouped.mean(-1).abs() / spread).max().item())


def for_interpreter(cases: list[Any]) -> list[Any]:
    """What Triton's interpreter gets, which takes a fifth of a second a case: every channel count
    (they come first) and a sixth of the rest."""
    quick = [case for case in cases if not getattr(case, "big", False)]
    return [case for i, case in enumerate(quick) if i < len(NETWORK_CHANNELS) or i % 6 == 0]


f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# (channels, groups) of every GroupNorm of the published network, of the paper's and of SR3
NETWORK_CHANNELS = [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]

NORM_CASES = [
    *(NormCase((2, c, 3, 5), 32, f32, "channels_last", film=f32) for c in NETWORK_CHANNELS),
    *(NormCase((1, c, 5, 3), 32, bf16, "channels_last", film=bf16) for c in NETWORK_CHANNELS),
    *(NormCase((1, c, 5, 3), 32, f32, "contiguous") for c in NETWORK_CHANNELS),
    # channels per group 1, 2, 3, 5, 12; positions 1, 2, 49, 255, 257, 1024
    *(
        NormCase(shape, groups, dtype, layout)
        for shape, groups in [
            ((2, 8, 7, 7), 8),
            ((3, 6, 15, 17), 2),
            ((2, 10, 257), 2),
            ((5, 24, 1, 2), 2),
            ((2, 12, 1, 1), 4),
            ((1, 36, 32, 32), 3),
            ((2, 1, 4, 4), 1),
            ((33, 4, 2, 2), 2),
        ]
        for dtype in (f32, bf16)
        for layout in ("contiguous", "channels_last")
    ),
    *(NormCase((2, 32, 6, 5), 8, dtype, layout, film=f32)
      for dtype in (f32, f16) for layout in LAYOUTS),
    # what may be left out, and mixed dtypes
    *(
        NormCase((2, 64, 4, 6), 32, dtype, "channels_last", affine, film, silu)
        for dtype in (f32, bf16, f16, f64)
        for affine in (None, f32, dtype)
        for film in (None, f32, dtype)
        for silu in (True, False)
    ),
    *(NormCase((2, 32, 16, 16), 8, f32, layout, data=data)
      for data in DATA for layout in ("contiguous", "channels_last")),
    NormCase((2, 32, 16, 16), 8, bf16, "channels_last", data="large"),
    NormCase((2, 32, 16, 16), 8, f16, "contiguous", data="large"),
    # nothing to do, and ranks other than four
    NormCase((0, 32, 4, 4), 8, f32, "channels_last", film=f32),
    NormCase((2, 32, 0, 4), 8),
    NormCase((3, 32), 8),
    NormCase((2, 16, 2, 3, 4), 4, bf16, "channels_last"),
    # real sizes
    NormCase((1, 64, 128, 128), 32, bf16, "channels_last", big=True),
    NormCase((1, 192, 64, 64), 32, f32, "contiguous", film=f32, big=True),
]  # fmt: skip


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of attention."""

    shape: tuple[int, ...]  # [N, 3C, ...]
    heads: int
    order: str = "legacy"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    logits: float = 1.0  # standard deviation of q and k
    big: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return (
            f"{shape}h{self.heads}-{self.order}-{SHORT[self.dtype]}-{self.layout}-{self.logits:g}"
        )

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        g = torch.Generator().manual_seed(sum(self.shape))
        qkv = torch.randn(self.shape, generator=g) * self.logits
        qkv = LAYOUTS[self.layout](qkv.to(device, self.dtype))
        return {"qkv": qkv, "heads": self.heads, "order": self.order}


# More tokens than two blocks of a GPU's kernels (slow without one), or one of the C++ kernels.
MANY = 131 if EMULATED or INTERPRETED else 257
IMAGE = (11, 12) if EMULATED or INTERPRETED else (40, 13)

ATTENTION_CASES = [
    *(
        AttentionCase((2, 96, *size), 4, order, dtype, layout)
        for size, layout in [
            ((4, 4), "channels_last"),
            ((4, 4), "contiguous"),
            ((17,), "contiguous"),
            ((17,), "channels_last"),
        ]
        for order in ("legacy", "new")
        for dtype in (f32, bf16, f16)
    ),
    *(AttentionCase((2, 48, 3, 5), 2, "new", f32, layout) for layout in LAYOUTS),
    *(
        AttentionCase((1, 96, t), 1, order, f32)
        for t in (1, 64, 255)
        for order in ("legacy", "new")
    ),
    AttentionCase((1, 3 * 128, 4, 4), 2, "legacy", bf16, "channels_last"),  # 64 channels per head
    # heads of 80 and of 5 channels
    *(
        AttentionCase((1, width, 3, 7), 2, order, dtype, "channels_last")
        for width, order in [(480, "new"), (30, "legacy")]
        for dtype in (f32, bf16)
    ),
    AttentionCase((1, 96, 16, 16), 1, "new", f64, "channels_last"),
    AttentionCase((2, 48, 8, 8), 2, "legacy", f32, logits=30.0),  # softmax is one-hot
    AttentionCase((0, 48, 4, 4), 2),
    # more than a block of tokens, head dimensions 1, 5, 20, 33, 64
    AttentionCase((2, 6, 9), 2, "new"),
    AttentionCase((1, 30, 17), 2, "legacy", f32, "channels_last"),
    *(
        AttentionCase(shape, 2, order, dtype, layout, big=True)
        for shape, order, dtype in [
            ((1, 120, *IMAGE), "legacy", f32),
            ((1, 198, MANY), "new", bf16),
            ((1, 384, MANY), "legacy", f16),
            ((1, 192, *IMAGE), "new", f32),
            ((1, 30, 17, 16), "new", f64),
        ]
        for layout in ("contiguous", "channels_last")
    ),
    # the published network at 256x256 has 16 heads of 32 at 32x32; here at 128x128
    AttentionCase((1, 1536, 16, 16), 16, "legacy", f32, "channels_last", big=True),
    AttentionCase((1, 1536, 16, 16), 16, "legacy", bf16, "channels_last", big=True),
]


@dataclass(frozen=True)
class NoiseCase:
    """Arguments of noise."""

    seeds: tuple[int, ...]
    shape: tuple[int, ...]
    step: int | tuple[int, ...] = 0
    stream: int = 0
    layer: int = 0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        step = self.step if isinstance(self.step, int) else "each"
        return f"n{len(self.seeds)}-{shape}-step{step}-stream{self.stream}-layer{self.layer}"

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        step = self.step if isinstance(self.step, int) else torch.tensor(self.step, device=device)
        seeds = torch.tensor(self.seeds, dtype=torch.int64, device=device)
        return {
            "seeds": seeds,
            "step": step,
            "shape": self.shape,
            "stream": self.stream,
            "layer": self.layer,
        }


EXTREME_SEEDS = (0, 1, -1, 2**32, 2**63 - 1, -(2**63))

NOISE_CASES = [
    *(
        NoiseCase(EXTREME_SEEDS, shape, step=3)
        for shape in [(), (1,), (2,), (3,), (5,), (255,), (257,), (1025,), (3, 7, 5), (3, 16, 16)]
    ),
    NoiseCase(EXTREME_SEEDS, (3, 5), step=(0, 1, 2, 1000, 2**31, 2**32 - 1)),
    NoiseCase((7,), (6,), step=2**32 - 1, stream=2**32 - 1, layer=2**32 - 1),
    NoiseCase((7, 8), (3, 8, 8), stream=3, layer=17),
    NoiseCase((), (3, 4, 4)),
    NoiseCase((1, 2), (3, 0, 4)),
]


@dataclass(frozen=True)
class DropCase:
    """Arguments of dropout."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    p: float = 0.3
    layer: int = 5
    size: float = 1.0  # of x

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        numbers = f"p{self.p:g}-layer{self.layer}-size{self.size:g}"
        return f"{shape}-{SHORT[self.dtype]}-{self.layout}-{numbers}"

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        g = torch.Generator().manual_seed(sum(self.shape))
        x = (self.size * torch.randn(self.shape, generator=g)).to(device, self.dtype)
        seeds = (EXTREME_SEEDS * self.shape[0])[: self.shape[0]]
        return {
            "x": LAYOUTS[self.layout](x),
            "seeds": torch.tensor(seeds, dtype=torch.int64, device=device),
            "p": self.p,
            "layer": self.layer,
        }


DROP_CASES = [
    *(DropCase((2, 32, 6, 6), dtype, layout)
      for dtype in (f32, bf16, f16, f64) for layout in LAYOUTS),
    # pixels and elements that four divides or not, channels of a vector or not, ranks
    *(
        DropCase(shape, dtype, layout)
        for shape in [(6, 8), (1, 1, 1, 1), (3, 5, 7, 9), (2, 7, 4), (5, 24, 1, 2), (2, 3, 2, 3, 4),
                      (1, 96, 1, 1), (2, 72, 2, 2)]
        for dtype in (f32, bf16)
        for layout in ("contiguous", "channels_last")
        if len(shape) > 2 or layout == "contiguous"
    ),
    # more than a task of the C++ kernels, or a block of the others
    DropCase((2, 65, 12, 11), f32, "channels_last"),
    DropCase((2, 65, 12, 11), bf16, "contiguous"),
    DropCase((1, 9, 31, 35), f16, "contiguous"),
    DropCase((2, 2052, 2, 4), f32, "channels_last"),
    *(DropCase((2, 8, 4, 6), layout="channels_last", p=p) for p in (0.0, 1e-12, 0.999, 1 - 2**-26)),
    *(DropCase((2, 8, 4, 6), layer=layer) for layer in (0, 1, 2**31, 2**32 - 1)),
    # the smallest numbers, which some instructions take for zero
    *(DropCase((2, 40, 2, 4), dtype, "channels_last", size=size)
      for dtype, size in [(f32, 1e-39), (bf16, 1e-39), (f16, 1e-6)]),
    DropCase((0, 32, 4, 4), layout="channels_last"),
    DropCase((2, 32, 0, 4)),
]  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """Arguments of reverse_step."""

    shape: tuple[int, ...] = (2, 3, 5, 7)
    dtype: torch.dtype = torch.float32  # of the network's output and the slot
    layout: str = "channels_last"  # of the network's output
    each: bool = False  # one step per sample
    draw: str = "noise"  # "noise", "seeds" or "none"
    history: bool = False
    mask: str = "none"  # "none", "binary", "fraction" or "full" ([N, C, H, W])
    slot: str = "none"  # "none", "channels_last" or "contiguous"
    beside: int = 5  # channels of the next input that are not the slot's, up to three before it

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        flags = ["each"] * self.each + ["history"] * self.history
        flags += [f"beside{self.beside}"] * (self.beside != 5)
        names = [shape, SHORT[self.dtype], self.layout, self.draw, f"mask-{self.mask}"]
        return "-".join([*names, f"slot-{self.slot}", *flags])

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        g = torch.Generator().manual_seed(5)
        n, c, h, w = self.shape

        def normal() -> Tensor:
            return torch.randn(self.shape, generator=g).to(device)

        table = torch.tensor(
            [
                [1.1, -0.4, 0.3, 0.7, 0.0, 0.2],
                [9.1e4, -9.0e4, 1.5e-4, 0.999, 0.0, 0.01],  # the first of 2000 published steps
                [1.01, -0.05, 0.9, 0.1, -0.4, 0.0],
            ]
        )
        mask = None
        if self.mask != "none":
            mask = torch.rand((n, c if self.mask == "full" else 1, h, w), generator=g)
            mask = mask if self.mask == "fraction" else mask.round()
            mask = mask.to(device)
        slot = None
        if self.slot != "none":
            wide = torch.full((n, c + self.beside, h, w), 0.5, dtype=self.dtype, device=device)
            if self.slot == "channels_last":
                wide = wide.contiguous(memory_format=torch.channels_last)
            first = min(self.beside, 3)
            slot = wide[:, first : first + c]
        step = torch.arange(n) % 3 if self.each else torch.tensor(1)
        return {
            "state": normal(),
            "output": LAYOUTS[self.layout](normal().to(self.dtype)),
            "table": table.to(device),
            "step": step.to(device),
            "seeds": torch.arange(n, device=device) + 9 if self.draw == "seeds" else None,
            "noise": normal() if self.draw == "noise" else None,
            "history": normal() if self.history else None,
            "known": normal() if self.mask != "none" else None,
            "mask": mask,
            "slot": slot,
        }


STEP_CASES = [
    StepCase(),
    StepCase(dtype=bf16, draw="seeds", slot="channels_last"),
    StepCase(dtype=f16, draw="none", slot="contiguous", layout="contiguous"),
    StepCase((3, 3, 4, 4), each=True, history=True, mask="binary", slot="channels_last"),
    StepCase((3, 3, 4, 4), each=True, draw="seeds", mask="fraction"),
    StepCase((4, 2, 3, 3), bf16, each=True, draw="seeds", history=True, mask="full",
             slot="channels_last"),
    StepCase((1, 1, 1, 1), draw="seeds", history=True),
    StepCase((2, 3, 16, 16), layout="channel_slice", draw="seeds", mask="binary"),
    StepCase((0, 3, 4, 4), draw="seeds", mask="binary", slot="channels_last"),
    # more pixels than are worked on at a time, and a number of them that four does not divide
    StepCase((2, 3, 33, 31), draw="seeds", history=True, mask="fraction", slot="channels_last"),
    StepCase((2, 3, 33, 31), bf16, each=True, draw="seeds", mask="full", slot="contiguous",
             layout="wide_rows"),
    StepCase((1, 1, 5, 1), f64, layout="transposed", slot="channels_last"),
    # the published input: a condition of three channels and the picture; and the picture alone
    *(StepCase((2, 3, 33, 31), dtype, each=True, mask="binary", slot="channels_last", beside=beside)
      for dtype in (f32, bf16, f16, f64) for beside in (3, 0)),
]  # fmt: skip
