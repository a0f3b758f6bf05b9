"""What cannot be cut is told in one sentence."""

import importlib

import pytest

from ppl_diffusion.tokenisers import Letters, Listed, Tokeniser, find_alphabet


@pytest.mark.parametrize(
    ("alphabet", "text", "said"),
    [
        (
            "dna",
            "acgn",
            "The dna text 'acgn' has 'N' at letter 4, which is none of A, C, G, T; "
            "mend it or leave it out.",
        ),
        (
            "smiles",
            "CqC",
            "The smiles text 'CqC' has 'q' at letter 2, where no symbol begins; "
            "mend it or leave it out.",
        ),
        (
            "rna",
            "A" * 40 + "-",
            "The rna text 'AAAAAAAAAAAAAAAAAAAAA...' has '-' at letter 41, which is none of A, C, "
            "G, U; mend it or leave it out.",
        ),
    ],
)
def test_texts(alphabet, text, said):
    with pytest.raises(ValueError, match="mend it") as error:
        find_alphabet(alphabet).split(text)
    assert str(error.value) == said


def test_a_symbol_that_was_not_learnt():
    with pytest.raises(ValueError, match="none of") as error:
        find_alphabet("smiles").fitted(["CC(Br)"]).split("CN")
    assert str(error.value) == (
        "The smiles text 'CN' has 'N' as token 2, which is none of (, ), Br, C; "
        "mend it or leave it out."
    )


def test_a_place_that_no_token_leads_over():
    with pytest.raises(ValueError, match="no token") as error:
        Listed("own", ("ab", "abc", "d")).split("abcxd")
    assert str(error.value) == (
        "The own text 'abcxd' has 'x' at letter 4, where no token goes on; mend it or leave it out."
    )


def test_no_molecule():
    pytest.importorskip("selfies")
    with pytest.raises(ValueError, match="has no SELFIES") as error:
        find_alphabet("selfies").split("C(")
    assert str(error.value) == (
        "The selfies text 'C(' has no SELFIES (failed to parse input); mend it or leave it out."
    )


def test_a_library_that_is_missing(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    selfies = importlib.import_module("ppl_diffusion.tokenisers.selfies")
    monkeypatch.setattr(selfies, "import_module", absent)
    with pytest.raises(ModuleNotFoundError) as error:
        find_alphabet("safe").split("CCO")
    assert str(error.value) == (
        "Molecules need safe, which is not installed; run `pip install 'ppl-diffusion[safe]'`."
    )


def test_unknown_alphabets():
    with pytest.raises(ValueError, match="There is no alphabet") as error:
        find_alphabet("dnna")
    assert str(error.value) == (
        "There is no alphabet 'dnna': choose one of dna, rna, protein, smiles, selfies, safe, "
        "chars, or give a file with one token per line."
    )


def test_files_that_list_nothing(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"^The alphabet empty lists no tokens; give at least"):
        find_alphabet(tmp_path / "empty.txt")
    (tmp_path / "packed.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"is no UTF-8 text; write one token per line\.$"):
        find_alphabet(tmp_path / "packed.txt")


def test_symbols_twice_and_long_letters():
    with pytest.raises(ValueError, match=r"^The alphabet own has 'a' twice; give every symbol"):
        Listed("own", ("a", "b", "a"))
    with pytest.raises(ValueError, match=r"^The alphabet own of letters has 'ab', which is no let"):
        Letters("own", ("ab",))


def test_settings_of_no_tokeniser():
    with pytest.raises(ValueError, match=r"^There is no kind of tokeniser 'wordpiece': choose"):
        Tokeniser.from_settings({"kind": "wordpiece"})
    with pytest.raises(ValueError, match=r"^A tokeniser of kind 'letters' cannot be made so"):
        Tokeniser.from_settings({"kind": "letters", "name": "own", "colour": "red"})
