"""Sudoku: grids that keep the rules, and the rules as a reward."""

import random

import pytest
import torch

from ppl_diffusion.models.sudoku import SudokuRules, filled_grid, pairs, units, variants


@pytest.fixture(scope="module")
def grids():
    source = random.Random(0)
    return torch.tensor([filled_grid(source) for _ in range(4)])


def test_units_hold_nine_cells_and_forbid_810_pairs():
    assert units().shape == (27, 9)
    assert torch.equal(units().flatten().bincount(), torch.full((81,), 3))
    assert int(pairs().sum()) == 2 * 810
    assert bool(pairs()[0, 10]), "(0, 0) and (1, 1) share a box"
    assert not bool(pairs()[0, 30]), "(0, 0) and (3, 3) share nothing"


def test_generated_grids_keep_the_rules(grids):
    ordered = grids[:, units()].sort(-1).values
    assert bool((ordered == torch.arange(9)).all())
    assert len(grids.unique(dim=0)) == 4


def test_symmetries_keep_the_rules_and_make_other_grids(grids):
    turned = variants(grids, 6, torch.Generator().manual_seed(0))
    assert turned.shape == (24, 81)
    assert bool((SudokuRules().broken(turned) == 0).all())
    assert len(torch.cat([grids, turned]).unique(dim=0)) == 28


def test_the_reward_counts_broken_pairs(grids):
    rules, other = SudokuRules(temperature=2.0), grids.clone()
    other[:, 40] = (other[:, 40] + 1) % 9
    assert torch.equal(rules(grids), torch.zeros(4, dtype=torch.float64))
    broken = torch.tensor(
        [sum(row[i] == row[40] for i in range(81) if pairs()[40, i]) for row in other]
    )
    assert torch.equal(rules.broken(other), broken)
    assert 2 <= int(broken.min()) <= int(broken.max()) <= 3
    torch.testing.assert_close(rules(other), -broken.double() / 2.0)


def test_between_grids_it_is_the_expected_count():
    """The sum over pairs and digits, written down."""
    laws = torch.rand(2, 81, 9, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    first, second = pairs().triu().nonzero().unbind(-1)
    expected = (laws[:, first] * laws[:, second]).sum((-2, -1))
    torch.testing.assert_close(SudokuRules().embedded(laws), -expected)


def test_the_temperature_is_positive():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        SudokuRules(0.0)
