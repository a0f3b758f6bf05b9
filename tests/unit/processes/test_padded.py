import numpy as np
import pytest
import torch

from ppl_diffusion.processes import Absorbing, Padded, nelbo_terms

LAW = [0.1, 0.2, 0.3, 0.4]


def rows(*texts):
    return torch.tensor([["ab_?".index(x) for x in text] for text in texts])


def test_starts_have_the_law_of_the_lengths_exactly():
    process = Padded(3, LAW)
    noise = torch.zeros(8, 3, dtype=torch.float64)
    noise[:, 0] = torch.tensor([0.0, 0.099, 0.1, 0.299, 0.3, 0.599, 0.6, 0.999])
    start = process.draw_start(noise)
    assert torch.equal(start, rows("___", "___", "?__", "?__", "??_", "??_", "???", "???"))
    expected = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]).double()
    torch.testing.assert_close(process.log_start(start).exp(), expected)


def test_a_prompt_chooses_among_the_lengths_that_agree_with_it():
    process = Padded(3, LAW)
    prompt = torch.tensor([-1, 0, -1])  # a letter in the second place: two or three letters
    noise = torch.tensor([[0.42, 0, 0], [0.44, 0, 0]], dtype=torch.float64)
    start = process.draw_start(noise, prompt)
    assert torch.equal(start, rows("?a_", "?a?"))
    law = torch.tensor([3 / 7, 4 / 7]).double()
    torch.testing.assert_close(process.log_start(start, prompt).exp(), law)
    assert process.log_start(rows("?b_", "a__"), prompt).tolist() == [-torch.inf, -torch.inf]
    held = torch.tensor([-1, -1, 2])  # filled up from the third place on
    assert process.log_start(rows("???"), held).item() == -torch.inf


def test_what_fills_up_is_never_noised():
    process, x0 = Padded(3, LAW), rows("ab_", "a__")
    u = torch.full((2, 2, 3), 0.5, dtype=torch.float64)
    assert torch.equal(process.corrupt(x0, 0.0, *u), rows("??_", "?__"))
    assert torch.equal(process.start_of(x0), rows("??_", "?__"))
    assert torch.equal(process.shown(rows("??_")), rows("??_").where(rows("??_") == 2, -1))


def test_the_length_of_a_sequence_with_a_gap_is_impossible():
    log_p = Padded(3, LAW).log_length(rows("a_b", "ab_"))
    assert log_p[0] == -torch.inf
    assert log_p[1].exp().item() == pytest.approx(0.3)


def test_a_range_of_lengths_is_the_law_given_it():
    process = Padded(3, LAW).between(1, 2)
    np.testing.assert_allclose(process.lengths, [0, 0.4, 0.6, 0])
    with pytest.raises(ValueError) as caught:
        Padded(3, [0.5, 0.5, 0, 0]).between(2)
    assert str(caught.value) == (
        "Padded: no sequence has 2 to 3 letters, the law of lengths runs from 0 to 1; choose "
        "lengths among those."
    )


def test_bound_terms_of_filling_are_zero_though_it_is_never_predicted():
    process, x0 = Padded(3, LAW), rows("a__")
    log_c = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64).log().expand(1, 3, 3)
    terms = nelbo_terms(process, x0, process.start_of(x0), log_c, torch.tensor([[0.5]]).double())
    assert terms[0, 0] > 0
    assert terms[0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize("lengths", [[0.5, 0.6], [1.5, -0.5], [np.nan, 1], [1.0], [[1.0]]])
def test_refuses_what_is_no_law(lengths):
    with pytest.raises(ValueError, match="must hold the probabilities of the lengths 0 to L"):
        Padded(3, lengths)


def test_refuses_filling_alone():
    with pytest.raises(ValueError, match="there must be another one; got vocab_size = 1"):
        Padded(1, [0.5, 0.5])


def test_plain_masks_are_as_before():
    process = Absorbing(2)
    assert not process.start_is_random
    assert process.padding is None
    assert process.log_length(torch.zeros(2, 3, dtype=torch.int64)) == 0.0
