"""noise: Philox against its published answers, normals against float64, independence, errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from palette import _extension, ops
from palette.ops import philox

MODULE = sys.modules["palette.ops.noise"]

# The known answers that Random123 publishes for Philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python's unbounded integers, as the paper states it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words) -> None:
    assert plain_philox(counter, key) == words
    for array in (np.array, torch.tensor):
        made = philox.philox4x32([array([c]) for c in counter], [array([k]) for k in key])
        assert tuple(word.item() for word in made) == words


def test_counter_layout(noise_case) -> None:
    """The words of a case, each made on its own with Python's integers."""
    seeds = torch.tensor(noise_case.seeds, dtype=torch.int64)
    step = noise_case.step if isinstance(noise_case.step, int) else torch.tensor(noise_case.step)
    numel = math.prod(noise_case.shape)
    stream, layer = noise_case.stream, noise_case.layer
    words = philox.words(seeds, numel, step=step, stream=stream, layer=layer)
    assert words.shape == (len(seeds), numel)
    for i, seed in enumerate(noise_case.seeds):
        own_step = noise_case.step if isinstance(noise_case.step, int) else noise_case.step[i]
        key = (seed % 2**32, (seed >> 32) % 2**32)
        for e in {0, 1, 5, numel // 2, numel - 1} & set(range(numel)):
            wanted = plain_philox((e // 4, own_step, stream, layer), key)[e % 4]
            assert int(words[i, e]) == wanted


def exactly(arguments: dict) -> torch.Tensor:
    """The noise in float64, from the float32 uniforms and angles."""
    seeds, step = arguments["seeds"].cpu(), arguments["step"]
    step = step.cpu() if isinstance(step, torch.Tensor) else step
    numel = math.prod(arguments["shape"])
    words = philox.words(
        seeds, -(-numel // 4) * 4, step=step, stream=arguments["stream"], layer=arguments["layer"]
    )
    first, second = words[:, 0::2].numpy(), words[:, 1::2].numpy()
    u1 = first.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    u2 = second.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    angle = (np.float32(2 * np.pi) * u2).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u1.astype(np.float64)))
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    return torch.from_numpy(pairs.reshape(len(seeds), words.shape[1])[:, :numel])


def test_normals(noise_case, device) -> None:
    arguments = noise_case.arguments(device)
    z = ops.noise(**arguments)
    assert z.dtype == torch.float32
    assert z.shape == (len(noise_case.seeds), *noise_case.shape)
    assert z.is_contiguous()
    exact = exactly(arguments)
    z = z.cpu().reshape(exact.shape)
    ulp = torch.from_numpy(np.spacing(np.abs(exact.numpy().astype(np.float32)))).double()
    assert ((z.double() - exact).abs() <= 4 * ulp).all()


def test_rare_draws(device) -> None:
    """Angles next to a multiple of pi / 2 and uniforms next to 1, among half a million draws."""
    arguments = {
        "seeds": torch.arange(8, device=device), "step": 1, "shape": (1 << 16,), "stream": 0,
        "layer": 0,
    }  # fmt: skip
    z = ops.noise(**arguments).cpu()
    exact = exactly(arguments)
    ulp = torch.from_numpy(np.spacing(np.abs(exact.numpy().astype(np.float32)))).double()
    error = (z.double() - exact).abs() / ulp
    assert error.max() <= 4
    assert z.isfinite().all()


def test_distribution(device) -> None:
    z = ops.noise(torch.arange(4, device=device), 1, (1 << 16,)).cpu()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > 1e-3
    assert (z.abs() > 4).sum() > 0.5 * n * 6.3e-5  # the tail is there

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs((a * b).mean().item()) * a.numel() ** 0.5  # in standard deviations

    assert correlation(z[0], z[1]) < 4
    assert all(correlation(z[0, :-lag], z[0, lag:]) < 4 for lag in (1, 2, 3, 4, 256))
    seeds = torch.tensor([5], device=device)
    first = ops.noise(seeds, 1, (1 << 16,)).cpu()
    for other in (
        ops.noise(seeds, 2, (1 << 16,)),
        ops.noise(seeds, 1, (1 << 16,), stream=2),
        ops.noise(seeds, 1, (1 << 16,), layer=1),
    ):
        assert correlation(first, other.cpu()) < 4


def test_seed_decides_alone(device) -> None:
    """The same image alone, in a batch, in another place of it, in a longer image, with a step of
    its own, on any number of threads."""
    seeds = torch.tensor([3, 12, 3, -7], device=device)
    z = ops.noise(seeds, 2, (3, 37, 41))
    assert torch.equal(z[0], z[2])
    assert torch.equal(z[3:], ops.noise(seeds[3:], 2, (3, 37, 41)))
    assert torch.equal(z[1].flatten()[:500], ops.noise(seeds[1:2], 2, (500,))[0])
    steps = torch.tensor([2, 0, 5, 2], device=device)
    each = ops.noise(seeds, steps, (3, 37, 41))
    assert torch.equal(each[0], z[0])
    assert torch.equal(each[3], z[3])
    assert not torch.equal(each[2], z[2])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.noise(seeds, 2, (3, 37, 41)), z)
    torch.set_num_threads(before)


def test_instruction_sets_agree_in_every_bit() -> None:
    """The compiled loops for each instruction set of this processor, each in its own process."""
    if "cpp" not in ops.backends("noise"):
        return
    code = """
import hashlib, torch, palette.ops
z = palette.ops.noise(torch.tensor([1, -2]), 3, (3, 37, 41))
print(hashlib.sha256(z.numpy().tobytes()).hexdigest())
"""
    have = {"baseline", *_extension.instruction_sets()}
    names = {"baseline": "baseline", "avx2": "avx2", "avx512f": "avx512"}
    made = set()
    for name in (names[each] for each in names if each in have):
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, "PALETTE_CPU_ISA": name, "PALETTE_BACKEND": "cpp"},
            capture_output=True,
            text=True,
            check=True,
        )
        made.add(process.stdout)
    assert len(made) == 1


