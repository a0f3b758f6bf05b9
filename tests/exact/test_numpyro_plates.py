"""Sequences of a plate move by themselves where nothing couples them, and else together."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import condition
from numpyro_toys import _x64, chain, tensor  # noqa: F401

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.numpyro import plates
from ppl_diffusion.numpyro.particle_gibbs import ParticleGibbsState
from ppl_diffusion.numpyro.plates import MIXED, Elements, follow
from ppl_diffusion.numpyro.program import read
from ppl_diffusion.testing import chi_square_p_value

WIDTH, DRAWS, SWEEPS = 3, 5000, 2
Y = jnp.array([0.5, 2.0, 3.5])


def ones(x):
    return (x == 1).sum(-1)


READ = jnp.full((WIDTH, 2), -1).at[0, 1].set(1)
"""One base of the first sequence is known."""


def assays(couple):
    """Sequences on one instrument, whose gain is held."""
    ours = chain(length=2, steps=3)

    def program():
        gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("promoter", WIDTH):
            x = ours.x0(numpyro.sample("path", ours))
            numpyro.sample("y", dist.Normal(gain * couple(x), 0.7), obs=Y)

    return ppn.clamp(condition(program, {"gain": jnp.asarray(1.2)}), tokens=READ)


def alone(x):
    return 1 + ones(x)


def centred(x):
    """The mean of the plate in each mean: a plate that is none, whatever the program says."""
    return 1 + ones(x) - ones(x).mean(-1, keepdims=True)


def elements_of(program):
    chains, target = read(program, (), {}, jax.random.key(0), fixed=True)
    return Elements.of(chains, target)


def exact(couple):
    """Return all triples of sequences, ``(729, 3, 2)``, and their posterior probabilities."""
    ours = chain(length=2, steps=3)
    sequences = ours.marginal().enumerate_support()
    index = np.stack(np.meshgrid(*[np.arange(9)] * WIDTH, indexing="ij"), -1).reshape(-1, WIDTH)
    x = sequences[index]
    prior = ours.marginal().log_prob(sequences)[index].sum(-1)
    p = np.exp(np.asarray(prior + dist.Normal(1.2 * couple(x), 0.7).log_prob(Y).sum(-1)))
    p = p * np.asarray(((READ < 0) | (x == READ)).all((1, 2)))
    return np.asarray(x), p / p.sum()


def exact_paths(couple):
    """Return paths of exact draws: sequences by enumeration, and paths given them."""
    ours = chain(length=2, steps=3)
    x, p = exact(couple)
    drawn = x[np.random.default_rng(0).choice(len(p), DRAWS, p=p)]
    paths = ours.enumerate_support()
    law = np.exp(np.asarray(ours.log_prob(paths)))
    code = np.asarray(ours.x0(paths) @ np.array([3, 1]))
    source, found = np.random.default_rng(1), np.zeros((DRAWS, WIDTH), int)
    wanted = drawn @ np.array([3, 1])
    for sequence in range(9):
        chosen = np.where(code == sequence, law, 0.0)
        here = wanted == sequence
        found[here] = source.choice(len(law), here.sum(), p=chosen / chosen.sum())
    return paths[found]


def swept(program, paths, particles=4):
    """Return the paths after some sweeps, and the share that moved in one."""
    kernel = ppn.ParticleGibbs(program, num_particles=particles)

    @jax.jit
    @jax.vmap
    def sweep(paths, key):
        state = ParticleGibbsState({"path": paths}, key, jnp.ones(()), jnp.ones(()))
        done = kernel.sample(state, (), {})
        return done.z["path"], done.moved

    moved = []
    for key in jax.random.split(jax.random.key(2), SWEEPS):
        paths, share = sweep(paths, jax.random.split(key, len(paths)))
        moved.append(float(share.mean()))
    return paths, np.mean(moved)


@cache
def unharmed(couple):
    return swept(assays(couple), exact_paths(couple))


def p_value(couple, paths):
    """Return the p-value of a chi-square test of the joint law of what matters.

    What is expected fewer than ten times is one cell: one draw of a rare triple is no evidence.
    """
    x, p = exact(couple)

    def codes(x):
        return np.asarray(ones(x) @ 3 ** np.arange(WIDTH))

    counts = np.bincount(codes(paths[..., -1, :]), minlength=27)
    law = np.bincount(codes(x), p, minlength=27)
    rare = law * len(paths) < 10
    counts, law = (np.append(each[~rare], each[rare].sum()) for each in (counts, law))
    return chi_square_p_value(tensor(counts), tensor(law))


@pytest.mark.parametrize(("couple", "count"), [(alone, WIDTH), (centred, 1)])
def test_sweeps_leave_the_posterior_of_a_plate_alone(couple, count):
    """From 5,000 exact draws; a false alarm in 10,000 for each."""
    assert elements_of(assays(couple)).count == count
    paths, moved = unharmed(couple)
    assert p_value(couple, paths) > 1e-4
    assert moved > 0.1


def see(monkeypatch, mark):
    """Take the gain for what it is, and the readings for ``mark``."""
    monkeypatch.setattr(plates, "follow", lambda *_: [None, mark])


def test_coupled_elements_may_not_move_by_themselves(monkeypatch):
    """The mutant: what is mixed counts as the element's own."""
    see(monkeypatch, 0)
    paths, _ = swept(assays(centred), exact_paths(centred))
    assert p_value(centred, paths) < 1e-8


