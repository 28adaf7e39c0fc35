"""Which image comes when, and every random choice about it, as functions of numbers alone.

Nothing here has state that a checkpoint would have to hold: the order of an epoch, the seed of a
sample and the draws made from it follow from (run seed, epoch, position), so any number of worker
processes and ranks, started at any point, see the same samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from palette.ops.philox import AUGMENTATION, philox4x32

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_WORD = 0xFFFFFFFF
_SAMPLE_TAG = 0x5EED
_ORDER_TAG = 0x04DE4
_SPARE_TAG = 0x5BA4E
_ROUNDS = 8


def sample_seeds(run_seed: int, epoch: int, indices: npt.ArrayLike) -> Ints:
    """Seeds int64 [N] of the samples ``indices`` [N] in ``epoch``.

    The first two words of Philox4x32-10 with the run's seed as key and the counter (index low,
    index high, epoch, 0x5EED). The 64 bits are read as a signed number, as tensors hold them.
    """
    index = np.asarray(indices, dtype=np.int64)
    counter = (index & _WORD, (index >> 32) & _WORD, epoch & _WORD, _SAMPLE_TAG)
    low, high, _, _ = _philox(counter, _key(run_seed))
    seeds: Ints = low | (high << 32)
    return seeds


def sample_seed(run_seed: int, epoch: int, index: int) -> int:
    """Seed of one sample, in [-2^63, 2^63); see :func:`sample_seeds`."""
    return int(sample_seeds(run_seed, epoch, [index])[0])


def permute(
    run_seed: int, epoch: int, positions: npt.ArrayLike, length: int, *, spare: bool = False
) -> Ints:
    """Indices int64 [N] at ``positions`` [N] of the epoch's order: a permutation of 0..length-1.

    An order of any length takes no memory: position = left + a * right is scrambled by a Feistel
    network on Z_a x Z_b with a * b just above ``length``, and a result beyond the end is sent
    through again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    ``spare`` gives a second, independent order: the stand-ins for images that cannot be read.

    Raises ValueError when a position lies outside 0..length-1.
    """
    place = np.array(positions, dtype=np.int64)
    if length < 1 or (place.size and (place.min() < 0 or place.max() >= length)):
        raise ValueError(f"positions must lie in 0..{length - 1}, got {place.tolist()}")
    keys = _round_keys(run_seed, epoch & _WORD, _SPARE_TAG if spare else _ORDER_TAG)
    place = _feistel(place, length, keys)
    outside = place >= length
    while outside.any():
        place[outside] = _feistel(place[outside], length, keys)
        outside = place >= length
    return place


def position_to_index(run_seed: int, epoch: int, position: int, length: int) -> int:
    """Index at one position of the epoch's order; see :func:`permute`."""
    return int(permute(run_seed, epoch, [position], length)[0])


class Draws:
    """Random numbers of one sample, by Philox4x32-10: the n-th word depends on the seed alone.

    Key: the 64-bit seed. Counter: (n // 4, 0, stream, layer). Different ``layer`` numbers give
    independent sequences, so that how many numbers a source takes does not change the mask.
    """

    def __init__(self, seed: int, stream: int = AUGMENTATION, layer: int = 0) -> None:
        self._key = _key(seed)
        self._tail = (0, stream, layer)
        self._words: list[int] = []  # the first words of the sequence
        self._next = 0

    @classmethod
    def many(
        cls, seeds: Sequence[int], stream: int = AUGMENTATION, layer: int = 0, *, ahead: int = 4
    ) -> list[Draws]:
        """Draws for each seed; the first ``ahead`` words are made at once, which is quicker."""
        blocks = np.arange(-(-ahead // 4), dtype=np.int64)
        key: Ints = np.array(seeds, dtype=np.int64).reshape(-1, 1)
        words = _philox((blocks, 0, stream, layer), (key & _WORD, (key >> 32) & _WORD))
        made = np.stack(words, axis=-1).reshape(len(seeds), -1).tolist()
        out = [cls(seed, stream, layer) for seed in seeds]
        for draws, head in zip(out, made, strict=True):
            draws._words = head
        return out

    def words(self, n: int) -> list[int]:
        """The next n words, each in 0..2^32-1."""
        first, self._next = self._next, self._next + n
        block = len(self._words) // 4
        while len(self._words) < self._next:
            self._words.extend(_philox((block, *self._tail), self._key))
            block += 1
        return self._words[first : self._next]

    def uniform(self, n: int) -> Floats:
        """n numbers float64, uniform in (0, 1)."""
        return np.array([word * 2.0**-32 + 2.0**-33 for word in self.words(n)])

    def integers(self, low: int, high: int, n: int) -> Ints:
        """n integers int64, uniform in low..high-1. Raises ValueError when there is none."""
        return np.array([self.integer(low, high) for _ in range(n)], dtype=np.int64)

    def normal(self, n: int) -> Floats:
        """n numbers float64 of the standard normal distribution, in pairs from pairs of words."""
        out = []
        for _ in range(0, n, 2):
            radius, angle = math.sqrt(-2.0 * math.log(self.real())), 2.0 * math.pi * self.real()
            out += [radius * math.cos(angle), radius * math.sin(angle)]
        return np.array(out[:n])

    def integer(self, low: int, high: int) -> int:
        """One integer, uniform in low..high-1. Raises ValueError when there is none."""
        if high <= low:
            raise ValueError(f"high must be above low, got low={low} high={high}")
        return low + (self.words(1)[0] * (high - low) >> 32)

    def real(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number, uniform between low and high."""
        return low + (high - low) * (self.words(1)[0] * 2.0**-32 + 2.0**-33)


def _philox(counter: tuple[Any, ...], key: tuple[Any, Any]) -> tuple[Any, ...]:
    """Words for counters and keys that broadcast together; plain integers are quick for one."""
    return philox4x32(counter, key)


def _key(seed: int) -> tuple[int, int]:
    return seed & _WORD, (seed >> 32) & _WORD


@functools.lru_cache(maxsize=64)
def _round_keys(run_seed: int, epoch: int, tag: int) -> tuple[np.uint64, ...]:
    """One 64-bit key per Feistel round."""
    rounds: Ints = np.arange(_ROUNDS, dtype=np.int64)
    low, high, _, _ = _philox((rounds, 0, epoch, tag), _key(run_seed))
    return tuple((low | (high << 32)).view(np.uint64))


def _feistel(place: Ints, length: int, keys: tuple[np.uint64, ...]) -> Ints:
    """One pass of the network: a permutation of 0..a*b-1, for a * b the least above ``length``."""
    a = math.isqrt(length - 1) + 1 if length > 1 else 1
    b = -(-length // a)
    left, right = place % a, place // a
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right, key, a)) % a
        else:
            right = (right + _mix(left, key, b)) % b
    return left + a * right


def _mix(value: Ints, key: np.uint64, modulus: int) -> Ints:
    """Keyed hash of ``value``, below ``modulus`` (finaliser of SplitMix64)."""
    z = value.astype(np.uint64) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashed: Ints = ((z ^ (z >> np.uint64(31))) % np.uint64(modulus)).astype(np.int64)
    return hashed
