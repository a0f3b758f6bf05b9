"""Calls beside the sampler: what is started early, how it is split, and what is told of it."""

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import Potential, Reward, SequenceFunction, Threads
from ppl_diffusion.potentials.calls import guided_sizes
from ppl_diffusion.potentials.failures import watch_failures
from ppl_diffusion.potentials.workers import Times, workers_of
from ppl_diffusion.smc.evaluated_potential import EvaluatedPotential


def sequences(count, seed=0):
    return torch.randint(4, (count, 6), generator=torch.Generator().manual_seed(seed))


def count_g(x0):
    return (x0 == 2).sum(-1)


class Later(Executor):
    """Does its work when it is told to."""

    def __init__(self):
        self.work = []

    def submit(self, fn, rows):
        future = Future()
        self.work.append((future, fn, rows))
        return future

    def catch_up(self):
        for future, fn, rows in self.work:
            if future.set_running_or_notify_cancel():
                future.set_result(fn(rows))
        self.work = []


class TestPrefetch:
    def test_nothing_under_way_is_asked_again(self):
        later = Later()
        function = SequenceFunction(count_g, executor=later)
        x0 = sequences(9)
        function.prefetch(x0[:6])
        function.prefetch(x0[3:])
        function.prefetch(x0)
        assert [len(rows) for _, _, rows in later.work] == [1] * 9
        later.catch_up()
        assert torch.equal(function(x0), count_g(x0).double())
        assert function.num_calls == function.num_sequences == 9
        assert not later.work

    def test_what_was_prefetched_for_others_is_kept(self):
        later = Later()
        function = SequenceFunction(count_g, executor=later, batch_size=4)
        x0 = sequences(8)
        function.prefetch(x0)
        later.catch_up()
        assert torch.equal(function(x0[:3]), count_g(x0[:3]).double())
        assert torch.equal(function(x0[3:]), count_g(x0[3:]).double())
        assert function.num_calls == 8

    @pytest.mark.parametrize("batch_size", [None, 3])
    def test_failures_go_the_usual_way(self, batch_size):
        def dock(x0):
            if bool((x0[:, 0] == 0).any()):
                raise RuntimeError("no A, please")
            return count_g(x0)

        x0 = torch.tensor([[0, 2], [1, 2], [2, 2]])
        with ThreadPoolExecutor(2) as pool:
            options = {"executor": pool, "batch_size": batch_size}
            reward = Reward(dock, on_error="reject", **options)
            reward.prefetch(x0)
            assert reward(x0).tolist() == [-torch.inf, 1.0, 2.0]
            reward = Reward(dock, **options)
            reward.prefetch(x0)
            with pytest.raises(PotentialError, match="no A, please"):
                reward(x0)

    def test_composites_pass_it_on(self):
        later = Later()
        potential = Reward(count_g, executor=later) * 2.0 + Potential(lambda x: x[..., 0] * 1.0)
        potential.prefetch(sequences(5))
        assert len(later.work) == 5

    def test_without_an_executor_nothing_is_started(self):
        asked = []
        Reward(lambda x0: asked.append(x0)).prefetch(sequences(5))
        assert not asked

    def test_what_nobody_collects_is_cancelled_with_the_run(self):
        later = Later()
        function = SequenceFunction(count_g, executor=later)
        with watch_failures():
            function.prefetch(sequences(5))
            futures = [future for future, _, _ in later.work]
        assert all(future.cancelled() for future in futures)
        again = SequenceFunction(count_g)
        function.executor.catch_up()
        with ThreadPoolExecutor(1) as pool:
            function._calls.executor = pool
            assert torch.equal(function(sequences(5)), again(sequences(5)))

    def test_an_error_cancels_what_is_queued(self):
        started, over = threading.Event(), threading.Event()

        def dies(x0):
            if started.is_set():  # the next one keeps the only worker until the error is told
                over.wait(60)
            started.set()
            raise RuntimeError("gone")

        class Counting(ThreadPoolExecutor):
            futures: list[Future] = []  # noqa: RUF012

            def submit(self, *args):
                self.futures.append(super().submit(*args))
                return self.futures[-1]

        with Counting(1) as pool:
            with pytest.raises(PotentialError, match="gone"):
                Reward(dies, executor=pool, batch_size=1)(sequences(50))
            over.set()
        assert sum(future.cancelled() for future in pool.futures) > 0


