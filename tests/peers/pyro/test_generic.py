"""Pyro's own generic distribution tests, run on our classes.

Pyro's wheel and source archive carry no tests. Point the environment variable ``PYRO_SOURCE`` to
a checkout (``git clone --branch 1.9.1 https://github.com/pyro-ppl/pyro``) to run these; without
it they are skipped, visibly.
"""

import importlib
import itertools
import os
import sys
import warnings
from pathlib import Path

import pyro
import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit

from ppl_diffusion.distributions import (
    ChainMarginal,
    RevealStep,
    ReverseChain,
    StateStep,
    TokenStep,
)
from ppl_diffusion.kernels import (
    Absorbing,
    ExtrapolatedKernel,
    LatentKernel,
    OrderedKernel,
    Uniform,
)
from ppl_diffusion.kernels import Path as Grid
from ppl_diffusion.testing import PROCESSES, state_index, toy_chain, toy_process
from ppl_diffusion.testing.latent_toys import corr_bits

SOURCE = os.environ.get("PYRO_SOURCE")
if not SOURCE:
    pytest.skip(
        "PYRO_SOURCE is not set: it names a Pyro checkout, whose generic distribution tests "
        "run here",
        allow_module_level=True,
    )
if not (Path(SOURCE) / "tests" / "distributions" / "dist_fixture.py").is_file():
    pytest.fail(f"PYRO_SOURCE={SOURCE} holds no tests/distributions/dist_fixture.py.")


def upstream(*names):
    """Import modules of Pyro's ``tests`` package, which has the name of our own folder."""
    ours = {n: m for n, m in sys.modules.items() if n == "tests" or n.startswith("tests.")}
    dtype = torch.get_default_dtype()
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, SOURCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [importlib.import_module(f"tests.{name}") for name in names]
    finally:
        sys.path.remove(SOURCE)
        for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
            del sys.modules[name]
        sys.modules.update(ours)
        torch.set_default_dtype(dtype)


fixtures, generic, pickling = upstream(
    "distributions.dist_fixture", "distributions.test_distributions", "distributions.test_pickle"
)

MASK = 3
KERNELS = {name: toy_chain(name, num_steps=2).kernel for name in PROCESSES}
ONE_STEP = toy_chain("absorbing", num_steps=1).kernel
TABLE = KERNELS["absorbing"].denoiser
HITTING = OrderedKernel(Absorbing(MASK), TABLE, length=2)
EXTRAPOLATED = ExtrapolatedKernel(Absorbing(MASK), TABLE, num_steps=2)
PATH = [[MASK, MASK], [MASK, 1], [0, 1]]
OTHER = [[MASK, MASK], [2, MASK], [2, 0]]


class PromptedChain(ReverseChain):
    """A chain whose kernel belongs to the class: its shape follows from the prompt's."""

    def __init__(self, prompt, validate_args=None):
        super().__init__(
            KERNELS["absorbing"], len(prompt), prompt=prompt, validate_args=validate_args
        )

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(PromptedChain, _instance))

    @classmethod
    def infer_shapes(cls, prompt):
        return torch.Size(), torch.Size((KERNELS["absorbing"].num_steps + 1, *prompt))


def step_example(process, tokens, test_data, kappa=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*torch.tensor(tokens).shape, process.vocab_size)
    log_probs = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
    return {
        "process": process,
        "tokens": tokens,
        "log_probs": log_probs.tolist(),
        "alpha_t": 0.2,
        "alpha_s": 0.6,
        "kappa": kappa,
        "test_data": test_data,
    }


def random_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def reveal_example(tokens, eligible, count, test_data):
    logits = random_logits(*torch.tensor(tokens).shape, MASK)
    return {
        "tokens": tokens,
        "log_probs": logits.log_softmax(-1).tolist(),
        "eligible": eligible,
        "count": count,
        "test_data": test_data,
    }


def state_example(tokens, test_data):
    logits = random_logits(*torch.tensor(tokens).shape, MASK)
    return {"log_probs": logits.tolist(), "tokens": tokens, "test_data": test_data}


def support(size, length, batch=()):
    """Return the support as nested lists, each value repeated over the batch."""
    values = torch.tensor(list(itertools.product(range(size), repeat=length)))
    return values.reshape(-1, *[1] * len(batch), length).expand(-1, *batch, length).tolist()


