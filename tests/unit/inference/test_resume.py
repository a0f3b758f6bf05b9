"""A run that was interrupted at any step goes on to the bits of the unbroken one."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from interrupted import differences, resumed

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.denoisers.base import Wrapper
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import GradientProposal
from ppl_diffusion.inference import SMC, LatentMoves, methods
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.potentials.factor import factor
from ppl_diffusion.smc import Defensive, FeynmanKac, run_smc
from ppl_diffusion.testing.toys import toy_markov_chain


def asked(method):
    """Return options with which runs resample often, where the method leaves that open."""
    usual = methods()[method].ess_threshold == 0.5
    options = {"ess_threshold": 0.9} if usual else {}
    beam = {"num_children": 2} if method == "beam" else {}
    return {"method": method, "num_particles": 8, "num_runs": 2, **options, **beam}


def ordered():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    probs, process = torch.softmax(logits, -1), Absorbing(3)
    denoiser = MarkovDenoiser(probs[0], probs[1:], process)
    return ReverseChain(OrderedKernel(process, denoiser, length=4), 4)


CHAINS = {
    "absorbing": lambda: toy_markov_chain(length=4, num_steps=4),
    "uniform": lambda: toy_markov_chain("uniform", length=4, num_steps=4),
    "ordered": ordered,
}


def goal():
    return Potential(lambda x0: 1.5 * (x0[..., :-1] == x0[..., 1:]).sum(-1), name="pairs")


def assay(chain):
    gain = pyro.sample("gain", dist.Normal(torch.tensor(0.0).double(), 1.0))
    x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
    kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.3).double()))
    pyro.sample(
        "y", dist.Normal(gain + kind + (x == 0).sum(-1), 0.5), obs=torch.tensor(1.0).double()
    )
    factor("goal", goal(), x)


def of_chain(method, process):
    return SMC(CHAINS[process](), goal(), **asked(method)).run(seed=0)


def of_program(method):
    chain = toy_markov_chain(length=3, num_steps=3)
    return SMC(assay, **asked(method)).run(chain, seed=0)


class Hidden(Wrapper):
    """A denoiser that is asked for hidden states, as those of large vocabularies are."""

    kind, hidden_size, vocab_size, time_free = "cavity", 2, 5, True

    def __init__(self):
        self.denoiser = toy_markov_chain(vocab_size=5).kernel.denoiser
        self.weight = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5)

    def hidden(self, tokens, t):
        return torch.stack([(tokens == 1).sum(-1, keepdim=True) - tokens, tokens], -1) / 3.0

    def head(self, hidden):
        return (hidden.double() @ self.weight).log_softmax(-1)

    def __call__(self, tokens, t):
        return self.head(self.hidden(tokens, t))


def soft_pairs(soft):
    return 1.5 * (soft[:, :-1] * soft[:, 1:]).sum((1, 2))


UNGUIDED = [name for name, cls in methods().items() if cls.needs.any_target]


def check(make, folder, most):
    whole = make()
    for last, posterior in resumed(make, folder, most):
        assert not differences(whole, posterior), f"interrupted at boundary {last}"


@pytest.mark.parametrize("process", CHAINS)
@pytest.mark.parametrize("method", UNGUIDED)
def test_a_chain_with_a_potential(method, process, tmp_path):
    check(partial(of_chain, method, process), tmp_path, 2)


@pytest.mark.parametrize("method", ["smc", "refinement", "twisted"])
def test_a_program_with_latents(method, tmp_path):
    check(partial(of_program, method), tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", UNGUIDED)
def test_every_boundary(method, tmp_path):
    for process in CHAINS:
        check(partial(of_chain, method, process), tmp_path / process, None)
    check(partial(of_program, method), tmp_path / "program", None)


@pytest.mark.parametrize(
    "options",
    [
        {"twist": "argmax", "ess_threshold": 0.1},  # rows that nobody compares any more
        {"twist": Defensive(late=True), "ess_threshold": 0.9},
        {"num_sentinels": 4, "twist": "argmax"},
        {"num_particles": 1100, "ess_threshold": 0.9},  # answers that are remembered by hashes
        {"method": "twisted", "proposal": GradientProposal(soft_pairs)},
    ],
)
def test_other_caches_and_counters(options, tmp_path):
    def make():
        chain = toy_markov_chain(length=12, num_steps=8)
        sized = {"num_particles": 16, "num_runs": 2, **options}
        return SMC(chain, goal(), **sized).run(seed=0)

    check(make, tmp_path, 3)


def test_hidden_states_are_asked_about_again(tmp_path):
    def make():
        kernel = InterpolatingKernel(Absorbing(5), Hidden(), num_steps=4)
        chain = ReverseChain(kernel, 8)
        return SMC(chain, goal(), twist="argmax", num_particles=8).run(seed=0)

    check(make, tmp_path, None)


@pytest.mark.parametrize("tuning", ["scout", "own"])
def test_moves_of_latents(tuning, tmp_path):
    def make():
        chain = toy_markov_chain(length=3, num_steps=3)
        moves = LatentMoves(tuning=tuning)
        return SMC(assay, moves=moves, twist="argmax", num_particles=8).run(chain, seed=0)

    check(make, tmp_path, 2)


def test_a_plain_run_with_a_generator(tmp_path):
    def make():
        fk = FeynmanKac(toy_markov_chain(length=6, num_steps=4), goal(), twist="argmax")
        generator = torch.Generator().manual_seed(3)
        return run_smc(fk, 8, 2, ess_threshold=0.9, generator=generator)

    check(make, tmp_path, None)