def test_by_themselves_they_move_more(monkeypatch):
    _, apart = unharmed(alone)
    see(monkeypatch, MIXED)
    _, together = swept(assays(alone), exact_paths(alone))
    assert apart > together + 0.05


def test_plates_of_plates():
    """Six sequences, of which those on one instrument are coupled: worth what the program says."""
    ours = chain(length=2, steps=3)

    def program():
        with numpyro.plate("promoter", 3, dim=-1), numpyro.plate("instrument", 2, dim=-2):
            x = ours.x0(numpyro.sample("path", ours))
        total = jnp.log1p(ones(x)).sum(1)
        with numpyro.plate("reading", 2):
            numpyro.sample("y", dist.Normal(total, 0.7), obs=jnp.array([0.5, 2.0]))

    chains, target = read(program, (), {}, jax.random.key(0), fixed=True)
    elements = Elements.of(chains, target)
    assert elements.apart == (0,)
    assert elements.each(chains)["path"].batch_shape == (3,)
    x0 = jax.random.randint(jax.random.key(1), (2, 4, 3, 2), 0, 3)
    whole = target.log_joint({}, {"path": elements.join(x0, 1)})
    np.testing.assert_allclose(elements.log_joint({}, {"path": x0}).sum(0), whole)
    assert np.array_equal(elements.join(elements.split(x0)), x0)


TABLE, WEIGHTS, ORDER = jnp.arange(12.0).reshape(4, 3) ** 0.5, jnp.arange(20.0), jnp.arange(5)
X = jax.random.randint(jax.random.key(3), (3, 5), 0, 3)
"""Three sequences of five tokens."""


def hot(x):
    return jax.nn.one_hot(x, 3)


def convolved(x):
    kernel = jnp.arange(12.0).reshape(2, 3, 2)
    return jax.lax.conv_general_dilated(
        hot(x), kernel, (1,), "SAME", None, None, ("NHC", "HIO", "NHC")
    )


FOLLOWED = {
    "counts": (lambda x: (x == 1).sum(-1), 0),
    "replicates": (lambda x: jnp.ones((2, 1)) * (x == 1).mean(-1), 1),
    "look-up": (lambda x: TABLE[x].sum(-1), 0),
    "look-up by position": (lambda x: jnp.ones((5, 3))[ORDER, x].sum(1), 0),
    "a table for each": (lambda x: jnp.take_along_axis(jnp.ones((3, 5)), x, 1).sum(1), 0),
    "columns": (lambda x: x[:, jnp.array([0, 2])].T, 1),
    "slices": (lambda x: x[:, 1:] * x[:, :-1], 0),
    "one column": (lambda x: x[..., 0], 0),
    "products": (lambda x: jax.nn.gelu(hot(x).reshape(3, -1)[:, :15] @ WEIGHTS[:15]), 0),
    "products from the left": (lambda x: jnp.ones((2, 5)) @ x.T, 1),
    "products of pairs": (lambda x: jnp.einsum("nl,nl->n", x, x + 1), 0),
    "a function of each": (jax.vmap(lambda row: jax.nn.logsumexp(TABLE[row])), 0),
    "convolutions": (convolved, 0),
    "words": (lambda x: jnp.concatenate([x, x[:, :1]], 1).cumsum(1).max(1), 0),
    "sorted letters": (lambda x: jnp.sort(x, 1)[:, ::-1], 0),
    "nothing": (lambda x: jnp.ones(3), None),
    "a sum": (lambda x: x.sum(), MIXED),
    "a mean of the plate": (lambda x: x - x.mean(0), MIXED),
    "sorted sequences": (lambda x: jnp.sort(x, 0), MIXED),
    "the others": (lambda x: x[::-1].sum(1), MIXED),
    "sums so far": (lambda x: x.cumsum(0), MIXED),
    "one of them": (lambda x: x[1], MIXED),
    "a choice by one": (lambda x: x[x[0, 0]], MIXED),
    "pairs": (lambda x: x @ x.T, MIXED),
    "a stack": (lambda x: x.reshape(-1), MIXED),
    "a loop": (lambda x: jax.lax.fori_loop(0, 2, lambda _, y: y + 1, x), MIXED),
}


@pytest.mark.parametrize("name", list(FOLLOWED))
def test_a_dimension_is_followed(name):
    """To where it is, and what it finds there is so: another sequence changes its own entry."""
    function, expected = FOLLOWED[name]
    assert follow(lambda x: [function(x)], X, 0) == [expected]
    if expected not in (None, MIXED):
        changed = function(X.at[1].set((X[1] + 1) % 3)) != function(X)
        others = tuple(d for d in range(changed.ndim) if d != expected)
        assert np.asarray(changed.any(others)).tolist() in ([False, True, False], [False] * 3)