class TestSizes:
    @pytest.mark.parametrize("count", [0, 1, 7, 100, 4096])
    @pytest.mark.parametrize("workers", [1, 4, 16])
    def test_they_add_up_and_shrink(self, count, workers):
        sizes = guided_sizes(count, workers)
        assert sum(sizes) == count
        assert sizes == sorted(sizes, reverse=True)
        assert all(size >= 1 for size in sizes)
        # None of them keeps a worker busy for more than a quarter of its share.
        assert max(sizes, default=0) <= max(1, count / workers / 4)
        assert len(sizes) < 4 * workers * 12 + count // 100

    @pytest.mark.parametrize(
        ("options", "largest"),
        [
            ({}, 25),
            ({"batch_size": 7}, 7),
            ({"on_error": "reject"}, 1),
            ({"timeout": 60.0}, 1),
            ({"num_workers": 5}, 10),
        ],
    )
    def test_failures_that_are_expected_are_asked_for_alone(self, options, largest):
        sizes = []

        def record(x0):
            sizes.append(len(x0))
            return count_g(x0)

        x0 = torch.arange(200)[:, None]
        with ThreadPoolExecutor(2) as pool:
            Reward(record, executor=pool, **options)(x0)
        assert max(sizes) == largest

    def test_an_executor_that_does_not_say_gets_one_at_a_time(self):
        assert workers_of(Later()) is None
        later = Later()
        SequenceFunction(count_g, executor=later).prefetch(sequences(9))
        assert len(later.work) == 9
        SequenceFunction(count_g, executor=later, num_workers=1).prefetch(sequences(9))
        assert len(later.work) < 18


class TestTold:
    def test_shares_are_of_the_time_under_way(self):
        times = Times(busy=6.0, under_way=4.0, waited=1.0)
        told = times.told(2)
        shares = {"utilisation": 0.75, "overlap": 0.75}
        assert told == {"seconds": 6.0, "under_way": 4.0, **shares}
        assert times.told(None)["utilisation"] is None
        shares = {"utilisation": None, "overlap": None}
        assert Times().told(2) == {"seconds": 0.0, "under_way": 0.0, **shares}
        assert times.since(Times(1.0, 1.0, 1.0)) == Times(5.0, 3.0, 0.0)

    def test_a_run_tells_what_its_workers_did(self):
        x0 = sequences(9)
        with ThreadPoolExecutor(2) as pool:
            function = SequenceFunction(count_g, executor=pool)
            function(x0[:4])  # before anybody watched
            with watch_failures() as watched:
                function(x0)
                function(x0)
        (told,) = watched.settings()["rewards"].values()
        assert (told["asked"], told["cached"], told["failed"]) == (5, 4 + 9, 0)
        assert 0 < told["utilisation"] <= 1
        assert 0 <= told["overlap"] <= 1
        assert told["seconds"] > 0

    def test_functions_of_one_name_are_told_apart(self):
        def docking(target):
            def dock(x0):
                if (x0[:, 0] == target).any():
                    raise ValueError("no site")
                return count_g(x0)

            return dock

        first, second = docking(0), docking(-1)
        x0 = torch.arange(8).remainder(4)[:, None].expand(-1, 3) + torch.arange(8)[:, None] // 4
        options = {"on_error": "reject", "batch_size": 1}
        with ThreadPoolExecutor(2) as pool, watch_failures() as watched:
            Reward(first, executor=pool, **options)(x0)
            Reward(second, executor=pool, **options)(x0[:3])
            Reward(first, 0.5, executor=pool, **options)(x0[:2])
            for _ in range(20):
                Reward(docking(0), executor=pool, **options)(x0[:1])
        told = watched.settings()
        counts = {name: (each["asked"], each["failed"]) for name, each in told["rewards"].items()}
        assert counts == {"dock": (5 + 2 + 20, 1), "dock 2": (3, 0)}
        assert list(told["failures"]) == ["dock"]

    def test_no_end_of_names_where_a_program_makes_functions(self):
        with ThreadPoolExecutor(1) as pool, watch_failures() as watched:
            for scale in torch.ones(20):
                Reward(lambda x0, s=scale: s * count_g(x0), executor=pool)(sequences(1))
        told = watched.settings()["rewards"]
        assert list(told) == ["<lambda>", *(f"<lambda> {i}" for i in range(2, 9))]
        assert sum(each["asked"] for each in told.values()) == 20

    def test_functions_without_workers_are_told_of_too(self):
        with watch_failures() as watched:
            function = SequenceFunction(count_g)
            function(sequences(3))
            function(sequences(3))
        (told,) = watched.settings()["rewards"].values()
        seconds, under_way = told.pop("seconds"), told.pop("under_way")
        assert seconds >= under_way > 0
        assert told == {
            "asked": 3,
            "cached": 3,
            "cached_memory": 3,
            "cached_disk": 0,
            "retried": 0,
            "killed": 0,
            "failed": 0,
            "failed_by_cause": {},
            "utilisation": 1.0,
            "overlap": 0.0,
        }

    def test_what_is_told_does_not_grow_with_the_functions_a_program_makes(self):
        with watch_failures() as watched:
            for _ in range(1000):
                SequenceFunction(count_g)(sequences(2))
        assert len(watched._ledger._accounts) <= 257
        assert watched.settings()["rewards"]["count_g"]["asked"] == 2000


