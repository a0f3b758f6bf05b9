"""One time per row: denoisers that reduce the times of their rows to one number are found."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, TableDenoiser
from ppl_diffusion.denoisers.times import MOST_PROBES
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


def test_each_wrapper_asks_once_where_the_state_shows_the_time():
    counter = counted(chain_of(Timed()))[1]
    evaluated = EvaluatedDenoiser(counter)
    evaluated(PATHS[:, 1], TIMES)
    assert counter.rows == 20 + 4
    evaluated(PATHS[:, 1], TIMES)
    assert counter.rows == 40 + 4
    assert evaluated.rows_evaluated == 40


def test_states_that_do_not_show_the_time_are_asked_about_a_few_times():
    flat = Timed(lambda t: torch.tensor(0.3))  # never reads the time, and does not promise so
    counter = counted(chain_of(flat))[1]
    evaluated = EvaluatedDenoiser(counter, reuse=False)
    for _ in range(MOST_PROBES + 3):
        evaluated(PATHS[:, 1], TIMES)
    assert counter.rows == 20 * (MOST_PROBES + 3) + 4 * MOST_PROBES


class Late(Timed):
    """Reads the time where something is revealed, and reduces it there."""

    def __call__(self, tokens, t):
        begun = bool((tokens != 3).any())
        return super().__call__(tokens, t if begun else torch.tensor(0.3))


def test_a_later_state_shows_what_the_first_did_not():
    evaluated = EvaluatedDenoiser(Late(torch.amax))
    evaluated(torch.full((20, 3), 3), TIMES)
    with pytest.raises(ValueError, match=r"Late was given one time per row.*row by row"):
        evaluated(torch.tensor([[0, 3, 1]]).expand(20, 3), TIMES)


def in_training(read, dropout=0.0):
    """A network that is being trained, with dropout or without."""

    class Module(torch.nn.Module, Timed):
        def __init__(self):
            torch.nn.Module.__init__(self)
            Timed.__init__(self, read)
            self.dropout = torch.nn.Dropout(dropout)

        def forward(self, tokens, t):
            return torch.log_softmax(self.dropout(Timed.__call__(self, tokens, t)), -1)

        __call__ = torch.nn.Module.__call__

    return Module().train()


def test_networks_in_training_are_asked_unless_calls_differ():
    with pytest.raises(ValueError, match=r"Module was given one time per row"):
        EvaluatedDenoiser(in_training(torch.amax))(PATHS[:, 1], TIMES)
    EvaluatedDenoiser(in_training(lambda t: t))(PATHS[:, 1], TIMES)
    torch.manual_seed(0)
    EvaluatedDenoiser(in_training(torch.amax, dropout=0.5))(PATHS[:, 1], TIMES)


@dataclass
class Plain:
    """Compares by value, so that it has no hash."""

    read: Callable
    kind: str = "posterior"
    time_free: bool = False
    vocab_size: int = 3

    def __call__(self, tokens, t):
        return Timed(self.read)(tokens, t)


class Slotted:
    """Has no place for a weak reference."""

    __slots__ = ("kind", "read", "time_free", "vocab_size")

    def __init__(self, read):
        self.read, self.kind, self.time_free, self.vocab_size = read, "posterior", False, 3

    def __call__(self, tokens, t):
        return Timed(self.read)(tokens, t)


@pytest.mark.parametrize("kind", [Plain, Slotted])
def test_nothing_is_asked_of_the_class_of_a_denoiser(kind):
    EvaluatedDenoiser(kind(lambda t: t))(PATHS[:, 1], TIMES)
    with pytest.raises(ValueError, match=rf"{kind.__name__} was given one time per row"):
        EvaluatedDenoiser(kind(torch.amax))(PATHS[:, 1], TIMES)


def test_one_that_wants_a_number_gets_the_same_sentence():
    wants = Timed(lambda t: torch.tensor(float(t)))
    with pytest.raises(ValueError, match=r"Timed was given one time per row.*failed.*row by row"):
        EvaluatedDenoiser(wants)(PATHS[:, 1], TIMES)


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
