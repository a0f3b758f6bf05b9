"""Rewards: duplicates, caches, failures, executors."""

import functools
import itertools
import math
import multiprocessing
import re
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import Likelihood, Reward, SequenceFunction
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.testing.potential_contract import PotentialContract


def sequences(count=24, length=6, seed=0):
    return torch.randint(4, (count, length), generator=torch.Generator().manual_seed(seed))


def count_g(x0):
    return (x0 == 2).sum(-1)


def fail_on_leading_a(x0):
    if bool((x0[:, 0] == 0).any()):
        raise RuntimeError("no A, please")
    return count_g(x0)


class Recorder:
    """Counts G and remembers what it was asked."""

    def __init__(self):
        self.batches = []

    def __call__(self, x0):
        self.batches.append(x0.tolist())
        return count_g(x0)

    @property
    def rows(self):
        return [tuple(row) for batch in self.batches for row in batch]


class HangsOnLeadingA(Executor):
    """Answers at once, except that sequences beginning with A keep a worker busy for ever."""

    def __init__(self, workers=3):
        self.free = workers
        self.queue = []

    def submit(self, fn, rows):
        future = Future()
        if not self.free:
            self.queue.append(future)
        elif rows[0, 0] == 0:
            future.set_running_or_notify_cancel()
            self.free -= 1
        else:
            future.set_result(fn(rows))
        return future


class TestRewardContract(PotentialContract):
    def make_potential(self):
        return Reward(count_g, temperature=0.5)

    def make_sequences(self):
        return sequences()


class TestRejectingRewardContract(PotentialContract):
    def make_potential(self):
        return Reward(fail_on_leading_a, on_error="reject", batch_size=5)

    def make_sequences(self):
        return sequences()


class TestLikelihoodContract(PotentialContract):
    def make_potential(self):
        return Likelihood(count_g, observed=2.0, sd=0.3)

    def make_sequences(self):
        return sequences()


@pytest.mark.parametrize("maximise", [True, False])
def test_reward_divides_by_the_temperature(maximise):
    x0 = sequences()
    expected = count_g(x0).double() / 0.25 * (1 if maximise else -1)
    assert torch.equal(Reward(count_g, 0.25, maximise=maximise)(x0), expected)


def test_likelihood_is_the_gaussian_density():
    x0 = sequences()
    expected = stats.norm(1.5, 0.7).logpdf(count_g(x0).numpy())
    actual = Likelihood(count_g, 1.5, 0.7)(x0)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "as_type",
    [
        lambda v: v,
        lambda v: v.float(),
        lambda v: v.bfloat16(),
        lambda v: v.tolist(),
        lambda v: list(v),
        lambda v: v.numpy(),
        lambda v: v.numpy().astype(object),
        lambda v: pd.Series(v.numpy(), index=range(100, 100 + len(v))),
        lambda v: map(Decimal, v.tolist()),
        lambda v: (np.float32(value) for value in v.tolist()),
    ],
)
def test_rewards_may_return_tensors_lists_arrays_series_and_generators(as_type):
    x0 = sequences()
    assert torch.equal(Reward(lambda x: as_type(count_g(x)))(x0), count_g(x0).double())


def test_gradients_of_a_reward_are_dropped():
    weight = torch.ones(1, requires_grad=True)
    assert not Reward(lambda x: count_g(x) * weight)(sequences()).requires_grad


class TestCache:
    def test_each_distinct_sequence_is_evaluated_once(self):
        record = Recorder()
        reward = Reward(record)
        x0 = sequences(count=40, length=2)
        reward(torch.cat([x0, x0]))
        reward(x0.reshape(2, 20, 2))
        assert sorted(record.rows) == sorted(set(map(tuple, x0.tolist())))
        assert reward.num_calls == len(record.rows)

    def test_sequences_of_different_length_are_different(self):
        reward = Reward(count_g)
        assert reward(torch.tensor([2, 2])) == 2
        assert reward(torch.tensor([2, 2, 2])) == 3

    def test_the_least_recently_used_value_is_dropped(self):
        record = Recorder()
        reward = Reward(record, cache_size=2)
        a, b, c = (torch.tensor([i, 0]) for i in range(3))
        for x0 in (a, b, a, c):  # c displaces b, which was used less recently than a
            reward(x0)
        reward(a)
        assert len(record.rows) == 3
        reward(b)
        assert len(record.rows) == 4

    def test_a_batch_larger_than_the_cache_is_answered_in_full(self):
        x0 = sequences(count=30)
        assert torch.equal(Reward(count_g, cache_size=1)(x0), count_g(x0).double())

    def test_clear_forgets(self):
        function = SequenceFunction(count_g)
        function(sequences(count=1))
        function.clear()
        function(sequences(count=1))
        assert function.num_calls == 2

    def test_batches_are_split(self):
        record = Recorder()
        Reward(record, batch_size=7)(torch.arange(4).repeat(20, 5) + torch.arange(20)[:, None])
        assert [len(batch) for batch in record.batches] == [7, 7, 6]


