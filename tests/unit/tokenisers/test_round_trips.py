"""Text comes back after it was cut into symbols and joined."""

import json
import random

import pytest

from ppl_diffusion.tokenisers import ALPHABETS, Listed, Tokeniser, find_alphabet, padding_symbol

ATOMS = ["C", "N", "O", "Br", "Cl", "c", "n", "[nH]", "[C@@H]", "[13CH3-]", "%12", "%(100)", "1"]
BONDS = ["=", "#", "/", "\\", "(", ")", "-", "."]


def strings(symbols, seed):
    source = random.Random(seed)
    return ["".join(source.choices(symbols, k=source.randint(0, 30))) for _ in range(200)]


@pytest.mark.parametrize("name", ["dna", "rna", "protein"])
def test_letters_of_an_alphabet(name):
    alphabet = find_alphabet(name)
    for text in strings(alphabet.symbols, 0):
        assert alphabet.split(text) == list(text)
        assert alphabet.join(alphabet.split(text.lower())) == text


def test_twins_are_read_as_one():
    assert find_alphabet("dna").join(find_alphabet("dna").split("acgu")) == "ACGT"
    assert find_alphabet("rna").join(find_alphabet("rna").split("ACGT")) == "ACGU"


def test_any_text_by_its_characters():
    texts = strings("aäß \n\t_~🙂", 1)
    alphabet = find_alphabet("chars").fitted(texts)
    assert set(alphabet.symbols) == set("".join(texts))
    assert all(alphabet.join(alphabet.split(text)) == text for text in texts)


def test_symbols_of_smiles_are_whole():
    source = random.Random(2)
    smiles = find_alphabet("smiles")
    for _ in range(200):
        tokens = source.choices(ATOMS + BONDS, k=20)
        assert smiles.split("".join(tokens)) == tokens


def test_lists_lead_over_any_text_of_their_tokens():
    tokens = ("a", "ab", "abc", "bcd", "dd")
    alphabet = Listed("own", tokens)
    for text in strings(tokens, 3):
        found = alphabet.split(text)
        assert set(found) <= set(tokens)
        assert alphabet.join(found) == text


def test_the_longest_token_that_leads_on_is_taken():
    assert Listed("own", ("a", "ab", "abc", "cd")).split("abcd") == ["ab", "cd"]
    assert Listed("own", ("a", "ab", "abc", "cd", "d")).split("abcd") == ["abc", "d"]


def test_selfies_give_the_same_molecule():
    pytest.importorskip("selfies")
    alphabet = find_alphabet("selfies")
    for text in ("CC(=O)Oc1ccccc1C(=O)O", "C[C@H](N)C(=O)O", "C1CC1[N+](=O)[O-]"):
        assert alphabet.inverts(text)


def test_selfies_make_a_molecule_of_any_symbols():
    pytest.importorskip("selfies")
    chem = pytest.importorskip("rdkit.Chem")
    texts = ["CC(=O)Oc1ccccc1", "NCC#N"]
    alphabet = find_alphabet("selfies").fitted(texts)
    for index in range(50):
        tokens = random.Random(index).choices(alphabet.symbols, k=12)
        assert chem.MolFromSmiles(alphabet.join(tokens)) is not None


def test_safe_gives_the_same_molecule():
    pytest.importorskip("safe")
    alphabet = find_alphabet("safe")
    assert alphabet.inverts("CC(=O)Nc1ccc(cc1)C(=O)OCC")


@pytest.mark.parametrize("name", sorted(ALPHABETS))
def test_settings_bring_a_tokeniser_back(name):
    alphabet = find_alphabet(name)
    assert Tokeniser.from_settings(json.loads(json.dumps(alphabet.settings()))) == alphabet


def test_equal_by_settings():
    chars = find_alphabet("chars")
    assert chars.fitted(["ab"]) == chars.fitted(["ba"])
    assert chars.fitted(["ab"]) != chars.fitted(["abc"])


def test_a_file_lists_tokens(tmp_path):
    file = tmp_path / "codons.txt"
    file.write_text("ATG\r\nGCC\n\nTAA\n")
    alphabet = find_alphabet(file)
    assert alphabet == Listed("codons", ("ATG", "GCC", "TAA"))
    assert alphabet.split("ATGTAA") == ["ATG", "TAA"]


def test_what_fills_up_is_no_symbol():
    assert padding_symbol("ACGT") == "_"
    assert padding_symbol(["a", "_"]) == "<_>"
    assert padding_symbol(["<_>", "_"]) == "<__>"
