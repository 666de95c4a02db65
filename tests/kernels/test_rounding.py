"""The parameter update in torch: its hash, its rounding, its arithmetic, against oracles in Python and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import oracle
from muon8bit_kernels import reference, rounding_key
from muon8bit_kernels.reference.update import random_bits

BF16_MAX = torch.finfo(torch.bfloat16).max


def int16(tensor):
    return tensor.contiguous().view(torch.int16)


def with_neighbours(values):
    """The bf16 numbers around finite fp32 values: lower in magnitude, upper in magnitude (equal if exact)."""
    exact = values.double()
    nearest = values.bfloat16()
    over = nearest.double().abs() > exact.abs()
    low = torch.where(over, (int16(nearest) - 1).view(torch.bfloat16), nearest)
    high = torch.where(low.double() == exact, low, (int16(low) + 1).view(torch.bfloat16))
    return low, high


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [(b"", 0, 0), (b"", 1, 0x514E28B7), (b"test", 0, 0xBA6BD213), (b"test", 0x9747B28C, 0x704B81DC)],
)
def test_the_oracle_is_murmur3(data, seed, expected):
    """Published test vectors: the oracle below is the hash that the docstring names."""
    assert oracle.murmur3(data, seed) == expected


@pytest.mark.parametrize("first", [0, 2**31 - 3, 2**32 - 3, 2**32, 3 * 2**32 + 5, 2**62])
@pytest.mark.parametrize(("seed", "step", "index"), [(0, 0, 0), (1, 2, 3), (2**64 - 1, 2**33 + 1, 2**32 - 1)])
def test_random_bits_equal_the_hash_of_the_words(seed, step, index, first):
    ours = random_bits(torch.arange(first, first + 9), key=rounding_key(seed, step, index))
    expected = [oracle.random_bits(seed, step, index, first + i) for i in range(9)]
    assert [int(word) & 0xFFFFFFFF for word in ours] == expected


def test_every_word_matters():
    """Seed, step, parameter and element, low and high halves: streams that differ in one share no more than chance."""
    elements = torch.arange(4096)
    streams = [
        random_bits(elements + offset, key=rounding_key(*key))
        for key, offset in (
            ((0, 0, 0), 0),
            ((1, 0, 0), 0),
            ((2**32, 0, 0), 0),
            ((0, 1, 0), 0),
            ((0, 2**32, 0), 0),
            ((0, 0, 1), 0),
            ((0, 0, 0), 2**32),
        )
    ]
    for i, left in enumerate(streams):
        for right in streams[:i]:
            assert (left == right).sum() <= 2
            low = ((left & 0xFFFF).double() - 32767.5) * ((right & 0xFFFF).double() - 32767.5)
            assert abs(low.mean()) < 5 * (65536**2 / 12) / math.sqrt(4096)  # uncorrelated, 5 sigma


@pytest.mark.parametrize("name", ["seed", "step", "param_index"])
def test_a_number_out_of_range_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be in"):
        rounding_key(**{"seed": 0, "step": 0, "param_index": 0, name: -1})


def test_rounding_takes_a_neighbour_and_is_unbiased():
    """300 keys, 1500 values of every size and sign: each result is a neighbour, and the mean of each value's results
    lies within 5 sigma of it (1500 values: by chance one run in a thousand would not)."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy((rng.standard_normal(1500) * np.exp(8 * rng.standard_normal(1500))).astype(np.float32))
    low, high = with_neighbours(values)
    ulp, exact = (high.double() - low.double()), values.double()
    num_keys, count = 300, torch.zeros(1500, dtype=torch.float64)
    for step in range(num_keys):
        rounded = reference.round_stochastic(values, key=rounding_key(0, step, 0))
        up = int16(rounded) == int16(high)
        assert (up | (int16(rounded) == int16(low))).all()
        count += up
    probability = (exact - low.double()) / ulp
    sigma = (probability * (1 - probability) / num_keys).sqrt()
    deviation = (count / num_keys - probability).abs()
    assert (deviation <= 5 * sigma + 3 / num_keys * (sigma < 0.02)).all()  # Poisson where one case is rare
    assert abs(((count / num_keys - probability) / sigma.clamp(min=0.01)).mean()) < 5 / math.sqrt(1500)
    assert (probability > 0.1).sum() > 1000  # most values had something to decide


def test_exact_values_zeros_and_infinities_stay():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)  # all bf16 numbers
    for step in range(20):
        rounded = reference.round_stochastic(every.float(), key=rounding_key(5, step, 1))
        nan = every.isnan()
        assert torch.equal(int16(rounded)[~nan], int16(every)[~nan])
        assert rounded[nan].isnan().all()


def test_nan_stays_nan_whatever_its_low_bits():
    """Random bits would carry some into the sign, to -0.0; cutting off would make others infinite."""
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -(2**23) + 1], dtype=torch.int32)
    for step in range(20):
        values = payloads.view(torch.float32).repeat(9)
        assert reference.round_stochastic(values, key=rounding_key(0, step, 0)).isnan().all()


def test_negative_numbers_are_the_mirror_image():
    values = torch.randn(4096)
    key = rounding_key(1, 2, 3)
    assert torch.equal(reference.round_stochastic(-values, key=key), -reference.round_stochastic(values, key=key))


