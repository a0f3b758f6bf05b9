"""Equations as strings: all right, the verifier, and its extension to laws of characters."""

import pytest
import torch

from ppl_diffusion.models import arithmetic
from ppl_diffusion.models.arithmetic import LETTERS, EquationReward, RightEquation, equations, spell
from ppl_diffusion.models.datasets import load_sequences


def ids(*texts):
    return torch.tensor([[LETTERS.index(letter) for letter in spell(text)] for text in texts])


def texts(rows):
    return ["".join(LETTERS[i] for i in row).replace("_", "") for row in rows.tolist()]


def test_every_equation_is_right():
    rows = equations()
    assert len(rows) == 10_000 + 5050 + 10_000
    assert len(rows.unique(dim=0)) == len(rows)
    for text in texts(rows[::7]):
        left, right = text.split("=")
        assert eval(left) == int(right), text


def test_numbers_stand_at_the_right_end_of_their_columns():
    rows = {"".join(LETTERS[i] for i in row) for row in equations().tolist()}
    assert {"17+25=__42", "_7*_8=__56", "99*99=9801", "_0-_0=___0"} <= rows
    assert spell("7*8=56") == "_7*_8=__56"
    assert spell("?7+2?=42") == "?7+2?=__42"


@pytest.mark.parametrize("text", ["17+25", "117+2=119", "a+b=c", "1+1=", "1/1=1", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="is no equation as"):
        arithmetic.spell(text)


def test_the_verifier_tells_right_from_wrong():
    verifier = RightEquation()
    rows = ids("17+25=42", "17+25=43", "3-7=4", "9*9=81", "12*12=144")
    assert verifier.satisfied(rows).tolist() == [True, False, False, True, True]
    assert not bool(verifier.satisfied(torch.full((3, 10), 10)).any())
    assert bool(verifier.satisfied(equations()).all())


def test_the_reward_is_what_the_verifier_says_with_its_edge_taken_off():
    reward = EquationReward(0.01)
    found = reward(ids("17+25=42", "17+25=43"))
    wanted = torch.tensor([1.0, 0.01], dtype=torch.float64).log()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_between_strings_it_is_the_probability_of_a_right_equation():
    """The sum over all 25,050 right strings, written down; no chance in it."""
    reward, source = EquationReward(), torch.Generator().manual_seed(0)
    laws = torch.rand(2, 10, 15, generator=source, dtype=torch.float64).softmax(-1)
    rows = equations()
    each = torch.stack([laws[:, i, rows[:, i]] for i in range(10)]).prod(0)
    torch.testing.assert_close(reward.probability(laws), each.sum(-1), rtol=1e-10, atol=0)


def test_its_gradient_finds_the_digit_that_is_missing():
    laws = torch.nn.functional.one_hot(ids("17+25=40"), 15).double().requires_grad_(True)
    EquationReward().embedded(laws).sum().backward()
    assert laws.grad is not None
    assert int(laws.grad[0, 9].argmax()) == 2  # 17 + 25 = 42


def test_the_slack_is_a_probability():
    with pytest.raises(ValueError, match=r"slack must lie in \(0, 1\), got 1"):
        EquationReward(1.0)


def test_the_parts_share_no_equation_and_need_no_data(monkeypatch):
    monkeypatch.delenv("PPL_DIFFUSION_DATA", raising=False)
    sequences = load_sequences("arithmetic")
    parts = [sequences.train, sequences.valid, sequences.test]
    assert len(torch.cat(parts).unique(dim=0)) == sum(map(len, parts)) == 25_050
