"""Splits keep near copies together."""

import random
import time

import numpy as np
import pytest

from ppl_diffusion.models.near_copies import families
from ppl_diffusion.models.splits import split_rows

BASES = "ACGT"


def dna(source, length=60):
    return "".join(source.choices(BASES, k=length))


def changed(source, text, changes=2):
    letters = list(text)
    for place in source.sample(range(len(text)), changes):
        letters[place] = source.choice(BASES)
    return "".join(letters)


def planted(count=200, copies=4, seed=0):
    """Random sequences and, for every one, near copies; with the number of its original."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        original = dna(source)
        rows.append((original, number))
        rows += [(changed(source, original), number) for _ in range(copies)]
    source.shuffle(rows)
    return [text for text, _ in rows], np.array([number for _, number in rows])


def ids(texts):
    return [[ord(letter) for letter in text] for text in texts]


def parts_of(split, groups):
    return [set(groups[rows].tolist()) for rows in (split.train, split.valid, split.test)]


def apart(train, valid, test):
    return not (train & valid or train & test or valid & test)


def test_planted_near_copies_stay_in_one_part():
    texts, groups = planted()
    split = split_rows(texts, ids(texts))
    train, valid, test = parts_of(split, groups)
    assert apart(train, valid, test)
    assert split.sizes == {"train": 800, "valid": 100, "test": 100}
    assert split.rule == "families by shared 5-mers"
    assert len(set(split.test_family.tolist())) == 20


def test_random_sequences_are_no_families():
    source = random.Random(1)
    texts = [dna(source) for _ in range(1000)]
    assert families(texts, ids(texts)).count == 1000


def test_every_row_is_in_one_part():
    texts, _ = planted(50)
    split = split_rows(texts, ids(texts))
    together = np.concatenate([split.train, split.valid, split.test])
    assert sorted(together.tolist()) == list(range(len(texts)))


def test_the_same_seed_splits_alike():
    texts, _ = planted(50)
    one, same, other = (split_rows(texts, ids(texts), seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.test, same.test)
    assert np.array_equal(one.train, same.train)
    assert not np.array_equal(one.test, other.test)


def test_copies_of_one_text_stay_together():
    source = random.Random(2)
    once = [dna(source, 6) for _ in range(100)]
    texts = [text for text in once for _ in range(3)]
    groups = np.array([once.index(text) for text in texts])
    train, valid, test = parts_of(split_rows(texts, ids(texts)), groups)
    assert apart(train, valid, test)


def test_one_huge_family_falls_back_to_rows():
    source = random.Random(3)
    original = dna(source)
    texts = [changed(source, original, 3) for _ in range(90)] + [dna(source) for _ in range(10)]
    split = split_rows(texts, ids(texts))
    assert split.sizes == {"train": 80, "valid": 10, "test": 10}
    assert split.rule.startswith("families by copies of one text only: by shared 5-mers one family")


def test_a_large_family_is_trained_on():
    source = random.Random(4)
    original = dna(source)
    texts = [changed(source, original) for _ in range(40)] + [dna(source) for _ in range(60)]
    split = split_rows(texts, ids(texts))
    assert set(range(40)) <= set(split.train.tolist())
    assert split.sizes == {"train": 80, "valid": 10, "test": 10}


def test_scaffolds_keep_molecules_together():
    pytest.importorskip("rdkit")
    rings = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CCOC1", "c1ccc2ccccc2c1"] * 4
    texts = [chain + ring for ring in rings for chain in ("C", "CC", "CCC", "N", "OC")]
    texts += [f"C{'C' * n}O" for n in range(20)]
    found = families(texts, ids(texts), molecules=True)
    assert found.rule == "Murcko scaffolds"
    assert found.count == 5 + 20
    # The same molecule written otherwise, without rings.
    chains = ["OCC", "CCN", "CCO", "CF", "CCl"]
    assert families(chains, ids(chains), molecules=True).ids.tolist() == [0, 1, 0, 2, 3]


def test_parts_of_the_file_are_kept():
    texts, _ = planted(20)
    parts = ["test" if i % 10 == 0 else "valid" if i % 10 == 1 else "train" for i in range(100)]
    split = split_rows(texts, ids(texts), parts=parts)
    assert split.test.tolist() == list(range(0, 100, 10))
    assert split.valid.tolist() == list(range(1, 100, 10))
    assert split.rule.startswith("as the file says")


def test_a_part_that_the_file_leaves_out_is_made():
    texts, groups = planted(50)
    parts = ["test" if groups[i] < 10 else "train" for i in range(len(texts))]
    split = split_rows(texts, ids(texts), parts=parts)
    train, valid, test = parts_of(split, groups)
    assert apart(train, valid, test)
    assert len(split.test) == 50
    assert 15 <= len(split.valid) <= 30


def test_too_few_rows():
    with pytest.raises(ValueError, match="usable") as error:
        split_rows(["A", "C"], [[0], [1]])
    assert str(error.value) == (
        "There are 2 usable sequences, too few to split into rows for training, validation and "
        "test; give 10 or more."
    )


def test_a_part_without_rows():
    texts = ["ACGT"] * 12
    with pytest.raises(ValueError, match="left") as error:
        split_rows(texts, ids(texts))
    assert str(error.value) == (
        "No sequence is left for valid: the families are too few or too large; give more "
        "sequences, or name a column with the parts by --split-column."
    )


def test_time_grows_like_the_number_of_rows():
    texts, _ = planted(1000, copies=9)
    began = time.perf_counter()
    families(texts, ids(texts))
    # 100,000 rows may take a minute; ten times fewer, with room for a busy machine.
    assert time.perf_counter() - began < 20.0
