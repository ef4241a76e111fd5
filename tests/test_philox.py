"""Philox-4x64-10 against published answers, against the definition in Python integers, and its two implementations against each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_opt.directions.philox import mix, philox, words

CPU = torch.device("cpu")
MASK = 2**64 - 1
EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
u64 = st.one_of(st.sampled_from(EDGES), st.integers(0, MASK))
seeds = st.one_of(u64, st.integers(-(2**63), -1))


def signed(word):
    return word - 2**64 if word >> 63 else word


def by_definition(counter, key):
    """Salmon et al. 2011, section 3.3 and table 2, one integer at a time."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = right >> 64 ^ x1 ^ k0, right & MASK, left >> 64 ^ x3 ^ k1, left & MASK
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK, k1 + 0xBB67AE8584CAA73B & MASK
    return [x0, x1, x2, x3]


def by_torch(counter, key):
    return [w & MASK for w in philox([torch.tensor([signed(c)]) for c in counter], key)[0].tolist()]


PI = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
ANSWERS = {
    "zeros": ([0] * 4, (0, 0), "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    "ones": ([MASK] * 4, (MASK, MASK), "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    "pi": (PI, (0x452821E638D01377, 0xBE5466CF34E90C6C), "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_known_answers(name):
    """Random123's kat_vectors, philox 4x64 10."""
    counter, key, expected = ANSWERS[name]
    for ours in (by_torch, by_definition):
        assert " ".join(f"{w:016x}" for w in ours(counter, key)) == expected


@settings(deadline=None, max_examples=100)
@given(counter=st.tuples(u64, u64, u64, u64), key=st.tuples(u64, u64))
def test_torch_follows_the_definition(counter, key):
    assert by_torch(counter, key) == by_definition(counter, key)


class Elsewhere(str):
    """The CPU under another name, so that ``words`` takes the way of all other devices."""

    type = "elsewhere"


@settings(deadline=None, max_examples=100)
@given(
    key=st.tuples(seeds, seeds),
    counter=st.tuples(seeds, seeds, seeds),
    first=st.one_of(st.integers(0, 1000), st.integers(0, 2**62)),
    blocks=st.integers(0, 9),
)
def test_numpys_words_are_torchs(key, counter, first, blocks):
    fast, plain = (words(key, counter, first, blocks, d) for d in (CPU, Elsewhere("cpu")))
    assert fast.dtype == plain.dtype == torch.int64
    assert fast.shape == (4 * blocks,)
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("device", [CPU, Elsewhere("cpu")], ids=["cpu", "elsewhere"])
def test_block_i_has_the_counter_i_plus_one(device):
    assert [w & MASK for w in words((5, 0), (2, 7, 1), 40, 1, device).tolist()] == by_definition([41, 2, 7, 1], (5, 0))


@pytest.mark.parametrize("device", [CPU, Elsewhere("cpu")], ids=["cpu", "elsewhere"])
def test_words_can_be_read_in_smaller_units(device):
    """Also no word at all: rademacher reads bytes, sparse 16-bit numbers."""
    for blocks in (0, 1, 3):
        drawn = words((1, 0), (2, 3, 4), 0, blocks, device)
        assert drawn.view(torch.uint8).shape == (32 * blocks,)
        assert drawn.view(torch.int16).shape == (16 * blocks,)


def test_bits_are_balanced():
    """Each of the 64 bit positions over 100 000 words: within 5 standard errors of one half (p < 6e-7 a position)."""
    drawn = words((1, 2), (3, 4, 5), 0, 25_000, CPU).numpy().view(np.uint8)
    shares = np.unpackbits(drawn.reshape(-1, 8), axis=1).mean(axis=0)
    assert (abs(shares - 0.5) < 5 * 0.5 / 100_000**0.5).all()


@settings(deadline=None, max_examples=100)
@given(st.lists(seeds, min_size=1, max_size=5), st.lists(seeds, min_size=1, max_size=5))
def test_mix_is_injective_in_practice(first, second):
    assert 0 <= mix(*first) < 2**63
    assert (mix(*first) == mix(*second)) == ([s & MASK for s in first] == [s & MASK for s in second])


def test_mix_changes_half_of_the_bits():
    """Neighbouring integers in any position differ in 31.5 of 63 bits: within 5 standard errors over 1000 pairs."""
    for position in range(3):
        names = [[9, 9, 9] for _ in range(1001)]
        for i, name in enumerate(names):
            name[position] = i
        flips = [bin(mix(*a) ^ mix(*b)).count("1") for a, b in pairwise(names)]
        assert abs(np.mean(flips) - 31.5) < 5 * (63 / 4 / 1000) ** 0.5
