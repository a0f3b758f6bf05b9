"""Chains of tokens and a latent along a path, held to laws that use no kernel.

Whole paths are listed (a site is revealed once, at some step), so that ``log_prob`` must sum to one
over them. Frequencies are held by Pearson's test at a level of 1e-4.
"""

import itertools
import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import Normal

from ppl_diffusion.denoisers import AtLatent, CodeDenoiser
from ppl_diffusion.distributions import GaussianChain, ReverseChain
from ppl_diffusion.errors import IntractableLogProb
from ppl_diffusion.handlers import unroll
from ppl_diffusion.kernels import Absorbing, Cosine, InterpolatingKernel, LatentKernel, Path
from ppl_diffusion.kernels.latent_solvers import DDIM, DPMSolver
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.schedules import Polynomial
from ppl_diffusion.testing.latent_laws import LatentLaw
from ppl_diffusion.testing.latent_quadrature import ScalarLatent, ancestral, ddim
from ppl_diffusion.testing.latent_toys import corr_bits, random_latents
from ppl_diffusion.testing.oracles import chi_square_p_value

ZIGZAG = Path([(1, 1), (0.6, 1), (0.6, 0.3), (0, 0)])  # a fifth path is one line
PATHS = {
    "masked": Path.masked(2),
    "joint": Path.joint(3),
    "seq": Path.sequential(1, 2),
    "ordered": Path.ordered(1),
    "zigzag": ZIGZAG,
    "late": Path([(1, 1), (0, 1), (0, 0)]),
}
PROBLEMS = {
    "bits": corr_bits(0.05),
    "table": random_latents(3, 2, 2, seed=1, sharpness=1.5),
    "slots": random_latents(2, 2, 3, 2, seed=2, sharpness=1.5),
}
CASES = list(itertools.product(PROBLEMS, PATHS))
SCHEDULES = {"token_schedule": Cosine(), "latent_schedule": Polynomial(2.0)}


def chain_of(problem, path, *, token_schedule=None, latent_schedule=None):
    process = Absorbing(problem.vocab_size, token_schedule)
    codes = Absorbing(problem.latent.shape[-1], latent_schedule)
    return ReverseChain(LatentKernel(process, codes, problem.denoiser(), path), problem.length)


def every_path(problem, path):
    """Return all paths that end without holes, int64 ``(P, T + 1, L + N)``."""
    steps, sizes = path.num_steps, list(problem.joint.shape)
    histories = []
    for site, size in enumerate(sizes):
        if site >= problem.length and not path.draws_latent:
            histories.append([[size] * (steps + 1)])
            continue
        moves = itertools.product(range(1, steps + 1), range(size))
        histories.append([[size] * k + [v] * (steps + 1 - k) for k, v in moves])
    return torch.tensor(list(itertools.product(*histories))).mT


def table_of(problem, chain, paths, values):
    """Sum values of paths over what they end with."""
    state = chain.x0(paths)
    if chain.kernel.path.draws_latent:
        state = torch.cat([state, chain.latent(paths)], -1)
    sizes = list(problem.joint.shape)[: state.shape[-1]]
    table = torch.zeros(sizes, dtype=torch.float64)
    return table.index_put(tuple(state.unbind(-1)), values, accumulate=True)


@pytest.mark.parametrize(("problem", "path"), CASES)
def test_the_law_of_a_chain(problem, path, generator):
    problem, path = PROBLEMS[problem], PATHS[path]
    chain = chain_of(problem, path, **SCHEDULES)
    paths = every_path(problem, path)
    probs = chain.log_prob(paths).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)
    law = LatentLaw.of(problem, path, **SCHEDULES).joint
    torch.testing.assert_close(table_of(problem, chain, paths, probs), law, rtol=0, atol=1e-12)
    num = 4000
    drawn = chain.sample((num,), generator=generator)
    torch.testing.assert_close(chain.log_prob(drawn), chain.log_prob(drawn.clone()))
    assert_frequencies(table_of(problem, chain, drawn, torch.ones(num).double()), law)


