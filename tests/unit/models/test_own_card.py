"""The card of a prior of one's own: its errors and its words."""

import math

import pytest
import torch

from ppl_diffusion.models.own_card import Held, bound_table, card_text, times_of

METRICS = {
    "sequences": 3, "families": 2, "tokens": 4.0, "times": 32, "bound": 8.0, "bound_error": 0.5,
    "markov": [10.0, 9.0, 9.5], "best_order": 1, "gain": 1.0, "gain_error": 0.25,
    "given_label": None,
}  # fmt: skip


def held(values, family, weights=None):
    ones = torch.ones(len(values), dtype=torch.float64)
    return Held(
        bound=torch.tensor(values, dtype=torch.float64),
        times=32,
        orders=torch.zeros(7, len(values)),
        best=0,
        family=torch.tensor(family),
        weights=ones if weights is None else torch.tensor(weights, dtype=torch.float64),
        tokens=1.0,
        given_label=math.nan,
        expected=0.0,
    )


def test_rows_of_their_own_have_the_usual_error():
    values = [1.0, 2.0, 4.0, 9.0]
    found = held(values, [0, 1, 2, 3])
    usual = torch.tensor(values, dtype=torch.float64).std() / 2.0
    assert found.error(found.bound) == pytest.approx(float(usual))


def test_copies_in_a_family_tell_nothing_new():
    once = held([1.0, 2.0, 4.0], [0, 1, 2])
    copied = held([1.0, 2.0, 4.0] * 5, [0, 1, 2] * 5)
    assert copied.error(copied.bound) == pytest.approx(once.error(once.bound))


def test_weights_count_like_copies():
    weighted = held([1.0, 4.0], [0, 1], weights=[1.5, 0.5])
    copied = held([1.0, 1.0, 1.0, 4.0], [0, 0, 0, 1])
    assert weighted.mean(weighted.bound) == pytest.approx(copied.mean(copied.bound))
    assert weighted.error(weighted.bound) == pytest.approx(copied.error(copied.bound))


def test_short_rows_are_bounded_at_more_times():
    assert [times_of(length) for length in (1, 4, 16, 50, 1000)] == [256, 256, 64, 32, 32]


def test_the_table_of_bounds():
    assert bound_table(METRICS) == (
        "| | bits per sequence | bits per token |\n"
        "| --- | ---: | ---: |\n"
        "| bound, 32 times a sequence | ≤ 8.000 ± 0.500 | ≤ 2.0000 |\n"
        "| Markov chain of order 0 | 10.000 | 2.5000 |\n"
        "| Markov chain of order 1 (best on validation rows) | 9.000 | 2.2500 |\n"
        "| Markov chain of order 2 | 9.500 | 2.3750 |\n"
        "| gain over the best chain (paired) | +1.000 ± 0.250 | +0.2500 |"
    )
    assert "| bound given the label | ≤ 7.500 | |" in bound_table({**METRICS, "given_label": 7.5})


def test_the_page_says_what_was_left_out_and_chosen():
    data = {
        "source": "own.smi", "noun": "molecules as SMILES", "alphabet": "smiles", "symbols": 12,
        "rows": 30, "dropped": {"too long": 2}, "first_dropped": {"too long": "own.smi, line 3: 99 "
        "tokens."}, "classes": ["a", "b"], "shortest": 2, "longest": 8, "split": "families by x",
        "sizes": {"train": 24, "valid": 3, "test": 3}, "test_rows_in_train": 0.0,
    }  # fmt: skip
    samples = {"number": 500, "shown": ["CC"], "in_train": 0.25, "different": 0.9, "valid": 0.8,
               "expected_in_train": 0.125}  # fmt: skip
    recipe = {"shape": {"dim": 64}, "batch_size": 16, "learning_rate": 0.002}
    run = {"command": "ppl-diffusion train own.smi", "recipe": recipe, "steps": 90,
           "best_step": 80, "seconds": 61.2}  # fmt: skip
    card = {"name": "own", "family": "masked", "data": data, "metrics": METRICS}
    page = card_text({**card, "samples": samples, "run": run})
    for line in (
        "- Rows: 30 (24 train, 3 valid, 3 test); 0.0% of the test rows are also training rows",
        "- Left out, too long: 2 rows. The first: own.smi, line 3: 99 tokens.",
        "- Classes: a, b",
        "- Lengths: 2 to 8 tokens",
        "- Optimisation: 90 steps of 16 rows, learning rate 0.002; best at step 80",
        "    CC",
    ):
        assert line in page.splitlines()
    assert (
        "90.0% are different, and 80.0% are molecules; of draws from the best chain\n12.5%" in page
    )