def test_beyond_the_largest_bf16_goes_to_it_or_to_infinity():
    values = torch.full((4096,), torch.finfo(torch.float32).max)
    values[:2048] = BF16_MAX * (1 + 2**-10)  # a quarter of the way to 2**128
    rounded = reference.round_stochastic(values, key=rounding_key(0, 0, 0)).double()
    assert set(rounded.tolist()) == {BF16_MAX, math.inf}
    part = (values[0].double() - BF16_MAX) / (2.0**128 - BF16_MAX)
    assert abs(rounded[:2048].isinf().double().mean() - part) < 5 * math.sqrt(part * (1 - part) / 2048)
    assert rounded[2048:].isinf().all()


@pytest.mark.parametrize("pieces", [[1000], [1, 999], [256, 300, 444]])
def test_pieces_with_their_offsets_are_the_whole(pieces):
    values, key, start = torch.randn(1000), rounding_key(7, 8, 9), 2**32 - 500
    whole = reference.round_stochastic(values, key=key, first=start)
    done = []
    for piece in values.split(pieces):
        done.append(reference.round_stochastic(piece.contiguous(), key=key, first=start))
        start += len(piece)
    assert torch.equal(torch.cat(done), whole)
    moved = reference.round_stochastic(values, key=key, first=2**32 - 499)
    assert not torch.equal(moved, whole)


def update(param, direction, *, decay, scale, key=None, first=0, pitch=None):
    """Of one matrix, 2-D."""
    places = {"keys": None if key is None else [key], "firsts": [first], "pitch": pitch}
    reference.update_params([param[None]], direction[None], decay=decay, scale=scale, **places)


def test_shards_of_rows_and_columns_reproduce_the_whole():
    """Each part of a matrix, updated alone under its global indices, equals the whole updated at once."""
    torch.manual_seed(0)
    start, direction, key = torch.randn(12, 20).bfloat16(), torch.randn(12, 20), rounding_key(0, 3, 1)
    whole = start.clone()
    update(whole, direction, decay=0.999, scale=1e-3, key=key)
    parts = start.clone()
    for rows in (slice(0, 5), slice(5, 12)):
        for cols in (slice(0, 9), slice(9, 20)):
            first = rows.start * 20 + cols.start
            options = {"decay": 0.999, "scale": 1e-3, "key": key, "first": first, "pitch": 20}
            update(parts[rows, cols], direction[rows, cols], **options)
    assert torch.equal(parts, whole)


def test_a_batch_draws_the_bits_of_its_matrices_one_by_one():
    torch.manual_seed(0)
    start, directions = torch.randn(5, 12, 20).bfloat16(), torch.randn(5, 20, 12).mT
    keys, firsts = [rounding_key(0, 3, index) for index in (0, 1, 1, 1, 9)], [0, 240, 480, 2**33, 5]
    whole, parts = start.clone(), start.clone()
    stacks = [whole[:1], whole[1:4], whole[4:]]
    options = {"decay": 0.999, "scale": 1e-3, "pitch": 25}
    reference.update_params(stacks, directions, **options, keys=keys, firsts=firsts)
    for param, direction, key, first in zip(parts, directions, keys, firsts, strict=True):
        update(param, direction, **options, key=key, first=first)
    assert torch.equal(whole, parts)


def test_rows_cut_to_what_one_pass_takes_change_no_bit(monkeypatch):
    import muon8bit_kernels.reference.update as module

    torch.manual_seed(0)
    start, direction, key = torch.randn(30, 20).bfloat16(), torch.randn(20, 30).T, rounding_key(0, 3, 1)
    results = []
    for size in (2**16, 47):
        monkeypatch.setattr(module, "elements_at_once", lambda _, size=size: size)
        param = start.clone()
        update(param, direction, decay=0.999, scale=1e-3, key=key)
        results += [param, module.round_stochastic(direction.contiguous(), key=key, first=11)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction_dtype", [torch.float32, torch.bfloat16])
def test_every_operation_is_rounded_by_itself(dtype, direction_dtype):
    """Bitwise what numpy computes in fp32, one operation after the other, then rounded once to nearest."""
    torch.manual_seed(0)
    start, direction = torch.randn(64, 80).to(dtype), torch.randn(80, 64).to(direction_dtype).T
    decay, scale = np.float32(0.9987), np.float32(0.0123)
    step = direction.float().numpy() * scale
    expected = torch.from_numpy(start.float().numpy() * decay - step).to(dtype)
    for factors in ((float(decay), float(scale)), (torch.tensor(decay), torch.tensor(scale))):
        param = start.clone()
        update(param, direction, decay=factors[0], scale=factors[1])
        assert torch.equal(param, expected)


@pytest.mark.parametrize("key", [None, 12345])
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)])
def test_scale_zero_and_decay_one_change_no_bit(zero, key):
    """Not the sign of a zero either: -0.0 - (-1.0 * 0.0) is +0.0 in IEEE arithmetic."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()].view(2, -1)
    param = every.clone()
    one = 1.0 if isinstance(zero, float) else torch.tensor(1.0)
    update(param, -torch.ones(every.shape), decay=one, scale=zero, key=key)
    assert torch.equal(int16(param), int16(every))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_key_for_another_dtype_raises(dtype):
    with pytest.raises(ValueError, match=r"stochastic rounding is for bfloat16 parameters, not torch\.float"):
        update(torch.zeros(2, 2, dtype=dtype), torch.ones(2, 2), decay=1.0, scale=1.0, key=0)