def assert_frequencies(counts, law):
    counts, law = counts.flatten(), law.flatten()
    rare = law * counts.sum() < 5
    if bool(rare.any()):
        counts, law = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, law))
    assert chi_square_p_value(counts, law) > 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_whole_paths_are_drawn_as_they_are_scored(path, generator):
    chain = chain_of(PROBLEMS["bits"], PATHS[path])
    paths = every_path(PROBLEMS["bits"], PATHS[path])
    drawn = chain.sample((6000,), generator=generator)
    where = (drawn[:, None] == paths).flatten(2).all(-1)
    assert bool(where.any(-1).all())  # no hole is left, and nothing revealed is hidden again
    assert_frequencies(where.sum(0).double(), chain.log_prob(paths).exp())


def test_a_path_changes_the_names_of_sites_only(generator):
    names = {}
    for name, path in PATHS.items():
        chain = chain_of(PROBLEMS["bits"], path)
        value = chain.sample(generator=generator)

        @unroll
        def program(chain=chain, value=value):
            pyro.sample("path", chain, obs=value)

        trace = poutine.trace(program).get_trace()
        trace.compute_log_prob()
        drawn = {n: site for n, site in trace.nodes.items() if n[:4] in ("tok_", "lat_")}
        names[name] = set(drawn)
        total = sum(site["log_prob_sum"] for site in drawn.values())
        torch.testing.assert_close(total, chain.log_prob(value.clone()))
    assert names["masked"] == {"tok_1", "tok_2"}
    assert names["joint"] == {f"{kind}_{k}" for kind in ("tok", "lat") for k in (1, 2, 3)}
    assert names["seq"] == {"lat_1", "tok_2", "tok_3"}
    assert names["ordered"] == {"lat_1", "tok_2"}
    assert names["zigzag"] == {"tok_1", "lat_2", "tok_3", "lat_3"}
    assert names["late"] == {"tok_1", "lat_2"}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_latent_first_is_two_chains(problem):
    """One chain along SEQ, or codes as a chain of their own and tokens given them: one density."""
    problem = PROBLEMS[problem]
    length, size = problem.length, problem.vocab_size
    path = Path.sequential(2, 2)
    chain = chain_of(problem, path)
    paths = every_path(problem, path)
    paths = paths[chain.log_prob(paths) > -torch.inf]
    network, hidden = problem.denoiser(), torch.full((length,), size)
    codes = Absorbing(problem.latent.shape[-1])
    first = InterpolatingKernel(codes, CodeDenoiser(network, hidden), num_steps=2)
    latents = ReverseChain(first, problem.latent.shape[1])
    told = InterpolatingKernel(Absorbing(size), AtLatent(network), num_steps=2)
    tokens = ReverseChain(told, length, given={"latent": chain.latent(paths)})
    both = latents.log_prob(paths[:, :3, length:]) + tokens.log_prob(paths[:, 2:, :length])
    torch.testing.assert_close(both, chain.log_prob(paths))


def test_the_latent_first_does_not_know_the_tokens():
    """In the first phase no token is there, whatever the tokens will be."""
    problem, path = PROBLEMS["slots"], Path.sequential(2, 1)
    chain = chain_of(problem, path)
    paths = every_path(problem, path)
    probs = chain.log_prob(paths).exp()
    possible = paths[probs > 0]
    assert bool((possible[:, :3, : problem.length] == problem.vocab_size).all())
    codes = table_of(problem, chain, paths, probs).sum((0, 1))
    assert not torch.allclose(codes, problem.joint.sum((0, 1)))  # two slots at once forget
    torch.testing.assert_close(codes, LatentLaw.of(problem, path).joint.sum((0, 1)))


def test_prompts_stay_and_the_latent_knows_them():
    problem, path = PROBLEMS["bits"], Path.sequential(1, 1)
    kernel = LatentKernel(Absorbing(2), Absorbing(2), problem.denoiser(), path)
    chain = ReverseChain(kernel, 2, prompt=torch.tensor([1, -1]))
    paths = torch.tensor(
        [[[1, 2, 2], [1, 2, c], [1, x, c]] for x, c in itertools.product(range(2), repeat=2)]
    )
    given = problem.joint[1] / problem.joint[1].sum()
    torch.testing.assert_close(chain.log_prob(paths).exp(), given.flatten())


# Vectors.

SIGNED = corr_bits(0.05).embedded(lambda x: 1.0 - 2.0 * x[:, :1, None].double())
NOISE = Gaussian()
RULE = ScalarLatent(SIGNED, NOISE, num_points=801)


def vectors(path, solver=None):
    kernel = LatentKernel(Absorbing(2), NOISE, SIGNED.denoiser(NOISE), path, solver=solver)
    return ReverseChain(kernel, 2)


