"""Names and molecules are read, filled up to one length, and spelt without the filling."""

import csv
import gzip

import pytest

from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.models.datasets import PADDING, check_sequences, load_sequences, unpad
from ppl_diffusion.models.recipes import find_recipe

LONG = "C" * 25


def write_table(folder, file, column, rows):
    path = folder / file
    path.parent.mkdir()
    with gzip.open(path, "wt", newline="") as lines:
        csv.writer(lines).writerows([[column, "split"], *rows])


@pytest.fixture
def names(tmp_path):
    rows = [("ann", "train"), ("bob", "valid"), ("maximilianmaria", "test"), ("zoe", "train")]
    write_table(tmp_path, "text/names.csv.gz", "name", rows)
    return load_sequences("names", tmp_path)


@pytest.fixture
def molecules(tmp_path):
    rows = [("C#N", "train"), ("C1CC1[NH+]", "valid"), (LONG, "train"), ("c1cc[nH]c1", "test")]
    write_table(tmp_path, "molecules/qm9.csv.gz", "smiles", rows)
    return load_sequences("qm9", tmp_path)


def decoded(sequences, part):
    program = MaskedDiffusion.build(sequences.vocabulary, sequences.length, dim=8, heads=2, depth=1)
    return [unpad(text) for text in program.decode(getattr(sequences, part))]


def test_names_come_back_as_they_were(names):
    assert decoded(names, "train") == ["ann", "zoe"]
    assert decoded(names, "test") == ["maximilianmaria"]  # of the full length: nothing is added
    assert names.length == 15
    assert names.vocabulary == "abeilmnorxz" + PADDING
    check_sequences(names, find_recipe("masked-names"))


def test_molecules_are_read_by_character(molecules):
    assert decoded(molecules, "valid") == ["C1CC1[NH+]"]
    assert decoded(molecules, "test") == ["c1cc[nH]c1"]
    check_sequences(molecules, find_recipe("masked-qm9"))


def test_what_is_too_long_is_left_out_and_said(molecules, names):
    assert decoded(molecules, "train") == ["C#N"]
    assert "1 of 4 are longer and left out" in molecules.source
    assert "0 of 4 are longer" in names.source


def test_padding_inside_a_sequence_stays():
    assert unpad("an_n__") == "an_n"
    assert unpad("___") == ""
