"""Questions have right answers, every contender answers them, and words are judged as they say."""

import math
import random

import pytest
import torch
from bench import module

from ppl_diffusion.models import arithmetic, sudoku
from ppl_diffusion.models.masked import MaskedDiffusion
from ppl_diffusion.models.reviews import LENGTH, LETTERS
from ppl_diffusion.models.text_reward import TextClassifier, TextConfig

SHAPE = {"dim": 8, "depth": 1, "heads": 2, "learned_positions": True}


def program(letters, length):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MaskedDiffusion.build(letters, length, name="tiny", **SHAPE)
    made.denoiser.requires_grad_(False)
    return made


def test_questions_about_products_have_an_answer():
    for questions in module("_questions").equation_questions(8):
        hidden = questions.prompts < 0
        places = module("_questions").HIDDEN[questions.kind]
        assert hidden.all(0).nonzero()[:, 0].tolist() == sorted(places)
        rows = arithmetic.equations()
        for prompt in questions.prompts:
            fits = ((rows == prompt) | (prompt < 0)).all(-1)
            assert int(fits.sum()) >= 1
        assert questions.num_steps(0) == len(places)


def test_puzzles_have_as_many_clues_as_they_say():
    puzzles = module("_questions").sudoku_questions(2)
    for questions, clues in zip(puzzles, module("_questions").CLUES, strict=True):
        assert (questions.prompts >= 0).sum(-1).tolist() == [clues, clues]
        assert questions.num_steps(0) == -(-(81 - clues) // questions.group)
    grids = torch.tensor([sudoku.filled_grid(random.Random(0))])
    assert bool(puzzles[0].right(grids).all())


@pytest.mark.parametrize("index", range(10))
def test_every_contender_keeps_the_clues(index):
    answers, questions = module("answers"), module("_questions").equation_questions(2)[0]
    contender = answers.contenders(1)[index]
    found = answers.ask(program(arithmetic.LETTERS, 10), questions, contender, 2)
    assert found.answer.shape == (2,)
    assert bool(((found.draws >= 0) & (found.draws <= 1)).all())
    assert float(found.evaluations.max()) <= 2 * 10  # two particles, ten steps at most


def test_differences_are_paired():
    answers = module("answers")
    ones, halves = torch.ones(4).double(), torch.tensor([1.0, 0.0, 1.0, 0.0]).double()
    better, base = (answers.Answers(v, v, 8 * ones, ones) for v in (ones, halves))
    row = answers.rows_of("arithmetic", "result", "aps", better, base, 4)[0]
    assert (row.value, row.coordinates["gain"]) == (1.0, 0.5)
    assert row.coordinates["se"] == 0.0
    assert row.coordinates["gain_se"] == pytest.approx(float(halves.std()) / 2)


@pytest.mark.parametrize("index", range(8))
def test_every_way_to_steer_sentences_keeps_their_beginning(index):
    bench = module("text_reward")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        reward, judge = (TextClassifier(TextConfig(channels=4)).eval() for _ in range(2))
    prior = program(LETTERS, LENGTH)
    judges = bench.Judges(prior, reward.requires_grad_(False), judge, times=2)
    contender = bench.contenders(1)[index]
    posterior, figures = bench.steer(judges, contender, "the food was ", 2)
    texts = prior.decode(posterior.x0.flatten(0, 1))
    assert all(text.startswith("the food was ") for text in texts)
    assert set(figures) == {"reward", "judge", "bits", "distinct"}
    assert all(v.shape == (2,) and math.isfinite(float(v.sum())) for v in figures.values())
