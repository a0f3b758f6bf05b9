"""Clamp, twist and steer say the same in every order.

Each order is held to enumeration by the weights and by three marginals of the free position, at
four standard errors: false-alarm rate 6e-5 each, 96 comparisons, below 1 % for the file, once, at
the fixed seeds. The mutants must be caught at the same threshold.
"""

from itertools import permutations

import pyro
import pytest
import torch
from pyro import poutine

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import ProposedChain, Steering, clamp, joined, steer, twist
from ppl_diffusion.handlers import site as site_module
from ppl_diffusion.potentials import Potential
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import toy_chain, toy_potential

GOAL = toy_potential(3, 2, scale=1.5)
HELD = {"tokens": torch.tensor([1, 0]), "mask": torch.tensor([True, False])}
PSI = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
HANDLERS = {
    "clamp": lambda model: clamp(model, **HELD),
    "steer": lambda model: steer(model, potential=0.5 * GOAL, num_particles=3),
    "twist": lambda model: twist(model, logits=lambda carry, log_probs, k: 0.5 * PSI),
}
ORDERS = [order for size in (2, 3) for order in permutations(HANDLERS, size)]


def program(chain):
    path = pyro.sample("path", chain)
    pyro.factor("goal", GOAL(chain.x0(path)))


def run(order, chain, num=3000):
    """Return the site of many independent draws, their weights and clean sequences."""
    model = program
    for name in order:
        model = HANDLERS[name](model)
    torch.manual_seed(len(order))
    with pyro.plate("independent", num):
        nodes = poutine.trace(model).get_trace(chain).nodes
    found, x0 = nodes["path"]["fn"], chain.x0(nodes["path"]["value"])
    return found, (found.draw.log_weight + GOAL(x0)).exp(), x0


def largest_z(order, chain):
    """Compare the weights, in all and for each token of the free position, with enumeration."""
    _, weights, x0 = run(order, chain)
    exact = ExactChain.of(chain)
    states = exact.states[exact.clean]
    law = exact.x0_law() * GOAL(states).exp()
    law = law * (states[:, 0] == 1) if "clamp" in order else law
    scores = [z_score(weights, float(law.sum()))]
    for token in range(3):
        expected = float(law[states[:, 1] == token].sum())
        scores.append(z_score(weights * (x0[:, 1] == token), expected))
    return max(abs(score) for score in scores)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_has_the_law_of_enumeration(order, process):
    assert largest_z(order, toy_chain(process)) < 4


@pytest.mark.parametrize("names", [("clamp", "steer", "twist"), ("clamp", "twist")], ids="-".join)
def test_every_order_draws_the_same_numbers_from_the_same_parts(names):
    chain = toy_chain()
    first, weights, x0 = run(names, chain, 20)
    for order in permutations(names):
        found, again, y0 = run(order, chain, 20)
        assert type(found) is ProposedChain
        assert torch.equal(weights, again)
        assert torch.equal(x0, y0)
        assert torch.equal(found.clamp.mask, first.clamp.mask)
        assert found.twist is not None
        assert (found.steering is None) == ("steer" not in names)


@pytest.mark.parametrize("last", ["steer", "twist"])
def test_a_site_that_forgets_its_other_parts_is_caught(monkeypatch, last):
    """The mutant keeps the newest part only, so a clamp under another handler is lost."""
    whole = ProposedChain.with_part

    def forgetful(self, **parts):
        return whole(self if "chain" in parts else ProposedChain(self.chain), **parts)

    monkeypatch.setattr(ProposedChain, "with_part", forgetful)
    assert largest_z(("clamp", last), toy_chain()) > 10


@pytest.mark.parametrize("steered", [False, True])
def test_a_move_that_drops_the_clamp_is_caught(monkeypatch, steered):
    monkeypatch.setattr(site_module, "joined", lambda twist, clamp: joined(twist, None))
    order = ("clamp", "twist", "steer") if steered else ("clamp", "twist")
    assert largest_z(order, toy_chain()) > 10


def test_a_proposal_of_no_parts_is_the_chain():
    chain = toy_chain("uniform")
    torch.manual_seed(0)
    bare = ProposedChain(chain)
    path = bare.sample((50,))
    assert torch.equal(bare.draw.log_weight, torch.zeros(50, dtype=torch.float64))
    torch.testing.assert_close(bare.log_prob(path), chain.log_prob(path.clone()))


def test_the_innermost_steer_stays():
    chain, inner = toy_chain(), Steering(GOAL, num_particles=2)

    def two(chain):
        with steer(potential=inner.potential, num_particles=2):
            pyro.sample("near", chain)
        pyro.sample("far", chain)

    nodes = poutine.trace(steer(two, potential=GOAL, num_particles=5)).get_trace(chain).nodes
    assert nodes["near"]["fn"].steering == inner
    assert nodes["far"]["fn"].steering.num_particles == 5


def test_clamps_of_different_lengths_are_refused_one_by_one():
    longer = {"tokens": torch.tensor([1, 0, 0]), "mask": torch.tensor([True, False, False])}
    with pytest.raises(ValueError, match="2 positions, the clamp 3"):
        clamp(clamp(program, **HELD), **longer)(toy_chain())


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_each_steered_chain_of_a_batch_has_its_own_prompt(process):
    """Two prompts in one plate, each weighed against enumeration; 4 s.e., 6e-5 each, 4 of them."""
    chain, prompts = toy_chain(process), torch.tensor([[1, -1], [-1, 2]])
    both = ReverseChain(chain.kernel, 2, prompt=prompts)
    torch.manual_seed(0)
    with pyro.plate("prompts", 2), pyro.plate("independent", 2000):
        nodes = poutine.trace(HANDLERS["steer"](program)).get_trace(both).nodes
    x0 = chain.x0(nodes["path"]["value"])
    weights = (nodes["path"]["fn"].draw.log_weight + GOAL(x0)).exp()
    for i, prompt in enumerate(prompts):
        alone = ExactChain.of(ReverseChain(chain.kernel, 2, prompt=prompt))
        assert bool((x0[:, i, prompt >= 0] == prompt[prompt >= 0]).all())
        assert abs(z_score(weights[:, i], alone.evidence(Potential(GOAL)))) < 4
