"""One time per row: denoisers that reduce the times of their rows to one number are found."""

import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.testing import DenoiserContract, counted, random_joint, toy_potential

PROCESS = Absorbing(3)
GOAL = toy_potential(3, 3, scale=0.5)
REDUCTIONS = {
    "first": lambda t: t.flatten()[0],
    "last": lambda t: t.flatten()[-1],
    "mean": torch.mean,
    "largest": torch.amax,
}


class Timed:
    """The exact answer, sharpened as time goes by; ``read`` says how it reads its times."""

    time_free = False

    def __init__(self, read=lambda t: t):
        self.base = TableDenoiser(random_joint(3, 3, sharpness=1.5), PROCESS)
        self.vocab_size, self.kind, self.read = 3, self.base.kind, read

    def __call__(self, tokens, t):
        t = self.read(torch.as_tensor(t, dtype=torch.float64)).expand(tokens.shape[:-1])
        return torch.log_softmax(self.base(tokens, 0.5) * (0.2 + 2 * t[..., None, None]), -1)


def chain_of(denoiser, **options):
    return ReverseChain(OrderedKernel(PROCESS, denoiser, length=3, **options), 3)


ASKED = {
    "evaluated": lambda denoiser: EvaluatedDenoiser(denoiser)(PATHS[:, 1], TIMES),
    "plates": lambda denoiser: EvaluatedDenoiser(denoiser)(
        PATHS[:, 1].reshape(4, 5, 3), TIMES.reshape(4, 5)
    ),
    "smc": lambda denoiser: SMC(prompted(denoiser), GOAL, num_particles=8).run(seed=0),
    "sampled clock": lambda denoiser: SMC(
        chain_of(denoiser, clock="sampled"), GOAL, num_particles=8
    ).run(seed=0),
}
TIMES = torch.linspace(0.2, 0.8, 20, dtype=torch.float64)
PATHS = chain_of(Timed().base).sample((20,), generator=torch.Generator().manual_seed(0))


def prompted(denoiser):
    kernel = OrderedKernel(PROCESS, denoiser, length=3)
    return ReverseChain(kernel, 3, prompt=torch.tensor([[-1, -1, -1], [0, -1, 2]]))


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_denoiser_that_reduces_its_times_is_refused(reduction, asked):
    with pytest.raises(ValueError, match=r"Timed was given one time per row.*row by row"):
        ASKED[asked](Timed(REDUCTIONS[reduction]))


@pytest.mark.parametrize("asked", ASKED)
def test_one_that_reads_them_row_by_row_is_not(asked):
    ASKED[asked](Timed())
    flat = Timed(REDUCTIONS["first"])
    flat.time_free, flat.read = True, lambda t: torch.tensor(0.3)  # it never asks for the time
    ASKED[asked](flat)


def test_each_denoiser_is_asked_once_and_not_while_it_is_trained():
    counter = counted(chain_of(Timed()))[1]
    evaluated = EvaluatedDenoiser(counter)
    evaluated(PATHS[:, 1], TIMES)
    assert counter.rows == 20 + 4
    evaluated(PATHS[:, 1], TIMES)
    assert counter.rows == 40 + 4
    assert evaluated.rows_evaluated == 40
    training = Timed(REDUCTIONS["first"])
    training.training = True
    EvaluatedDenoiser(training)(PATHS[:, 1], TIMES)


class TestRowByRow(DenoiserContract):
    length, tolerance = 3, 1e-12

    def make_process(self):
        return PROCESS

    def make_denoiser(self, process):
        return Timed()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_contract_finds_it(reduction):
    contract = TestRowByRow()
    tokens = torch.full((4, 5, 3), 3)
    with pytest.raises(AssertionError):
        contract.test_predicts_each_row_at_its_own_time(
            Timed(REDUCTIONS[reduction]), PROCESS, tokens
        )


def test_the_law_of_one_that_is_refused_is_another():
    """Densities of paths, in which nothing else would have found it."""
    right, wrong = (chain_of(d).log_prob(PATHS) for d in (Timed(), Timed(torch.amax)))
    assert float((right - wrong).abs().max()) > 0.1