CHAINS = fixtures.Fixture(
    pyro_dist=ReverseChain,
    examples=[
        {"kernel": KERNELS["absorbing"], "length": 2, "test_data": PATH},
        {"kernel": KERNELS["absorbing"], "length": 2, "test_data": [PATH, OTHER]},
        {"kernel": KERNELS["uniform"], "length": 2, "test_data": [[[[0, 2], [1, 2], [1, 1]]]]},
        {"kernel": KERNELS["skewed"], "length": 2, "test_data": [[0, 2], [1, 2], [1, 1]]},
        {"kernel": ONE_STEP, "length": 2, "test_data": [[MASK, MASK], [0, 2]]},
        {"kernel": HITTING, "length": 2, "test_data": [PATH, OTHER]},
        {"kernel": EXTRAPOLATED, "length": 2, "test_data": [PATH, OTHER]},
    ],
    is_discrete=True,
    min_samples=1000,
)
PROMPTED = fixtures.Fixture(
    pyro_dist=PromptedChain,
    examples=[
        {"prompt": [-1, 1], "test_data": [[MASK, 1], [MASK, 1], [0, 1]]},
        {"prompt": [-1, -1], "test_data": [PATH, OTHER]},
    ],
    is_discrete=True,
    min_samples=1000,
)
MARGINALS = fixtures.Fixture(
    pyro_dist=ChainMarginal,
    examples=[
        {"chain": toy_chain("uniform", num_steps=2), "test_data": [0, 2]},
        {"chain": toy_chain("absorbing", num_steps=2), "test_data": [[0, 2], [1, 1], [2, 0]]},
        {"chain": toy_chain("absorbing").expand((2, 1)), "test_data": [[[0, 2]], [[1, 1]]]},
    ],
    is_discrete=True,
    min_samples=1000,
    expected_support_non_vec=support(3, 2),
    expected_support=support(3, 2, (2, 1)),
)
STEPS = fixtures.Fixture(
    pyro_dist=TokenStep,
    examples=[
        step_example(Uniform(3), [0, 2], [1, 2]),
        step_example(Absorbing(3), [[MASK, 1, MASK]], [[MASK, 1, 0]], kappa=0.9),
        step_example(Absorbing(3), [[MASK, 1], [0, MASK]], [[[0, 1], [0, 2]]] * 3),
        step_example(Uniform(3), [[[0, 2]], [[1, 1]]], [[[0, 2]], [[2, 1]]]),
    ],
    is_discrete=True,
    min_samples=1000,
    expected_support_non_vec=support(3, 2),
    expected_support=support(3, 2, (2, 1)),
)
REVEALS = fixtures.Fixture(
    pyro_dist=RevealStep,
    examples=[
        reveal_example([MASK, MASK], [True, True], 1, [0, MASK]),
        reveal_example([[MASK, 1, MASK]], [True, True, True], 2, [[0, 1, 2]]),
        reveal_example([[[MASK, MASK]], [[1, MASK]]], [True, True], 1, [[[0, MASK]], [[1, 2]]]),
    ],
    is_discrete=True,
    min_samples=1000,
    expected_support_non_vec=support(MASK + 1, 2),
    expected_support=support(MASK + 1, 2, (2, 1)),
)
TABLES = fixtures.Fixture(
    pyro_dist=StateStep,
    examples=[
        state_example([0, 2], [1, 2]),
        state_example([[0, 1, 2]], [[[0, 1, 0]], [[2, 2, 1]]]),
        state_example([[[0, 2]], [[1, 1]]], [[[0, 2]], [[2, 1]]]),
    ],
    is_discrete=True,
    min_samples=1000,
    expected_support_non_vec=support(MASK, 2),
    expected_support=support(MASK, 2, (2, 1)),
)
BITS = Absorbing(2)
TOYS = corr_bits(0.2).denoiser()
BOTH = [[2, 2, 2], [2, 1, 2], [0, 1, 1]]
LATENT = fixtures.Fixture(
    pyro_dist=ReverseChain,
    examples=[
        {
            "kernel": LatentKernel(BITS, BITS, TOYS, Grid.joint(2)),
            "length": 2,
            "test_data": [BOTH, [[2, 2, 2], [2, 2, 1], [1, 1, 1]]],
        },
        {
            "kernel": LatentKernel(BITS, BITS, TOYS, Grid.sequential(1, 1)),
            "length": 2,
            "test_data": [[2, 2, 2], [2, 2, 0], [0, 0, 0]],
        },
    ],
    is_discrete=True,
    min_samples=1000,
)
CASES = [CHAINS, LATENT, PROMPTED, MARGINALS, STEPS, REVEALS, TABLES]
# An event shape that is a property of a kernel *object* does not follow from argument shapes.
STATIC_CASES = [PROMPTED, STEPS, REVEALS, TABLES]


