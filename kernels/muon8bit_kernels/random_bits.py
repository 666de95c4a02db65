"""Random bits of stochastic rounding: one hash for each element of each parameter at each step.

The bits are MurmurHash3_x86_32 (A. Appleby, 2011, public domain; hash seed 0) over seven little-endian 32-bit words:
seed (low, high), step (low, high), parameter index, element index (low, high). They depend on nothing else, so replicas
agree, a shard that knows its global indices reproduces the whole, and a resumed run gets the same bits. The first five
words are folded here, once a parameter and step; the last two in `reference.update` and `triton.update`.
"""

from __future__ import annotations

# Of MurmurHash3_x86_32: the two multipliers of a word, what is added after it, and the finalizer's multipliers.
WORD_1, WORD_2, ADDED = 0xCC9E2D51, 0x1B873593, 0xE6546B64
FINAL_1, FINAL_2 = 0x85EBCA6B, 0xC2B2AE35
NUM_BYTES = 28  # seven words: the finalizer takes the length
_MASK = 0xFFFFFFFF


def signed(word: int) -> int:
    """Return the int32 with the bits of `word` (0 .. 2**32 - 1)."""
    return word - 2**32 if word >= 2**31 else word


def _rotated(word: int, by: int) -> int:
    return (word << by | word >> (32 - by)) & _MASK


def rounding_key(seed: int, step: int, param_index: int) -> int:
    """Return the state of the hash before the element index, as an int32.

    Args:
        seed, step: 0 .. 2**64 - 1.
        param_index: 0 .. 2**32 - 1, the parameter's place over all groups.

    Raises:
        ValueError: for a number out of its range; the message names it.
    """
    for name, value, num_bits in (("seed", seed, 64), ("step", step, 64), ("param_index", param_index, 32)):
        if not 0 <= value < 2**num_bits:
            raise ValueError(f"{name} must be in 0 .. 2**{num_bits} - 1, not {value}")
    state = 0
    for word in (seed & _MASK, seed >> 32, step & _MASK, step >> 32, param_index):
        state ^= _rotated(word * WORD_1 & _MASK, 15) * WORD_2 & _MASK
        state = _rotated(state, 13) * 5 + ADDED & _MASK
    return signed(state)
