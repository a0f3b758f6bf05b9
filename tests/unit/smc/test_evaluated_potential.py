"""Answers remembered for a run: in a dictionary, and by sorted hashes."""

import pytest
import torch

from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import evaluated_potential
from ppl_diffusion.smc.evaluated_potential import (
    EvaluatedPotential,
    ListedAnswers,
    SortedAnswers,
)


def value(x0):
    return (x0 * torch.arange(1, x0.shape[-1] + 1)).sum(-1).to(torch.float64)


@pytest.fixture(params=[ListedAnswers, SortedAnswers], ids=["listed", "sorted"])
def potential(request) -> EvaluatedPotential:
    made = EvaluatedPotential(Potential(value))
    made._answers = {final: request.param() for final in (True, False)}
    return made


def test_every_sequence_is_asked_about_once(potential, generator):
    seen = set()
    for _ in range(6):
        x0 = torch.randint(0, 3, (4, 5, 3), generator=generator)
        assert torch.equal(potential.lookahead(x0), value(x0))
        seen |= {tuple(row) for row in x0.reshape(-1, 3).tolist()}
        assert potential.num_calls == len(seen)


def test_what_was_submitted_is_answered_whatever_came_between(potential, monkeypatch):
    monkeypatch.setattr(evaluated_potential, "MAX_ROWS", 4)  # of the dictionary
    first = torch.arange(4)[:, None]
    potential.lookahead(first)
    waiting = potential.submit(torch.cat([first, first + 10]))
    for start in range(20, 60, 4):
        potential.lookahead(torch.arange(start, start + 4)[:, None])
    assert torch.equal(waiting(), value(torch.cat([first, first + 10])))


def test_a_dictionary_keeps_within_its_bytes(monkeypatch):
    monkeypatch.setattr(evaluated_potential, "MAX_BYTES", 4 * 100 * 8)
    answers = ListedAnswers()
    for start in range(0, 100, 5):
        rows = torch.arange(start, start + 5)[:, None].expand(5, 100)
        asked, settle = answers.question(rows)
        assert torch.equal(settle(value(asked)), value(rows))
        assert len(answers.known) <= 8


def test_the_way_is_chosen_by_the_first_question():
    few, many = (EvaluatedPotential(Potential(value)) for _ in range(2))
    few(torch.zeros(10, 3, dtype=torch.int64))
    many(torch.zeros(evaluated_potential.FEW + 1, 3, dtype=torch.int64))
    assert type(few._answers[True]) is ListedAnswers
    assert type(many._answers[True]) is SortedAnswers
    assert few.num_calls == many.num_calls == 1
