"""Programs whose tokens are words: text is split, lists are tokens, and both are written back."""

import pytest
import torch

from ppl_diffusion.models import MaskedDiffusion

WORDS = ["the", "food", "was", "good", "bad", ".", "##ly", "play", "##ing"]


class Flat:
    """Every token alike."""

    kind, time_free = "posterior", True

    def __init__(self, size):
        self.vocab_size = size

    def __call__(self, tokens, t):
        return torch.zeros(*tokens.shape, self.vocab_size).log_softmax(-1)


def prior(words=WORDS, length=6):
    return MaskedDiffusion(Flat(len(words)), vocabulary=words, length=length)


def test_text_is_split_at_white_space_and_joined_with_it():
    ids = prior().encode("the food  was good . bad")
    assert ids.tolist() == [0, 1, 2, 3, 5, 4]
    assert prior().decode(ids) == "the food was good . bad"
    assert prior().separator == " "
    assert prior("ACGT").separator == ""


def test_a_list_of_tokens_is_one_sequence():
    tokens = ["the", "food", "was", "good", ".", "bad"]
    wanted = [0, 1, 2, 3, 5, 4]
    for one in (tokens, tuple(tokens)):
        assert prior().encode(one).tolist() == wanted
    for several in ([tokens, tokens], [" ".join(tokens)] * 2, [tokens, " ".join(tokens)]):
        assert prior().encode(several).tolist() == [wanted, wanted]
    assert prior().encode([]).shape == (0, 6)
    assert prior("ACGT").encode(list("ACGTTA")).tolist() == [0, 1, 2, 3, 3, 0]


def test_lists_of_sequences_of_one_token_stay_lists():
    assert prior(length=1).encode(["good", "bad"]).tolist() == [[3], [4]]
    assert prior("ACGT", 1).encode(["A", "C"]).tolist() == [[0], [1]]
    assert prior(length=1).encode("bad").tolist() == [4]


def test_pieces_are_found_and_joined():
    ids = prior(length=5).encode("the playing badly")
    assert ids.tolist() == [0, 7, 8, 4, 6]
    assert prior(length=5).decode(ids) == "the playing badly"
    assert prior(length=5).encode("the play ##ing bad ##ly").tolist() == ids.tolist()
    assert prior(length=2).decode(torch.tensor([8, 6])) == "##ingly"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the food was", "a sequence has 6 tokens, but 'the food was' has 3; cut or pad it"),
        (["the", "food"], "a sequence has 6 tokens, but 'the food' has 2; cut or pad it"),
        ("the foot was good . .", "'foot' at position 1 is not one of the tokens the, food, was"),
        (["the", "foot", "was", "good", ".", "."], "'foot' at position 1 is not one of the"),
    ],
)
def test_wrong_tokens_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        prior().encode(text)


def test_of_a_large_vocabulary_an_error_lists_a_part():
    many = prior([f"w{i}" for i in range(30_000)], 2)
    with pytest.raises(ValueError, match=r"w49 and 29950 more; replace it"):
        many.encode("w1 x")


def test_letters_beside_one_long_token_are_read_as_before():
    mixed = prior([*"ACGT", "<pad>"], 4)
    assert mixed.encode("ACGT").tolist() == [0, 1, 2, 3]
    ids = torch.tensor([0, 1, 4, 4])
    assert mixed.decode(ids) == "A C <pad> <pad>"
    assert torch.equal(mixed.encode(mixed.decode(ids)), ids)


def test_white_space_of_the_vocabulary_is_its_own():
    spaced = prior(["the", " ", "food"], 3)
    assert spaced.decode(torch.tensor([0, 1, 2])) == "the food"
    assert spaced.encode(["the", " ", "food"]).tolist() == [0, 1, 2]


def test_its_description_parts_words():
    assert "vocabulary='the food was" in repr(prior())
