"""Executors of others: whatever has ``submit`` and returns futures will do."""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from ppl_diffusion.potentials import Reward
from ppl_diffusion.potentials.jobs_executor import JobsExecutor
from ppl_diffusion.potentials.ray_executor import RayExecutor
from ppl_diffusion.potentials.workers import workers_of

ROWS = torch.arange(24).reshape(12, 2)
TOTALS = ROWS.sum(-1).double()


def total(x0):
    return x0.sum(-1)


def test_pools_of_the_standard_library():
    with ThreadPoolExecutor(2) as pool:
        assert torch.equal(Reward(total, executor=pool)(ROWS), TOTALS)


@pytest.mark.slow
def test_a_process_pool():
    from functools import partial

    fn = partial(torch.sum, dim=-1)  # importable in the new process, unlike tests
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert torch.equal(Reward(fn, executor=pool)(ROWS), TOTALS)


class Job:
    """A job of a queue: no future, but it has a result."""

    def __init__(self, fn, args):
        self.fn, self.args = fn, args

    def result(self):
        return self.fn(*self.args)


class Queue:
    def submit(self, fn, *args):
        return Job(fn, args)


def test_jobs_that_are_no_futures():
    def picky(x0):
        if bool((x0[:, 0] == 4).any()):
            raise RuntimeError("no licence")
        return total(x0)

    pool = JobsExecutor(Queue(), 3)
    assert workers_of(pool) == 3
    reward = Reward(picky, executor=pool, on_error="reject")
    assert reward(ROWS).tolist() == [*TOTALS[:2], -torch.inf, *TOTALS[3:]]
    assert reward.failures == {"raised RuntimeError": 1}
    pool.shutdown()


@pytest.mark.ray
def test_submitit(tmp_path):
    submitit = pytest.importorskip("submitit")
    cluster = submitit.LocalExecutor(tmp_path)
    cluster.update_parameters(timeout_min=1)
    with JobsExecutor(cluster, 2) as pool:
        found = Reward(lambda x0: x0.sum(-1), executor=pool, batch_size=6)(ROWS)
    assert torch.equal(found, TOTALS)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_dask():
    distributed = pytest.importorskip("distributed")
    with distributed.Client(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as client:
        reward = Reward(total, executor=client.get_executor(), num_workers=2)
        assert torch.equal(reward(ROWS), TOTALS)


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        RayExecutor(2)
    assert str(caught.value) == (
        "RayExecutor needs Ray: install ppl-diffusion[ray], or use Processes on one machine."
    )


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
class TestRay:
    """A real Ray on this machine, of two workers."""

    @pytest.fixture(scope="class")
    def ray(self):
        ray = pytest.importorskip("ray")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()

    def test_one_of_two_workers_is_killed_on_the_way(self, ray, tmp_path):
        def notes_itself(x0):
            (tmp_path / str(os.getpid())).touch()
            time.sleep(0.3)
            return x0.sum(-1)

        with RayExecutor(2) as pool:
            reward = Reward(notes_itself, executor=pool, retries=2)
            reward.prefetch(ROWS)
            while len(list(tmp_path.iterdir())) < 2:
                time.sleep(0.05)
            victim = next(tmp_path.iterdir())
            os.kill(int(victim.name), 9)
            assert torch.equal(reward(ROWS), TOTALS)
        assert reward.num_failures == 0
        assert len(list(tmp_path.iterdir())) == 3  # another has taken its place

    def test_failures_have_their_causes(self, ray):
        def fails(x0):
            (row,) = x0[:, 0].tolist()
            if row == 0:
                os._exit(3)
            if row == 2:
                time.sleep(1000)
            if row == 4:
                raise ValueError("no key")
            return x0.sum(-1)

        with RayExecutor(2, timeout=2.0) as pool:
            reward = Reward(fails, executor=pool, on_error="reject")
            assert reward(ROWS).tolist() == [*[-torch.inf] * 3, *TOTALS[3:]]
        assert reward.failures == {"died": 1, "gave up": 1, "raised ValueError": 1}