def counted(x):
    return torch.bincount(x[:, 0] * 2 + x[:, 1], minlength=4).double()


SOLVERS = [("seq", None), ("joint", None), ("ordered", None), ("seq", DDIM()), ("joint", DDIM())]


@pytest.mark.parametrize(("name", "solver"), SOLVERS)
def test_tokens_beside_a_vector(name, solver, generator):
    path = {"seq": Path.sequential(2, 1), "joint": Path.joint(2), "ordered": Path.ordered(2)}[name]
    law = RULE.tokens(path, (ancestral if solver is None else ddim)(NOISE))
    chain = vectors(path, solver)
    drawn = chain.sample((8000,), generator=generator)
    assert_frequencies(counted(chain.x0(drawn)), law)


def test_a_chain_of_vectors_and_its_tokens_in_two(generator):
    chain = GaussianChain(NOISE, SIGNED.denoiser(NOISE), 2, 2)
    finished = chain.latent(chain.sample((8000,)))
    told = InterpolatingKernel(Absorbing(2), AtLatent(SIGNED.denoiser(NOISE)), num_steps=1)
    tokens = ReverseChain(told, 2, given={"latent": finished})
    law = RULE.tokens(Path.sequential(2, 1), ancestral(NOISE))
    assert_frequencies(counted(tokens.x0(tokens.sample(generator=generator))), law)


def test_a_solver_of_two_steps_remembers_what_was_predicted(generator):
    """The second step of DPM-Solver++ (2M) extrapolates the first two predictions, in log-SNR."""
    path, denoiser = Path.sequential(4, 1), SIGNED.denoiser(NOISE)
    y = vectors(path, DPMSolver(order=2)).sample((20,), generator=generator)[..., 2]
    hidden, clean = torch.full((20, 2), 2), []
    for k, u in enumerate((1.0, 0.75)):
        latent = y[:, k, None, None]
        clean.append(denoiser.joint(hidden, 1.0, latent=latent, latent_time=u)[:, 2, 0])
    h = [float(NOISE.log_snr(s) - NOISE.log_snr(u)) for u, s in ((1.0, 0.75), (0.75, 0.5))]
    estimate = clean[1] + h[1] / (2 * h[0]) * (clean[1] - clean[0])
    keep = float(NOISE.noise(0.5) / NOISE.noise(0.75))
    pull = float(NOISE.signal(0.5)) * -math.expm1(-h[1])
    torch.testing.assert_close(y[:, 2], keep * y[:, 1] + pull * estimate)


@pytest.mark.parametrize("path", [Path.joint(3), Path.sequential(2, 2), Path.led(2, 1)], ids=str)
def test_the_density_of_a_path_of_vectors(path, generator):
    """Step by step from the formulas: levels, tokens and latent are those *before* each step."""
    chain, denoiser, update = vectors(path), SIGNED.denoiser(NOISE), ancestral(NOISE)
    drawn = chain.sample((50,), generator=generator)
    tokens, y = drawn[..., :2].long(), drawn[..., 2]
    expected = Normal(y.new_zeros(()), 1.0).log_prob(y[:, 0])
    for k, ((t, u), (t_next, s)) in enumerate(itertools.pairwise(path.levels)):
        latent = y[:, k, None, None]
        rows = denoiser.joint(tokens[:, k], t, latent=latent, latent_time=u)
        if s < u:
            mean, std = update(y[:, k], rows[:, 2, 0], u, s)
            expected = expected + Normal(mean, y.new_tensor(std)).log_prob(y[:, k + 1])
        before, after = tokens[:, k], tokens[:, k + 1]
        chances = torch.tensor([(t - t_next) / t, t_next / t], dtype=torch.float64).log()
        own = rows[:, :2].gather(-1, after.clamp_max(1)[..., None])[..., 0]
        move = torch.where(after == 2, chances[1], own + chances[0])
        expected = expected + torch.where(before == 2, move, 0.0).sum(-1)
    torch.testing.assert_close(chain.log_prob(drawn.clone()), expected, rtol=0, atol=1e-10)


def test_a_path_without_noise_has_no_density(generator):
    chain = vectors(Path.joint(2), DDIM())
    with pytest.raises(IntractableLogProb):
        chain.log_prob(chain.sample(generator=generator))