def test_strided_seeds(device) -> None:
    wide = torch.arange(12, device=device).reshape(6, 2)
    steps = torch.arange(12, device=device)[::2]
    z = ops.noise(wide[:, 1], steps, (5,))
    assert torch.equal(z, ops.noise(wide[:, 1].contiguous(), steps.contiguous(), (5,)))


def test_uniform() -> None:
    seeds = torch.tensor([1, 2])
    u = philox.uniform(seeds, (100, 1001), stream=philox.NOISE_LEVEL, layer=3)
    assert u.shape == (2, 100, 1001)
    assert u.dtype == torch.float32
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() <= 1
    words = philox.words(seeds, 100 * 1001, stream=philox.NOISE_LEVEL, layer=3)
    wanted = words.numpy().astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    assert np.array_equal(u.numpy().reshape(2, -1), wanted)
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 1e-3


def test_ends_of_the_uniform_interval() -> None:
    ends = philox.to_uniform(torch.tensor([0, 2**32 - 129, 2**32 - 128, 2**32 - 1]))
    assert ends.tolist() == [2.0**-33, 1 - 2.0**-24, 1.0, 1.0]


def test_opcheck() -> None:
    op = torch.ops.palette.noise.default
    torch.library.opcheck(op, (torch.tensor([1, 2]), torch.tensor(3), [3, 5], 0, 0))
    torch.library.opcheck(op, (torch.tensor([1, 2]), torch.tensor([3, 4]), [2], 2, 1))


WRONG = [
    ({"seeds": 5}, TypeError, "seeds is int, wanted a tensor"),
    ({"seeds": torch.tensor([1.0])}, TypeError, "seeds is float32, wanted int64"),
    ({"seeds": torch.tensor(1)}, ValueError, r"seeds has shape \[\], wanted \[N\]"),
    ({"step": torch.tensor(1.0)}, TypeError, "step is float32, wanted int64"),
    ({"step": torch.tensor([1, 2, 3])}, ValueError, r"step has shape \[3\], wanted \[\] or \[2\]"),
    ({"step": -1}, ValueError, r"step is -1, wanted a number in \[0, 2\^32\)"),
    ({"stream": 2**32}, ValueError, "stream is 4294967296, wanted"),
    ({"layer": -1}, ValueError, "layer is -1, wanted"),
    ({"shape": (3, -1)}, ValueError, r"shape is \[3, -1\], wanted sizes >= 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[each[2] for each in WRONG])
def test_errors_name_the_argument(change, error, message) -> None:
    arguments = {"seeds": torch.tensor([1, 2]), "step": 0, "shape": (3, 4), **change}
    with pytest.raises(error, match="noise: " + message):
        ops.noise(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"step": torch.zeros(3, dtype=torch.int64)},
        {"step": torch.zeros(2)},
        {"seeds": torch.zeros(2)},
        {"seeds": torch.zeros(2, 1, dtype=torch.int64)},
    ],
    ids=str,
)
def test_the_compiled_op_refuses_by_itself(compiled, cases, change) -> None:
    """Nothing is read beyond the end of a tensor, whoever calls it."""
    every = {"seeds": torch.zeros(2, dtype=torch.int64), "step": torch.tensor(1), **change}
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.palette.noise(*cases.on(compiled, every).values(), [4], 0, 0)
