"""How programs are read: dependencies, what is drawn when, and in how few runs of the model."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.programs import Program
from ppl_diffusion.testing.conditional import LabelledTables
from ppl_diffusion.testing.toys import counted as counting
from ppl_diffusion.testing.toys import random_joint, toy_chain

CHAIN, OTHER = toy_chain(), toy_chain("uniform", length=3)
TABLES = [random_joint(3, 2, seed=seed) for seed in range(3)]
LABELLED = OrderedKernel(Absorbing(3), LabelledTables(TABLES, Absorbing(3)), length=2)
RATES = torch.tensor([0.2, 0.5, 0.3])


def zeros(x):
    return (x == 0).sum(-1).double()


def before():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", z * zeros(CHAIN.x0(pyro.sample("path", CHAIN))))


def after():
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    pyro.sample("z", dist.Normal(zeros(x), 1.0))


def through_deterministic():
    x = pyro.deterministic("x", CHAIN.x0(pyro.sample("path", CHAIN)), event_dim=1)
    n = pyro.deterministic("n", zeros(x))
    pyro.sample("z", dist.Normal(n, 1.0))


def through_delta():
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    n = pyro.sample("n", dist.Delta(zeros(x)))
    pyro.sample("z", dist.Normal(n, 1.0))


def two_chains():
    pyro.sample("path", CHAIN)
    pyro.factor("f", zeros(OTHER.x0(pyro.sample("other", OTHER))))


def label():
    c = pyro.sample("c", dist.Categorical(RATES))
    pyro.sample("path", ReverseChain(LABELLED, 2, given={"label": c}))


def chain_then_chain():
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    pyro.sample("child", ReverseChain(LABELLED, 2, given={"label": x[..., 0]}))


def between():
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    c = pyro.sample("c", dist.Categorical(torch.stack([1 + zeros(x), 2 - zeros(x)], -1) / 3))
    pyro.sample("child", ReverseChain(LABELLED, 2, given={"label": c}))


def by_the_argmax():
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("path", ReverseChain(LABELLED, 2, given={"label": z.argmax(-1)}))


def through_python_numbers():
    """Provenance is lost on the way: the check has to find it."""
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    n = torch.tensor([float(row.sum()) for row in x.reshape(-1, 2)]).reshape(x.shape[:-1])
    pyro.sample("z", dist.Normal(n, 1.0))


def through_numpy():
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    pyro.sample("z", dist.Normal(torch.as_tensor(x.numpy().sum(-1)).double(), 1.0))


def label_through_numbers():
    c = pyro.sample("c", dist.Categorical(RATES))
    known = torch.tensor(c.tolist())
    pyro.sample("path", ReverseChain(LABELLED, 2, given={"label": known}))


@pytest.mark.parametrize(
    ("program", "carried", "redrawn"),
    [
        (before, ["z"], []),
        (after, [], ["z"]),
        (through_deterministic, [], ["z"]),
        (through_delta, [], ["n", "z"]),
        (two_chains, [], []),
        (label, ["c"], []),
        (chain_then_chain, [], []),
        (between, ["c"], []),
        (by_the_argmax, ["z"], []),
        (through_python_numbers, [], ["z"]),
        (through_numpy, [], ["z"]),
        (label_through_numbers, ["c"], []),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_drawn_when(program, carried, redrawn):
    read = Program(program)
    assert (read.carried, read.redrawn) == (carried, redrawn)


@pytest.mark.parametrize(
    ("program", "child", "ancestors"),
    [
        (label, "path", {"c"}),
        (chain_then_chain, "child", {"path"}),
        (between, "child", {"path", "c"}),
        (by_the_argmax, "path", {"z"}),
        (label_through_numbers, "path", {"c"}),
        (two_chains, "other", set()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_chain_depends_on(program, child, ancestors):
    assert Program(program).ancestors(child) == ancestors


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("program", [through_python_numbers, through_numpy, label_through_numbers])
def test_lost_provenance_is_found_without_luck(program, seed):
    torch.manual_seed(seed)
    read = Program(program)
    assert any(read.ancestors(name) for name in read.order)


def counted(program):
    calls = []

    def model():
        calls.append(1)
        program()

    return model, calls


@pytest.mark.parametrize("program", [before, label, two_chains, between])
def test_a_model_is_run_four_times_before_it_is_used(program):
    """Once tracked, once as a batch of rows, and two rows alone."""
    model, calls = counted(program)
    read = Program(model)
    assert len(calls) == read.num_runs == 4


def test_one_more_run_draws_latents_and_opens_chains():
    model, calls = counted(label)
    SMC(model, num_particles=4, twist=None).bind((), {}).start(None)
    assert len(calls) == 5


def test_the_network_is_not_called_while_a_program_is_read():
    chain, counter = counting(toy_chain())
    Program(lambda: pyro.factor("f", zeros(chain.x0(pyro.sample("path", chain)))))
    assert counter.calls == 0


def test_a_chain_chosen_by_a_latent_is_told_how_to_say_it():
    chains = [toy_chain(seed=0), toy_chain(seed=1)]

    def chosen():
        which = pyro.sample("which", dist.Bernoulli(0.5))
        pyro.sample("path", chains[int(which)])

    def read_often():  # one draw of the latent may not show the other chain
        for seed in range(8):
            torch.manual_seed(seed)
            Program(chosen)

    with pytest.raises(CapabilityError, match=r"not the same on every run.* given="):
        read_often()


def test_a_condition_that_particles_did_not_move_under_is_refused():
    """A label that changes with what is known: the guard at the end finds it."""
    calls = []

    def fickle():
        calls.append(1)
        c = pyro.sample("c", dist.Categorical(RATES))
        shown = c if len(calls) < 6 else (c + 1) % 3
        pyro.sample("path", ReverseChain(LABELLED, 2, given={"label": shown}))

    with pytest.raises(CapabilityError, match="moved under another 'label'"):
        SMC(fickle, num_particles=4, twist=None, moves=None).run(seed=0)


@pytest.mark.parametrize("scaled", ["path", "z"])
def test_what_particles_are_drawn_by_cannot_be_scaled(scaled):
    """Weights would not know: proposal and target are scaled alike."""

    def model():
        with poutine.scale(scale=0.5 if scaled == "z" else 1.0):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=0.5 if scaled == "path" else 1.0):
            pyro.sample("path", toy_chain())

    with pytest.raises(CapabilityError, match=f"the site '{scaled}' of model is scaled"):
        Program(model)
