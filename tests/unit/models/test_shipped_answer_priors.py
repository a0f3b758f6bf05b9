"""Shipped priors over equations, grids and sentences: small, able, honest cards."""

import random

import pytest
import torch

from ppl_diffusion import models
from ppl_diffusion.models.arithmetic import RightEquation, sequences
from ppl_diffusion.models.cards import WEIGHTS
from ppl_diffusion.models.reviews import spell
from ppl_diffusion.models.sudoku import SudokuRules, filled_grid

NAMES = ("arithmetic", "sudoku", "yelp")


@pytest.fixture(scope="module", params=NAMES)
def prior(request):
    return models.load(request.param)


def known(name):
    """Return sequences that no prior was trained on, all of their kind."""
    if name == "arithmetic":
        return sequences().test[:8]
    if name == "sudoku":
        source = random.Random(7)
        return torch.tensor([filled_grid(source) for _ in range(4)])
    return torch.stack([spell("the waiter was polite and the soup was hot .")])


def test_it_is_small(prior):
    assert sum(path.stat().st_size for path in (WEIGHTS / prior.name).iterdir()) < 2_500_000


def test_it_prefers_its_kind_to_its_tokens_in_another_order(prior):
    """The bounds of the two are tens of nats apart: no false alarms."""
    source = torch.Generator().manual_seed(0)
    rows = known(prior.name)
    shuffled = rows[:, torch.randperm(prior.length, generator=source)]
    bounds = [prior.bound_terms(r, num_times=16, generator=source).mean() for r in (rows, shuffled)]
    assert float(bounds[1]) > float(bounds[0]) + 5.0


def test_both_cards_agree(prior):
    card = models.read_card(prior.name)
    text = (WEIGHTS / prior.name / "card.md").read_text(encoding="utf-8")
    for key in ("data", "licence", "training", "evaluation", "note"):
        assert card[key] in text
    for key in ("bound", "bound_error", "markov", "gain", "gain_error"):
        assert f"{card['metrics'][key]:.4f}" in text
    where = "below" if card["metrics"]["gain"] > 0 else "above"
    assert f"lies {where} that of the Markov chain" in " ".join(text.split())
    # That of sentences was trained for a quarter of its steps, and its card says what it costs.
    assert prior.name == "yelp" or where == "below"
    assert ("--data" in card["training"]) == (prior.name == "yelp"), "the others are generated"


def test_most_sums_that_it_writes_are_right():
    """Of 64 strings that begin as sums, at least half; one that cannot add would have a tenth."""
    prior = models.load("arithmetic")
    prompt = torch.full((10,), -1)
    prompt[2] = prior.vocabulary.index("+")
    chain = prior.chain(10, prompt=prompt)
    rows = chain.x0(chain.sample((64,), generator=torch.Generator().manual_seed(0)))
    assert int(RightEquation().satisfied(rows).sum()) >= 32


def test_it_finishes_a_grid():
    """With 12 cells hidden, most grids are completed without a clash."""
    prior, grids = models.load("sudoku"), known("sudoku")
    source = torch.Generator().manual_seed(0)
    hidden = torch.rand(grids.shape, generator=source).argsort(-1) < 12
    broken = []
    for grid, asked in zip(grids, hidden, strict=True):
        chain = prior.chain(12, prompt=torch.where(asked, -1, grid))
        broken.append(SudokuRules().broken(chain.x0(chain.sample((4,), generator=source))))
    assert float((torch.stack(broken) == 0).double().mean()) > 0.5
