"""Sample order: a keyed permutation with O(1) memory and random access.

A Feistel network over the smallest sufficient number of bits, with cycle walking (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). Integer arithmetic only, so the order is the same on every platform and numpy version.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mix(values: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64 to uint64 values in place; arithmetic wraps."""
    values ^= values >> S30
    values *= MIX_1
    values ^= values >> S27
    values *= MIX_2
    values ^= values >> S31
    return values


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """Return one uint64 key per round, shape (ROUNDS,), from a non-negative seed and epoch of any size."""
    state = np.zeros(1, dtype=np.uint64)
    for number in (seed, epoch):
        while True:
            state = mix(state + GOLDEN + np.array([number & (2**64 - 1)], dtype=np.uint64))
            number >>= 64
            if not number:
                break
    return mix(state + np.arange(1, ROUNDS + 1, dtype=np.uint64) * GOLDEN)


def permute(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Map `positions` (int64, in [0, count)) to sample numbers (int64): a permutation of the range, keyed by seed and epoch."""
    if count == 1:
        return np.zeros_like(positions)
    keys = round_keys(seed, epoch)
    out = feistel(positions.astype(np.uint64), keys, count)
    outside = np.flatnonzero(out >= np.uint64(count))
    while len(outside):  # On average, fewer than half of the values are outside after each pass.
        out[outside] = feistel(out[outside], keys, count)
        outside = outside[out[outside] >= np.uint64(count)]
    return out.astype(np.int64)


def samples_at(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the sample number at each of `positions` in the endless stream of `count` samples per epoch: int64, same shape."""
    epochs, inside = np.divmod(positions, count)
    out = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        mask = epochs == epoch
        out[mask] = permute(inside[mask], count, seed, epoch)
    return out


def feistel(values: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Run the network once over the smallest power of two that holds `count`; the halves can differ by one bit."""
    bits = (count - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys):
        # Each round changes one half by a function of the other, so it is invertible for any function.
        if number % 2:
            low = low ^ (mix(high + key) & low_mask)
        else:
            high = high ^ (mix(low + key) & high_mask)
    return high << low_bits | low
