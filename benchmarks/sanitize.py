"""Every CUDA op, forward and backward, on small tensors of each dtype and layout.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/sanitize.py

With that variable each tensor is an allocation of its own, so that reading past its end shows. The
numbers are the tests' business.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from palette import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows with gaps": lambda x: torch.nn.functional.pad(x, (0, 2))[..., :-2],
}
SIZES = ((8, 8), (5, 7))  # in whole vectors, and not


def through(y: Tensor, lay: Callable[[Tensor], Tensor]) -> None:
    y.backward(lay(torch.ones_like(y)))


def norm(x: Tensor, lay: Callable[[Tensor], Tensor]) -> None:
    n, c = x.shape[:2]
    weight, bias = torch.ones(2, c, device="cuda").unbind()
    film = torch.zeros(n, 2 * c, device="cuda", dtype=x.dtype)
    leaves = [each.requires_grad_() for each in (x, weight.clone(), bias.clone(), film)]
    scale, shift = leaves[3].chunk(2, dim=1)
    through(ops.group_norm_silu(leaves[0], leaves[1], leaves[2], 8, 1e-5, scale, shift), lay)


def attend(x: Tensor, lay: Callable[[Tensor], Tensor]) -> None:
    for order in ("legacy", "new"):
        through(ops.attention(x.detach().requires_grad_(), 2, order), lay)


def drop(x: Tensor, lay: Callable[[Tensor], Tensor]) -> None:
    through(ops.dropout(x.requires_grad_(), torch.arange(len(x), device="cuda"), 0.3, 1), lay)


@torch.no_grad()
def advance(x: Tensor, lay: Callable[[Tensor], Tensor]) -> None:
    state, known, history = (lay(torch.zeros_like(x[:, :3], dtype=torch.float32)) for _ in range(3))
    table = torch.tensor([[1.0, -0.1, 0.3, 0.7, 0.1, 0.1]], device="cuda")
    step, seeds = torch.tensor(0, device="cuda"), torch.arange(len(x), device="cuda")
    options = {"history": history, "known": known, "mask": torch.ones_like(known[:, :1])}
    noise = ops.noise(seeds, step, state.shape[1:])
    for drawn in ({"seeds": seeds}, {"noise": noise}):
        ops.reverse_step(state, x[:, :3], table, step, slot=x[:, 3:6], **options, **drawn)


def main() -> None:
    for call in (norm, attend, drop, advance):
        for dtype in DTYPES:
            for name, lay in LAYOUTS.items():
                for size in SIZES:
                    x = lay(torch.randn(2, 48, *size).to("cuda", dtype))
                    with ops.use("cuda"):
                        call(x, lay)
                    torch.cuda.synchronize()
                print(f"{call.__name__}, {dtype}, {name}", flush=True)


if __name__ == "__main__":
    main()