class TestFailures:
    def test_the_error_names_the_sequence_and_the_cause(self):
        with pytest.raises(PotentialError) as caught:
            Reward(fail_on_leading_a)(torch.tensor([[1, 2], [0, 3]]))
        assert str(caught.value) == (
            "fail_on_leading_a failed on the sequence [0, 3] (RuntimeError: no A, please); mend "
            'the function, or pass on_error="reject" to give such sequences probability zero.'
        )
        assert isinstance(caught.value.__cause__, RuntimeError)

    def test_values_finished_before_an_error_are_kept(self):
        reward = Reward(fail_on_leading_a, batch_size=1)
        good, bad = torch.tensor([[1, 2], [2, 2]]), torch.tensor([[0, 2]])
        reward(good)
        with pytest.raises(PotentialError):
            reward(bad)
        calls = reward.num_calls
        assert torch.equal(reward(good), torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert reward.num_calls == calls

    def test_good_sequences_of_a_failed_batch_are_kept(self):
        reward = Reward(lambda x: [math.nan if row[0] == 0 else 1.0 for row in x.tolist()])
        with pytest.raises(PotentialError, match="returned nan"):
            reward(torch.tensor([[0, 1], [1, 1], [2, 1]]))
        calls = reward.num_calls
        reward(torch.tensor([[1, 1], [2, 1]]))
        assert reward.num_calls == calls

    def test_rejected_sequences_get_minus_infinity_and_are_counted_once(self):
        reward = Reward(fail_on_leading_a, on_error="reject")
        x0 = torch.tensor([[0, 2], [1, 2], [0, 3], [2, 2], [0, 2]])
        expected = torch.tensor([-math.inf, 1.0, -math.inf, 2.0, -math.inf], dtype=torch.float64)
        assert torch.equal(reward(x0), expected)
        assert torch.equal(reward(x0), expected)
        assert reward.num_failures == 2

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_and_infinity_are_failures(self, value):
        def broken(x0):
            return torch.full((len(x0),), value)

        with pytest.raises(PotentialError, match=f"it returned {value}"):
            Reward(broken)(sequences(2))
        assert (Reward(broken, on_error="reject")(sequences(2)) == -math.inf).all()

    @pytest.mark.parametrize("maximise", [True, False])
    def test_an_impossible_sequence_is_no_failure(self, maximise):
        worst = -math.inf if maximise else math.inf
        reward = Reward(lambda x: torch.full((len(x),), worst), maximise=maximise)
        assert (reward(sequences(2)) == -math.inf).all()
        assert reward.num_failures == 0

    def test_an_infinite_prediction_is_a_failure(self):
        with pytest.raises(PotentialError, match="it returned -inf"):
            Likelihood(lambda x: torch.full((len(x),), -math.inf), 0.0, 1.0)(sequences(2))

    def test_the_lookahead_replaces_exclusions_only(self):
        low = Reward(lambda x: torch.where(x[:, 0] == 0, -math.inf, -500.0))
        assert low.lookahead(torch.tensor([[0, 1], [1, 1]])).tolist() == [FORBIDDEN_GUESS, -500.0]


ROWS = torch.tensor([[0, 2], [1, 2], [2, 2], [3, 3]])
NO_NUMBERS = {
    "None": (None, "it returned None"),
    "text": ("-7.1", "it returned the text '-7.1'"),
    "long text": ("clash " * 20, r"it returned the text 'clash .*\.\.\."),
    "bytes": (b"1", "it returned an object of type bytes"),
    "object": (object(), "it returned an object of type object"),
    "dictionary": ({"score": 1.0}, "it returned an object of type dict"),
    "nested list": ([1.0], "it returned an object of type list"),
    "nested array": (np.ones(1), "it returned an object of type ndarray"),
    "nested tensor": (torch.ones(1), "it returned an object of type Tensor"),
    "complex": (1j, "it returned an object of type complex"),
    "date": (np.datetime64("2026-01-01"), "it returned an object of type date"),
    "pandas NA": (pd.NA, "it returned an object of type NAType"),
    "huge": (10**400, "it returned an object of type int, which is no number: int too large"),
    "NaN": (math.nan, "it returned nan"),
    "infinity": (math.inf, "it returned inf"),
}
WRONG_ANSWERS = {
    "nothing": (lambda x: None, "it returned None for 1 sequence"),
    "text": (lambda x: "ok", "it returned the text 'ok' for 1 sequence"),
    "one number": (lambda x: 3.0, "it returned an object of type float for 1 sequence"),
    "scalar": (lambda x: torch.tensor(3.0), r"it returned shape \(\) for 1 sequence"),
    "column": (lambda x: torch.zeros(len(x), 1), r"it returned shape \(1, 1\) for 1 sequence"),
    "frame": (lambda x: pd.DataFrame({"a": x[:, 0]}), r"it returned shape \(1, 1\)"),
    "dictionary": (lambda x: dict.fromkeys(range(len(x)), 1.0), "it returned an object of type di"),
    "set": (lambda x: {1.0}, "it returned an object of type set for 1 sequence"),
    "dates": (lambda x: np.zeros(len(x), "datetime64[ns]"), "it returned an object of type ndarr"),
    "too few": (lambda x: [], "it returned 0 values for 1 sequence"),
    "endless": (lambda x: itertools.count(), "it returned more than 1 values for 1 sequence"),
    "broken": (lambda x: (1 / 0 for _ in x), "ZeroDivisionError: division by zero"),
}
HOW = {"all at once": {}, "batches": {"batch_size": 2}, "one by one": {"batch_size": 1}}


@pytest.fixture(params=[*HOW, "executor", "batches in an executor"])
def how(request):
    """Options for every way of calling a function."""
    if request.param in HOW:
        yield HOW[request.param]
        return
    with ThreadPoolExecutor(2) as pool:
        yield {"executor": pool, "batch_size": 2 if "batches" in request.param else None}


class TestAnswersThatAreNoNumbers:
    """They go the way of exceptions: one error, or a counted rejection with its reason."""

    @pytest.mark.parametrize("kind", NO_NUMBERS)
    def test_one_of_them_spoils_its_own_sequence_only(self, kind, how):
        value, reason = NO_NUMBERS[kind]

        def dock(x):
            return [value if row[0] == 2 else float(row[0]) for row in x.tolist()]

        reward = Reward(dock, on_error="reject", **how)
        assert reward(ROWS).tolist() == reward(ROWS).tolist() == [0.0, 1.0, -math.inf, 3.0]
        assert (reward.num_sequences, reward.num_failures, reward.num_calls) == (4, 1, 4)
        assert re.search(reason, reward.first_failure)
        assert reward.first_failure.endswith(", on the sequence [2, 2]")
        with pytest.raises(PotentialError, match=rf"dock failed on .*\[2, 2\] \({reason}"):
            Reward(dock, **how)(ROWS)

    @pytest.mark.parametrize("kind", WRONG_ANSWERS)
    def test_an_answer_for_no_sequence_rejects_each(self, kind, how):
        answer, reason = WRONG_ANSWERS[kind]
        reward = Reward(answer, on_error="reject", **how)
        assert (reward(ROWS) == -math.inf).all()
        assert reward.num_failures == reward.num_sequences == 4
        assert re.search(reason, reward.first_failure)
        with pytest.raises(PotentialError, match=reason):
            Reward(answer, **how)(ROWS)

    def test_a_function_that_leaves_failures_out_loses_only_those(self, how):
        reward = Reward(
            lambda x: [float(row[0]) for row in x if row[0] != 2], on_error="reject", **how
        )
        assert reward(ROWS).tolist() == [0.0, 1.0, -math.inf, 3.0]
        assert reward.num_failures == 1

    def test_a_prediction_goes_the_same_way(self, how):
        prediction = Likelihood(
            lambda x: [None if row[0] == 2 else 0.0 for row in x],
            0.0,
            1.0,
            on_error="reject",
            **how,
        )
        assert prediction(ROWS).isfinite().tolist() == [True, True, False, True]
        assert prediction.first_failure == "it returned None, on the sequence [2, 2]"


class TestExecutor:
    def test_values_do_not_depend_on_the_executor(self):
        x0 = sequences(count=50)
        with ThreadPoolExecutor(3) as pool:
            reward = Reward(count_g, executor=pool, batch_size=4)
            assert torch.equal(reward(x0), count_g(x0).double())

    @pytest.mark.slow
    def test_functions_run_in_other_processes(self):
        total = functools.partial(torch.sum, dim=-1)  # importable in the new process, unlike tests
        x0 = sequences(count=6)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert torch.equal(Reward(total, executor=pool)(x0), x0.sum(-1).double())

    def test_a_broken_executor_is_an_error_not_a_rejection(self):
        def dies(x0):
            raise BrokenExecutor("a worker died")

        with ThreadPoolExecutor(1) as pool:
            reward = Reward(dies, executor=pool, on_error="reject")
            with pytest.raises(PotentialError, match=r"dies lost its executor \(a worker died\)"):
                reward(sequences(count=2))

    def test_failures_are_found_one_by_one(self):
        x0 = torch.tensor([[0, 2], [1, 2], [2, 2]])
        with ThreadPoolExecutor(2) as pool:
            reward = Reward(fail_on_leading_a, executor=pool, batch_size=3, on_error="reject")
            assert reward(x0).tolist() == [-math.inf, 1.0, 2.0]

    def test_a_call_that_hangs_is_given_up_and_the_rest_is_kept(self):
        x0 = torch.tensor([[0, 2], [1, 2], [2, 2]])
        options = {"executor": HangsOnLeadingA(), "timeout": 0.01}
        rejecting = Reward(count_g, on_error="reject", **options)
        assert rejecting(x0).tolist() == [-math.inf, 1.0, 2.0]
        raising = Reward(count_g, **options)
        with pytest.raises(PotentialError, match=r"\[0, 2\] \(GaveUp: no answer within 0\.01 s\)"):
            raising(x0)
        calls = raising.num_calls
        assert raising(x0[1:]).tolist() == [1.0, 2.0]
        assert raising.num_calls == calls

    def test_an_exhausted_pool_is_an_error_not_a_rejection(self):
        executor = HangsOnLeadingA(workers=1)
        reward = Reward(count_g, executor=executor, timeout=0.01, on_error="reject")
        with pytest.raises(PotentialError, match="left no worker free: 2 sequences"):
            reward(torch.tensor([[0, 1], [0, 2], [0, 3]]))
        assert all(future.cancelled() for future in executor.queue)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0.0}, "temperature must be a positive, finite number, got 0.0"),
        ({"temperature": math.nan}, "temperature must be a positive"),
        ({"timeout": 3.0}, "timeout needs an executor"),
        ({"on_error": "ignore"}, 'on_error is "raise" or "reject"'),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, at least 1, got 2.5"),
        ({"cache_size": "all"}, "cache_size must be a whole number, at least 1, got 'all'"),
        ({"num_workers": 2}, "num_workers=2 needs the executor they work in"),
    ],
)
def test_bad_options_are_one_sentence(options, text):
    with pytest.raises(ValueError, match=text):
        Reward(count_g, **options)


def test_an_executor_takes_calls():
    with pytest.raises(TypeError, match=r"count_g: an executor has a method submit.* got int"):
        Reward(count_g, executor=3)


def test_a_reward_must_be_callable():
    with pytest.raises(TypeError, match="fn must be callable, got float"):
        Reward(3.0)


@pytest.mark.parametrize(("observed", "sd"), [(math.inf, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_a_likelihood_needs_a_finite_observation_and_a_positive_sd(observed, sd):
    with pytest.raises(ValueError, match=r"count_g: (observed|sd) must be"):
        Likelihood(count_g, observed, sd)