class TestMemoryOfARun:
    def test_a_sequence_is_asked_about_once(self):
        asked = []

        def record(x0):
            asked.extend(map(tuple, x0.tolist()))
            return count_g(x0).double()

        evaluated = EvaluatedPotential(Potential(record))
        batches = [sequences(30, seed=s % 3) for s in range(6)]
        for x0 in batches:
            assert torch.equal(evaluated.lookahead(x0), count_g(x0).double())
        assert len(asked) == len(set(asked)) == evaluated.num_calls
        assert set(asked) == {tuple(row) for x0 in batches for row in x0.tolist()}

    def test_guesses_and_ends_are_two_questions(self):
        evaluated = EvaluatedPotential(Potential(lambda x0: torch.full((len(x0),), -torch.inf)))
        x0 = sequences(4)
        assert evaluated.lookahead(x0).isfinite().all()
        assert (evaluated(x0) == -torch.inf).all()

    def test_only_what_is_new_is_begun(self):
        later = Later()
        evaluated = EvaluatedPotential(Reward(count_g, executor=later, cache_size=1))
        x0 = sequences(6)
        pending = evaluated.submit(x0[:4].reshape(2, 2, 6))
        later.catch_up()
        assert torch.equal(pending(), count_g(x0[:4]).double().reshape(2, 2))
        evaluated.submit(x0)
        assert len(later.work) == 2


class TestThreads:
    def test_they_do_what_an_executor_does(self):
        with Threads(3) as pool:
            assert list(pool.map(lambda x: x + 1, range(20))) == list(range(1, 21))
            with pytest.raises(ZeroDivisionError):
                pool.submit(lambda: 1 / 0).result()
            reward = Reward(count_g, executor=pool)
            assert torch.equal(reward(sequences(9)), count_g(sequences(9)).double())
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(print)

    def test_the_queue_can_be_emptied(self):
        free, running = threading.Event(), threading.Event()

        def blocks():
            running.set()
            free.wait(20)

        pool = Threads(1)
        first, second = pool.submit(blocks), pool.submit(blocks)
        assert running.wait(20)
        pool.shutdown(wait=False, cancel_futures=True)
        free.set()
        pool.shutdown()
        assert second.cancelled()
        assert first.result() is None

    def test_there_is_at_least_one(self):
        for number in (0, 2.5, "two"):
            message = f"num_workers must be a whole number, at least 1, got {number!r}"
            with pytest.raises(ValueError, match=message):
                Threads(number)

    def test_one_that_was_shut_down_is_a_lost_executor(self):
        for pool in (Threads(1), ThreadPoolExecutor(1)):
            pool.shutdown()
            reward = Reward(count_g, executor=pool, on_error="reject")
            for _ in range(2):
                with pytest.raises(PotentialError, match=r"count_g lost its executor .*shutdown"):
                    reward(sequences(2))


@pytest.mark.slow
def test_a_hung_worker_does_not_keep_the_interpreter():
    code = """
        import time, torch
        from ppl_diffusion.potentials import Reward, Threads

        def hangs(x0):
            time.sleep(0 if x0[0, 0] else 3600)
            return x0.sum(-1)

        reward = Reward(hangs, executor=Threads(2), timeout=0.5, on_error="reject")
        print(reward(torch.tensor([[0, 1], [1, 1], [2, 1]])).tolist())
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert found.stdout == "[-inf, 2.0, 3.0]\n", found.stderr
