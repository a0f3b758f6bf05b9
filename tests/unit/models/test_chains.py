"""Markov chains of any order, held to counting."""

import itertools
import math

import numpy as np
import pytest

from ppl_diffusion.models.chains import (
    STRENGTHS,
    MarkovChains,
    bits_of_orders,
    expected_copies,
    strengths,
)

ROWS = [[0, 1, 0], [0], [1, 1], [0, 1, 1, 0], [1, 0]]


def counted(rows, order, strength, outcomes):
    """The same law, by counting and recursion."""

    def share(context, token):
        lower = share(context[1:], token) if context else 1.0 / outcomes
        seen = [
            (padded[i - len(context) : i], padded[i])
            for padded in (["^"] * 9 + row + ["$"] for row in rows)
            for i in range(9, len(padded))
        ]
        total = sum(before == context for before, _ in seen)
        both = sum(before == context and after == token for before, after in seen)
        return (both + strength * lower) / (total + strength)

    def bits(row):
        padded = ["^"] * 9 + row + ["$"]
        places = range(9, len(padded))
        return -sum(math.log2(share(padded[i - order : i], padded[i])) for i in places)

    return bits


@pytest.mark.parametrize("order", [0, 1, 3])
def test_code_lengths_are_those_of_counting(order):
    chains = MarkovChains(ROWS, 2, ends=True, max_order=3)
    asked = [[0], [1, 1, 1, 1, 1], [0, 1, 0, 1]]
    wanted = [counted(ROWS, order, 0.7, 3)(row) for row in asked]
    assert chains.bits(asked, 0.7)[order] == pytest.approx(wanted)


@pytest.mark.parametrize("order", [0, 2])
def test_the_law_of_all_sequences_has_mass_one(order):
    chains = MarkovChains(ROWS, 2, ends=True, max_order=2)
    words = [list(w) for n in range(14) for w in itertools.product([0, 1], repeat=n)]
    mass = expected_copies(chains.bits(words, 2.0)[order])
    # Longer sequences hold what is missing.
    assert 0.98 < mass < 1.0


def test_the_law_of_one_length_has_mass_one():
    rows = [[0, 1, 2], [2, 1, 0], [1, 1, 1]]
    chains = MarkovChains(rows, 3, ends=False)
    words = [list(word) for word in itertools.product(range(3), repeat=3)]
    for bits in chains.bits(words, 0.5):
        assert expected_copies(bits) == pytest.approx(1.0)


def test_weights_count_like_copies():
    weighted = MarkovChains(ROWS[:2], 2, ends=True, weights=[3.0, 1.0])
    copied = MarkovChains([ROWS[0]] * 3 + [ROWS[1]], 2, ends=True)
    assert weighted.bits(ROWS, 2.0) == pytest.approx(copied.bits(ROWS, 2.0))


def test_strengths_are_the_best_on_validation_rows():
    source = np.random.default_rng(0)
    rows = source.integers(0, 4, (60, 20)).tolist()
    chains = MarkovChains(rows[:50], 4, ends=False)
    chosen = strengths(chains, rows[50:])
    assert len(chosen) == 7
    # Of random letters a longer context says nothing, so that the counts of many are trusted less.
    assert chosen[6] == STRENGTHS[-1]
    best = bits_of_orders(chains, rows[50:], chosen).mean(1)
    for strength in STRENGTHS:
        assert (best <= chains.bits(rows[50:], strength).mean(1) + 1e-12).all()
