"""What happens to sequences that a function fails on, and what tells sequences apart."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ppl_diffusion.errors import ParticleCollapse, PotentialError
from ppl_diffusion.potentials import Likelihood, Processes, Reward, SequenceFunction
from ppl_diffusion.potentials.failures import watch_failures

ROWS = torch.tensor([[0, 2], [1, 2], [2, 2], [3, 3], [2, 0]])


def picky(x0):
    """Fails in three ways, by the first token."""
    (row,) = x0.tolist()
    if row[0] == 0:
        raise RuntimeError("no A, please")
    return [math.nan] if row[0] == 1 else [] if row[0] == 3 else [float(row[1])]


class Flaky:
    """Fails the first ``failures`` times it is asked about a sequence."""

    def __init__(self, failures):
        self.failures, self.asked = failures, {}

    def __call__(self, x0):
        for row in map(tuple, x0.tolist()):
            self.asked[row] = self.asked.get(row, 0) + 1
            if self.asked[row] <= self.failures:
                raise OSError("no licence free")
        return x0[:, 0].double()


class TestCauses:
    def test_failures_are_counted_by_cause_with_the_first_words(self):
        reward = Reward(picky, on_error="reject", batch_size=1)
        with watch_failures() as watched:
            assert reward(ROWS).tolist() == [-math.inf, -math.inf, 2.0, -math.inf, 0.0]
        causes = {"raised RuntimeError": 1, "not a number": 1, "wrong answer": 1}
        assert reward.failures == causes
        told = watched.settings()["failures"]["picky"]
        assert (told["asked"], told["failed"], told["causes"]) == (5, 3, causes)
        assert told["words"] == {
            "raised RuntimeError": "RuntimeError: no A, please, on the sequence [0, 2]",
            "not a number": "it returned nan, on the sequence [1, 2]",
            "wrong answer": "it returned 0 values for 1 sequence, on the sequence [3, 3]",
        }
        assert watched.settings()["rewards"]["picky"]["failed_by_cause"] == causes

    def test_a_process_that_dies_is_a_cause_and_costs_one_sequence(self):
        def dies(x0):
            if x0[0, 0] == 1:
                os._exit(3)
            return x0[:, 0].double()

        with Processes(1) as pool:
            reward = Reward(dies, executor=pool, on_error="reject")
            assert reward(ROWS).tolist() == [0.0, -math.inf, 2.0, 3.0, 2.0]
        assert reward.failures == {"died": 1}
        assert reward.first_failure == (
            "Died: its process ended with exit code 3, on the sequence [1, 2]"
        )

    def test_sys_exit_in_a_worker_is_a_failure(self):
        def leaves(x0):
            raise SystemExit(2)

        with ThreadPoolExecutor(1) as pool:
            reward = Reward(leaves, executor=pool, on_error="reject")
            assert (reward(ROWS) == -math.inf).all()
        assert reward.failures == {"raised SystemExit": 5}


class TestValue:
    def test_failed_sequences_get_a_value_in_units_of_the_function(self):
        reward = Reward(picky, 0.5, on_error=-3.0, batch_size=1)
        assert reward(ROWS).tolist() == [-6.0, -6.0, 4.0, -6.0, 0.0]
        assert reward.num_failures == 3
        seen = Likelihood(picky, 2.0, 1.0, on_error=2, batch_size=1)
        assert seen(ROWS[:1]) == seen(ROWS[2:3])

    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            (
                math.nan,
                "picky: the value of failed sequences must be finite, got on_error=nan; "
                '"reject" gives them probability zero.',
            ),
            (
                True,
                'picky: on_error is "raise" or "reject", or a value that failed sequences get, '
                "got True.",
            ),
        ],
    )
    def test_other_policies_are_refused(self, policy, text):
        with pytest.raises(ValueError) as caught:
            Reward(picky, on_error=policy)
        assert str(caught.value) == text


class TestRetries:
    @pytest.mark.parametrize("executor", [False, True])
    def test_a_failure_is_asked_about_again(self, executor):
        flaky, pool = Flaky(2), ThreadPoolExecutor(2)
        with pool, watch_failures() as watched:
            options = {"executor": pool} if executor else {"batch_size": 1}
            function = SequenceFunction(flaky, retries=2, **options)
            assert function(ROWS).tolist() == ROWS[:, 0].tolist()
        assert set(flaky.asked.values()) == {3}
        told = watched.settings()["rewards"]["Flaky"]
        assert (told["asked"], told["retried"], told["failed"]) == (15, 10, 0)

    def test_what_fails_too_often_goes_by_the_policy(self):
        reward = Reward(Flaky(2), retries=1, on_error="reject", batch_size=1)
        assert (reward(ROWS[:2]) == -math.inf).all()
        assert reward.failures == {"raised OSError": 2}
        with pytest.raises(PotentialError, match="OSError: no licence free"):
            Reward(Flaky(2), retries=1)(ROWS[:2])

    def test_values_that_are_no_numbers_are_asked_for_again(self):
        asked = []

        def sometimes(x0):
            asked.extend(x0[:, 0].tolist())
            return [math.nan if asked.count(row) < 2 and row < 2 else row for row in asked][
                -len(x0) :
            ]

        assert Reward(sometimes, retries=1)(ROWS[:4]).tolist() == [0.0, 1.0, 2.0, 3.0]
        assert sorted(asked) == [0, 0, 1, 1, 2, 3]


class TestKeys:
    def test_sequences_of_one_key_are_asked_about_once(self):
        asked = []

        def record(x0):
            asked.extend(x0.tolist())
            return x0.sum(-1)

        reward = Reward(
            record, key=lambda rows: ["".join(map(str, sorted(r))) for r in rows.tolist()]
        )
        found = reward(torch.tensor([[1, 2], [2, 1], [3, 0], [0, 3], [1, 2]]))
        assert found.tolist() == [3.0] * 5
        assert len(asked) == reward.num_calls == reward.num_sequences == 2
        reward(torch.tensor([[2, 1]]))
        assert len(asked) == 2

    @pytest.mark.parametrize(
        ("key", "text"),
        [
            (
                lambda rows: ["a"],
                "total: the key returned 1 values for 5 sequences; return a text or bytes for "
                "each.",
            ),
            (
                lambda rows: [1] * len(rows),
                "total: the key returned an object of type int for 5 sequences; return a text or "
                "bytes for each.",
            ),
            (
                lambda rows: rows.no_such_thing,
                "total: the key raised AttributeError ('Tensor' object has no attribute "
                "'no_such_thing') when asked about 5 sequences; return a text or bytes for each.",
            ),
        ],
    )
    def test_a_wrong_key_is_one_sentence(self, key, text):
        with pytest.raises(PotentialError) as caught:
            Reward(lambda x0: x0.sum(-1), key=key, name="total")(ROWS)
        assert str(caught.value) == text


class TestAllFailed:
    WORDS = (
        "broken failed on all 5 sequences that it was asked about (raised ValueError: 5; first "
        "ValueError: no key, on the sequence "
    )

    @staticmethod
    def broken(x0):
        raise ValueError("no key")

    @pytest.mark.parametrize("policy", ["reject", -1.0])
    def test_it_is_an_error_of_the_run(self, policy):
        reward = Reward(self.broken, on_error=policy)

        def run():
            with watch_failures():
                reward(ROWS)

        with pytest.raises(PotentialError) as caught:
            run()
        assert str(caught.value).startswith(self.WORDS)

    def test_it_takes_the_place_of_a_collapse(self):
        def run(rows):
            with watch_failures():
                reward(rows)
                raise ParticleCollapse("all particles died")

        reward = Reward(self.broken, on_error="reject")
        with pytest.raises(PotentialError, match="broken failed on all 5 sequences"):
            run(ROWS)
        reward = Reward(picky, on_error="reject")
        with pytest.raises(ParticleCollapse):
            run(ROWS)

    def test_a_run_of_smc_says_so(self):
        from ppl_diffusion.inference import SMC
        from ppl_diffusion.testing.toys import toy_chain

        reward = Reward(self.broken, on_error="reject")
        with pytest.raises(PotentialError, match=r"^broken failed on all \d+ sequences"):
            SMC(toy_chain("uniform"), reward, num_particles=8).run(seed=0)
