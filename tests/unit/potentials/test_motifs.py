"""Motif matrices against plain Python, and their files."""

import math
from itertools import chain

import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import MotifMatrix
from ppl_diffusion.testing.potential_contract import PotentialContract

WIDTH = 5


def sequences(count=50, length=14, seed=0):
    return torch.randint(4, (count, length), generator=torch.Generator().manual_seed(seed))


def log_odds(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, 4, generator=generator, dtype=torch.float64)


def plain_scores(row, matrix, both_strands):
    """All scores of one sequence, strand by strand, by definition."""
    windows = [row[i : i + WIDTH] for i in range(len(row) - WIDTH + 1)]
    reverse = [[3 - base for base in reversed(window)] for window in windows]
    strands = [windows, reverse][: 1 + both_strands]
    return [
        [sum(float(matrix[i][b]) for i, b in enumerate(window)) for window in strand]
        for strand in strands
    ]


class TestBestHitContract(PotentialContract):
    tolerance = 1e-12

    def make_potential(self):
        return MotifMatrix(log_odds())

    def make_sequences(self):
        return sequences()


class TestAverageContract(TestBestHitContract):
    def make_potential(self):
        return MotifMatrix(log_odds(), reduce="logmeanexp", both_strands=False)


@pytest.mark.parametrize("both_strands", [False, True])
class TestScan:
    def test_scores_by_definition(self, both_strands):
        x0, matrix = sequences(), log_odds()
        expected = [plain_scores(row, matrix, both_strands) for row in x0.tolist()]
        actual = MotifMatrix(matrix, both_strands=both_strands).scores(x0)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))

    def test_reductions_by_definition(self, both_strands):
        x0, matrix = sequences(), log_odds()
        flat = [[*chain(*plain_scores(row, matrix, both_strands))] for row in x0.tolist()]
        best = torch.tensor([max(scores) for scores in flat], dtype=torch.float64)
        average = [math.log(sum(map(math.exp, scores)) / len(scores)) for scores in flat]
        averaged = MotifMatrix(matrix, both_strands=both_strands, reduce="logmeanexp")
        torch.testing.assert_close(MotifMatrix(matrix, both_strands=both_strands)(x0), best)
        torch.testing.assert_close(averaged(x0), torch.tensor(average, dtype=torch.float64))


def test_the_reverse_complement_scores_the_same_on_both_strands():
    x0 = sequences()
    motif = MotifMatrix(log_odds())
    torch.testing.assert_close(motif(x0), motif((3 - x0).flip(-1)))


def test_the_best_hit_is_where_the_motif_was_put():
    matrix = torch.full((3, 4), -1.0)
    matrix[0, 2] = matrix[1, 0] = matrix[2, 1] = 1.0  # GAC; on the other strand GTC
    x0 = torch.tensor([[0, 0, 2, 0, 1, 0], [2, 3, 1, 0, 0, 0]])
    score, position, strand = MotifMatrix(matrix).best_hit(x0)
    assert (score.tolist(), position.tolist(), strand.tolist()) == ([3, 3], [2, 0], [0, 1])


def test_the_average_of_exact_odds_is_one_under_the_background():
    # E_background[mean odds] = 1: the one-occurrence model is normalised (all 4^5 sequences).
    p = log_odds().softmax(-1)
    motif = MotifMatrix.from_probabilities(p, pseudocount=1e-9, reduce="logmeanexp")
    x0 = torch.cartesian_prod(*[torch.arange(4)] * 6)
    assert motif(x0).exp().mean() == pytest.approx(1.0, abs=1e-6)


def test_pseudo_counts_follow_the_formula():
    background = (0.3, 0.2, 0.2, 0.3)
    motif = MotifMatrix.from_probabilities(
        [[1, 0, 0, 0]], sites=9, pseudocount=1, background=background
    )
    b = torch.tensor(background, dtype=torch.float64)
    smoothed = (9 * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64) + b) / 10
    torch.testing.assert_close(motif.log_odds[0], (smoothed / b).log())


def test_rows_of_two_decimals_are_brought_to_one():
    rounded = MotifMatrix.from_probabilities([[0.33, 0.33, 0.33, 0.0], [0.34, 0.34, 0.33, 0.01]])
    exact = MotifMatrix.from_probabilities(
        [[1 / 3, 1 / 3, 1 / 3, 0.0], [0.34 / 1.02, 0.34 / 1.02, 0.33 / 1.02, 0.01 / 1.02]]
    )
    torch.testing.assert_close(rounded.log_odds, exact.log_odds)


def test_other_vocabularies_are_translated():
    x0, matrix = sequences(), log_odds()
    order = torch.tensor(["TG-CA".index(base) for base in "ACGT"])
    translated = MotifMatrix(matrix, vocabulary="TG-CA")
    torch.testing.assert_close(translated(order[x0]), MotifMatrix(matrix)(x0))
    gap = torch.full((WIDTH,), 2)
    assert translated(gap) == pytest.approx(WIDTH * float(matrix.min()))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: MotifMatrix(torch.zeros(3, 5)), "one row of 4 numbers"),
        (lambda: MotifMatrix(torch.zeros(0, 4)), "one row of 4 numbers"),
        (lambda: MotifMatrix([[0, 0, 0, -math.inf]]), "the matrix must be finite"),
        (lambda: MotifMatrix(torch.zeros(3, 4), reduce="sum"), 'reduce is "max" or "logmeanexp"'),
        (lambda: MotifMatrix.from_probabilities([[0.5, 0.5, 0.5, 0]]), "row 0 sums to 1.5"),
        (lambda: MotifMatrix.from_probabilities([[1.5, -0.5, 0, 0]]), "probabilities"),
        (lambda: MotifMatrix.from_probabilities([[1, 0, 0, 0]], pseudocount=0), "must be positive"),
        (lambda: MotifMatrix.from_probabilities([[1, 0, 0, 0]], background=(1, 0, 0, 0)), "backg"),
    ],
)
def test_bad_matrices_are_one_sentence(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_sequences_shorter_than_the_motif_are_an_error():
    with pytest.raises(PotentialError, match="needs sequences of at least 5 tokens, got length 4"):
        MotifMatrix(log_odds())(torch.zeros(4, dtype=torch.int64))