@pytest.fixture(autouse=True)
def _as_upstream():
    """Upstream runs in float64 with a fixed seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=CASES, ids=lambda case: case.get_test_distribution_name())
def dist(request):
    return request.param


@pytest.fixture(params=CASES, ids=lambda case: case.get_test_distribution_name())
def discrete_dist(request):
    return request.param


test_support_shape = generic.test_support_shape
test_batch_log_prob_shape = generic.test_batch_log_prob_shape
test_batch_entropy_shape = generic.test_batch_entropy_shape
test_score_errors_event_dim_mismatch = generic.test_score_errors_event_dim_mismatch
test_score_errors_non_broadcastable = generic.test_score_errors_non_broadcastable_data_shape
test_support_is_discrete = generic.test_support_is_discrete
test_enumerate_support = generic.test_enumerate_support
test_enumerate_support_shape = generic.test_enumerate_support_shape
test_expand_by = generic.test_expand_by
test_expand_new_dim = generic.test_expand_new_dim
test_expand_existing_dim = generic.test_expand_existing_dim
test_subsequent_expands_ok = generic.test_subsequent_expands_ok
test_expand_error = generic.test_expand_error


@pytest.mark.parametrize("case", STATIC_CASES, ids=lambda c: c.get_test_distribution_name())
def test_infer_shapes(case):
    generic.test_infer_shapes(case)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (ReverseChain, [KERNELS["absorbing"], 2]),
        (ChainMarginal, [toy_chain("uniform")]),
        (ReverseChain, [HITTING, 2]),
        (TokenStep, [Uniform(3), torch.tensor([0, 1]), torch.zeros(2, 3), 0.2, 0.6]),
        (RevealStep, [torch.tensor([MASK, 1]), torch.zeros(2, 3), torch.ones(2).bool(), 1]),
    ],
    ids=["ReverseChain", "ChainMarginal", "FirstHitting", "TokenStep", "RevealStep"],
)
def test_pickle(monkeypatch, cls, arguments):
    monkeypatch.setitem(pickling.ARGS, cls, arguments)
    load = torch.load  # upstream of torch 2.6 does not ask for objects, newer ones do
    monkeypatch.setattr(torch, "load", lambda f, **kw: load(f, **{**kw, "weights_only": False}))
    pickling.test_pickle(cls)


@pytest.mark.parametrize("name", PROCESSES)
def test_goodness_of_fit_of_path_codes(name):
    """Pyro's own test, at its own false alarm rate: a path's code plus uniform noise has a density.

    The code is the path's rank among the reachable ones, so that the density is positive.
    """
    chain = toy_chain(toy_process(name), length=1, num_steps=2, kappa=0.7)
    paths = chain.enumerate_support()
    law = chain.log_prob(paths).exp()
    rank = (law > 0).long().cumsum(0) - 1
    drawn = chain.sample((100_000,))
    codes = rank[state_index(drawn.flatten(1), chain.kernel.process.num_states)]
    noise = torch.rand(len(codes), dtype=torch.float64)
    p_value = auto_goodness_of_fit(codes + noise, chain.log_prob(drawn).exp())
    assert p_value > 2e-5
    wrong = toy_chain(toy_process(name), length=1, num_steps=2, kappa=0.7, seed=3)
    broken = wrong.log_prob(drawn.clone()).exp()
    assert auto_goodness_of_fit(codes + noise, broken.clamp_min(1e-9)) < 2e-5
