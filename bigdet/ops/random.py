"""Random words by key: the same key gives the same words on every machine, rank and worker.

Nothing here has a state that outlives a call, and nothing in bigdet draws from a global generator.
A key begins with what the words are for, so that two uses of (seed, phase, pass) stay apart. The
words are raw output of Philox, which numpy keeps stable over versions (its distributions are not).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray


class _PhiloxKey(ISeedSequence):
    """Gives 128 bits to Philox as its key.

    The same as ``Philox(key=...)``, which first asks the operating system for entropy and discards
    it: 9 us and a system call, for each sample of a stream.
    """

    def __init__(self, bits: bytes) -> None:
        self._words = np.frombuffer(bits, dtype="<u8")

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> NDArray[np.uint64]:
        """Return the key; Philox asks for two words of 64 bits."""
        assert n_words == 2
        return self._words.astype(dtype)


def _generator(key: tuple[int | str, ...]) -> np.random.Philox:
    """Return a counter-based generator keyed by a 128-bit hash of ``key``."""
    text = json.dumps([part if isinstance(part, str) else int(part) for part in key])
    bits = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Philox(_PhiloxKey(bits))  # type: ignore[arg-type]  # documented, not typed


def words(*key: int | str, count: int) -> NDArray[np.uint64]:
    """Return ``(count,)`` uniform 64-bit words.

    Args:
        key: what the words belong to, such as ``("order", seed, phase, pass_number)``.
        count: how many; a longer row begins with the shorter one.
    """
    raw: NDArray[np.uint64] = _generator(key).random_raw(count)
    return raw


def permutation(*key: int | str, count: int) -> NDArray[np.int64]:
    """Return the numbers ``0..count-1`` in random order, ``(count,)`` int64."""
    # Stable: equal words (one chance in 10^9 at 118,287 samples) must not depend on the machine.
    return np.argsort(words(*key, count=count), kind="stable").astype(np.int64, copy=False)


def seed_of(*key: int | str) -> int:
    """Return a seed in ``[0, 2**63)``, as ``torch.manual_seed`` takes it."""
    return int(words(*key, count=1)[0]) >> 1


class Words:
    """Draws in a row from the words of one key, such as the augmentation of one sample."""

    def __init__(self, *key: int | str) -> None:
        self._generator = _generator(key)

    def uniform(self, low: float, high: float) -> float:
        """Return a number in ``[low, high)``, on a grid of 2**53 steps."""
        word = int(self._generator.random_raw())
        return low + (high - low) * (word >> 11) * 2.0**-53

    def integer(self, count: int) -> int:
        """Return a number in ``0..count-1``; its bias, below count / 2**64, is negligible."""
        return int(self._generator.random_raw()) % count
