"""Rows of a file become what a prior is trained on; what cannot be used is counted."""

import numpy as np
import pytest
import torch

from ppl_diffusion.models.own_data import LONGEST, as_weighted, length_law, prepare
from ppl_diffusion.models.sequence_files import Rows
from ppl_diffusion.tokenisers import Letters, Listed, find_alphabet

DNA = find_alphabet("dna")


def rows_of(texts, **columns):
    return Rows(tuple(texts), tuple(range(1, len(texts) + 1)), "own.fa", **columns)


def random_dna(count, seed=0, low=3, high=9):
    source = np.random.default_rng(seed)
    return ["".join(source.choice(list("ACGT"), source.integers(low, high))) for _ in range(count)]


def test_rows_of_several_lengths_are_filled_up():
    data = prepare(rows_of(random_dna(60)), DNA)
    sequences = data.sequences
    assert sequences.vocabulary == ("A", "C", "G", "T", "_")
    assert sequences.length == 8
    assert sequences.tokeniser == DNA
    for rows, part in ((sequences.train, data.split.train), (sequences.test, data.split.test)):
        for row, number in zip(rows.tolist(), part, strict=True):
            tokens = data.tokens[number]
            assert row == tokens + [4] * (8 - len(tokens))
            assert DNA.join([sequences.vocabulary[i] for i in tokens]) == data.rows.texts[number]


def test_rows_of_one_length_need_no_filling():
    data = prepare(rows_of(random_dna(60, low=6, high=7)), DNA)
    assert data.sequences.vocabulary == ("A", "C", "G", "T")
    assert data.sequences.lengths is None


def test_another_symbol_fills_up_where_the_usual_one_is_taken():
    texts = [word + "_" * n for word in ("ab", "ba", "aab", "bbb") for n in range(6)]
    data = prepare(rows_of(texts), find_alphabet("chars"))
    assert data.sequences.vocabulary == ("_", "a", "b", "<_>")


def test_the_law_of_lengths_is_smoothed_between_the_ends():
    sizes = np.array([2, 2, 2, 5, 4, 6])
    law = length_law(sizes, np.array([0, 1, 2, 3]))
    assert law == pytest.approx([0, 0, 3.5 / 6.5, 0.5 / 6.5, 0.5 / 6.5, 1.5 / 6.5, 0.5 / 6.5])


def test_the_law_of_lengths_knows_weights():
    weights = torch.tensor([3.0, 1.0], dtype=torch.float64)
    law = length_law(np.array([1, 2]), np.array([0, 1]), weights)
    assert law == pytest.approx([0, 2.0 / 3.0, 1.0 / 3.0])


def test_strange_letters_are_left_out_and_counted():
    texts = [*random_dna(30), "ACNT", "A-C", ""]
    data = prepare(rows_of(texts), DNA)
    assert len(data.rows) == 30
    assert data.drops.total == 3
    assert data.drops.counts == {"not of the alphabet": 3}
    assert data.drops.first == {
        "not of the alphabet": "own.fa, line 31: The dna text 'ACNT' has 'N' at letter 3, which is "
        "none of A, C, G, T; mend it or leave it out."
    }


def test_strange_letters_can_be_an_error():
    with pytest.raises(ValueError, match="line 31") as error:
        prepare(rows_of([*random_dna(30), "ACNT"]), DNA, unknown="error")
    assert str(error.value) == (
        "own.fa, line 31: The dna text 'ACNT' has 'N' at letter 3, which is none of A, C, G, T; "
        "mend it or leave it out."
    )


def test_long_rows_are_left_out_where_that_is_said():
    data = prepare(rows_of([*random_dna(30), "A" * 10]), DNA, max_length=9)
    assert data.drops.counts == {"too long": 1}
    with pytest.raises(ValueError, match="more than") as error:
        prepare(rows_of([*random_dna(30), "A" * (LONGEST + 1)]), DNA)
    assert str(error.value) == (
        "own.fa, line 31: the sequence has 1025 tokens, more than 1024; cut it into windows, or "
        "leave longer ones out by --max-length."
    )


def test_a_text_that_does_not_come_back_is_left_out():
    class Lossy(Letters):
        kind = "lossy"

        def join(self, tokens):
            return "".join(tokens).replace("GG", "G")

    data = prepare(rows_of([*["ACT" + "A" * n for n in range(20)], "AGGA"]), Lossy("lossy"))
    assert data.drops.first == {
        "not of the alphabet": "own.fa, line 21: The lossy text 'AGGA' comes back as 'AGA', "
        "another sequence; mend it or leave it out."
    }


def test_nothing_that_can_be_used():
    with pytest.raises(ValueError, match="usable") as error:
        prepare(rows_of(["NNN", "XX"]), DNA)
    assert str(error.value) == (
        "There are 0 usable sequences in own.fa, too few to split into rows for training, "
        "validation and test; give 10 or more. The first of 2 that cannot be used: own.fa, line 1: "
        "The dna text 'NNN' has 'N' at letter 1, which is none of A, C, G, T; mend it or leave it "
        "out."
    )


def test_symbols_are_learnt_from_all_rows():
    data = prepare(rows_of(["C" * n + "Cl" for n in range(1, 20)]), find_alphabet("smiles"))
    assert data.tokeniser.symbols == ("C", "Cl")
    assert data.sequences.length == 20


def test_tokens_of_several_characters():
    data = prepare(rows_of(["abcab" * n for n in range(1, 20)]), Listed("own", ("ab", "c", "cab")))
    assert data.tokens[0] == [0, 2]


def test_classes_and_weights_follow_their_rows():
    texts = random_dna(50)
    labels = tuple("xy"[len(text) % 2] for text in texts)
    weights = tuple(float(len(text)) for text in texts)
    data = prepare(rows_of([*texts, "N"], labels=(*labels, "x"), weights=(*weights, 1.0)), DNA)
    assert data.classes == ("x", "y")
    for part, got in zip(
        (data.split.train, data.split.valid, data.split.test), data.sequences.labels, strict=True
    ):
        assert got.tolist() == [data.classes.index(labels[i]) for i in part]
    assert data.sequences.train_weights.tolist() == [weights[i] for i in data.split.train]


def test_validation_rows_are_repeated_by_their_weights():
    numbers = np.array([5, 6, 7, 8])
    weights = [9.0] * 5 + [1.0, 0.0, 3.0, 0.0]
    assert as_weighted(numbers, weights).tolist() == [5, 7, 7, 7]
    assert as_weighted(numbers, None).tolist() == [5, 6, 7, 8]
    assert as_weighted(numbers, [0.0] * 9).tolist() == [5, 6, 7, 8]


def test_weights_that_draw_nothing():
    with pytest.raises(ValueError, match=r"^All training rows have the weight 0; give some of"):
        prepare(rows_of(random_dna(30), weights=(0.0,) * 30), DNA)


def test_the_digest_knows_rows_and_parts():
    texts = random_dna(40)
    same = [prepare(rows_of(texts), DNA).digest for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != prepare(rows_of(texts), DNA, seed=1).digest
    assert same[0] != prepare(rows_of(texts[:-1]), DNA).digest


def test_selfies_are_checked_by_the_molecule():
    pytest.importorskip("selfies")
    pytest.importorskip("rdkit")
    texts = [f"{'C' * n}(=O)O" for n in range(2, 20)]
    data = prepare(rows_of([*texts, "not one"]), find_alphabet("selfies"))
    assert data.drops.counts == {"not of the alphabet": 1}
    assert data.tokeniser.symbols[0].startswith("[")
    assert data.split.rule == "families by Murcko scaffolds"
