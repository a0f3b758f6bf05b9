"""Every method on every kind of program: held to enumeration, or refused by what it declares.

A cell runs one method on one small program whose evidence is known by enumeration (and quadrature);
it must be within 4 standard errors: false alarm 6e-5 a cell, below one in a hundred for the table.
``python tests/exact/test_support_matrix.py`` writes the page ``docs/support_matrix.md``.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import AtLatent, CodeDenoiser, TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import Steering, clamp, twist
from ppl_diffusion.inference import SMC, ParticleGibbs, methods
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, LatentKernel, OrderedKernel
from ppl_diffusion.kernels import Path as Grid
from ppl_diffusion.potentials import EmbeddedPotential, factor
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.programs import Bound
from ppl_diffusion.smc.feynman_kac import take_particles
from ppl_diffusion.testing.conditional import LabelledTables, TiltedSites
from ppl_diffusion.testing.latent_toys import corr_bits
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import random_joint, toy_chain, toy_potential

PAGE = Path(__file__).parents[2] / "docs" / "support_matrix.md"
MASKED = Absorbing(3)
GOAL, GUIDE = toy_potential(3, 2, scale=1.0), toy_potential(3, 2, seed=5, scale=0.5)
LOGITS = 0.4 * torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
RATES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
TABLES = [random_joint(3, 2, seed=seed, sharpness=2.0) for seed in (1, 2, 3)]
LABELLED = OrderedKernel(MASKED, LabelledTables(TABLES, MASKED), length=2)
TILTED = OrderedKernel(Absorbing(2), TiltedSites(Absorbing(2)), length=2)
PROMPTS = torch.tensor([[-1, 2], [0, -1]])


def ordered(seed, prompt=None):
    denoiser = TableDenoiser(random_joint(3, 2, seed=seed), MASKED)
    return ReverseChain(OrderedKernel(MASKED, denoiser, length=2), 2, prompt=prompt)


A, UNLIKE = ordered(0), toy_chain("uniform", vocab_size=2, length=3, num_steps=3, seed=4)
PROMPTED = ordered(6, PROMPTS)


def zeros(x):
    return (x == 0).sum(-1).double()


def every(size, length=2):
    return torch.cartesian_prod(*[torch.arange(size)] * length)


def density(mean, y, sd=0.7):
    return dist.Normal(mean, sd).log_prob(torch.tensor(y).double()).exp()


def law(chain):
    return chain.kernel.denoiser.joint.flatten()


# The programs, each with its evidence and the mean of a value under its posterior.


def unlike():
    """Two chains of different length, alphabet, grid and kernel."""
    x = pyro.deterministic("x", A.x0(pyro.sample("a", A)), event_dim=1)
    z = UNLIKE.x0(pyro.sample("b", UNLIKE))
    pyro.factor("meet", -0.7 * (zeros(x) - zeros(z)).square())


def unlike_table():
    x, z = every(3), every(2, 3)
    weight = law(A)[:, None] * ExactChain.of(UNLIKE).x0_law()
    return weight * (-0.7 * (zeros(x)[:, None] - zeros(z)).square()).exp(), zeros(x)[:, None]


def plate():
    """A plate of sequences, and a factor of both."""
    with pyro.plate("element", 2):
        x = A.x0(pyro.sample("path", A))
        factor("each", GOAL, x)
    x = pyro.deterministic("x", x, event_dim=2)
    same = (x[..., :1, :] == x[..., 1:, :]).all(-1)  # keeps a dimension in place of the plate
    pyro.factor("same", same.double())


def plate_table():
    x = every(3)
    each = law(A) * GOAL(x).exp()
    both = each[:, None] * each * torch.eye(9, dtype=torch.float64).exp()
    return both, zeros(x)[:, None]


def continuous():
    """A continuous latent before the sequence."""
    gain = pyro.sample("gain", dist.Normal(torch.tensor(0.0).double(), 1.0))
    x = pyro.deterministic("x", A.x0(pyro.sample("path", A)), event_dim=1)
    pyro.sample("y", dist.Normal(gain + zeros(x), 0.7), obs=torch.tensor(1.5).double())


def continuous_table():
    x = every(3)
    return law(A) * density(zeros(x), 1.5, math.sqrt(1.49)), zeros(x)


def discrete():
    """A discrete latent before the sequence."""
    level = pyro.sample("level", dist.Categorical(RATES))
    x = pyro.deterministic("x", A.x0(pyro.sample("path", A)), event_dim=1)
    pyro.sample("y", dist.Normal(level + zeros(x), 0.7), obs=torch.tensor(2.0).double())


def discrete_table():
    x = every(3)
    weight = law(A)[:, None] * RATES * density(torch.arange(3) + zeros(x)[:, None], 2.0)
    return weight, zeros(x)[:, None]


def late():
    """A latent whose law depends on the sequence."""
    x = pyro.deterministic("x", A.x0(pyro.sample("path", A)), event_dim=1)
    level = pyro.sample("level", dist.Normal(zeros(x), 1.0))
    pyro.sample("y", dist.Normal(level, 0.7), obs=torch.tensor(1.5).double())


def label():
    """A chain that depends on a label."""
    c = pyro.sample("c", dist.Categorical(RATES))
    chain = ReverseChain(LABELLED, 2, given={"label": c})
    x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
    pyro.sample("y", dist.Normal(zeros(x) + 1.5 * (c == 1), 0.7), obs=torch.tensor(2.0).double())


def label_table():
    x = every(3)
    tables = torch.stack([table.flatten() for table in TABLES], -1)
    mean = zeros(x)[:, None] + torch.tensor([0.0, 1.5, 0.0])
    return tables * RATES * density(mean, 2.0), zeros(x)[:, None]


def condition():
    """A chain that depends on a continuous latent."""
    c = pyro.sample("c", dist.Normal(torch.tensor(0.0).double(), 1.0))
    chain = ReverseChain(TILTED, 2, given={"cond": c})
    x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
    pyro.sample("y", dist.Normal(zeros(x) + c, 0.7), obs=torch.tensor(1.0).double())


def condition_table():
    grid, x = torch.linspace(-7, 7, 4001, dtype=torch.float64), every(2)
    zero = torch.sigmoid(2 * grid)[:, None, None]
    tokens = torch.where(x == 0, zero, 1 - zero).prod(-1)
    prior = dist.Normal(0.0, 1.0).log_prob(grid).exp()[:, None] * (grid[1] - grid[0])
    return prior * tokens * density(zeros(x) + grid[:, None], 1.0), zeros(x)


def second():
    """A chain that depends on another chain's clean sequence."""
    x = pyro.deterministic("x", A.x0(pyro.sample("a", A)), event_dim=1)
    chain = ReverseChain(LABELLED, 2, given={"label": x[..., 0]})
    z = chain.x0(pyro.sample("b", chain))
    pyro.factor("f", -0.7 * (zeros(x) - zeros(z)).square())


def second_table():
    x = every(3)
    tables = torch.stack([TABLES[int(first)].flatten() for first in x[:, 0]])
    weight = law(A)[:, None] * tables * (-0.7 * (zeros(x)[:, None] - zeros(x)).square()).exp()
    return weight, zeros(x)[:, None]


def plain():
    x = pyro.deterministic("x", A.x0(pyro.sample("path", A)), event_dim=1)
    factor("goal", GOAL, x)


def plain_table():
    return law(A) * GOAL(every(3)).exp(), zeros(every(3))


def clamped_table():
    weight, value = plain_table()
    return weight * (every(3)[:, 1] == 2), value


def prompted():
    """A plate of sequences with a prompt each."""
    with pyro.plate("row", 2):
        x = PROMPTED.x0(pyro.sample("path", PROMPTED))
        factor("goal", GOAL, x)
    pyro.deterministic("x", x, event_dim=2)


def prompted_table():
    x, parts = every(3), []
    joint = PROMPTED.kernel.denoiser.joint
    for row in PROMPTS:
        kept = ((row < 0) | (x == row)).all(-1)
        own = torch.where(kept, joint.flatten(), 0.0)
        parts.append(own / own.sum() * GOAL(x).exp())
    return parts[0][:, None] * parts[1], zeros(x)[:, None]


def hinted():
    """A steering hint at the chain site."""
    path = pyro.sample("path", A, infer={"steer": Steering(GUIDE)})
    factor("goal", GOAL, pyro.deterministic("x", A.x0(path), event_dim=1))


def half_observed():
    """Two measurements of which one is missing."""
    x = pyro.deterministic("x", A.x0(pyro.sample("path", A)), event_dim=1)
    with pyro.plate("measured", 2):
        y, mask = torch.tensor([1.5, 0.0]).double(), torch.tensor([True, False])
        pyro.sample("y", dist.Normal(zeros(x), 0.7), obs=y, obs_mask=mask)


def half_observed_table():
    x = every(3)
    return law(A) * density(zeros(x), 1.5), zeros(x)


def half_counted():
    """Two counts of which one is missing: a discrete latent that nothing reads."""
    x = pyro.deterministic("x", A.x0(pyro.sample("path", A)), event_dim=1)
    with pyro.plate("measured", 2):
        y, mask = torch.tensor([2.0, 0.0]).double(), torch.tensor([True, False])
        pyro.sample("y", dist.Poisson(zeros(x) + 0.3), obs=y, obs_mask=mask)


def half_counted_table():
    rate = zeros(every(3)) + 0.3
    return law(A) * (-rate).exp() * rate.square() / 2, rate


def half_covariate():
    """A covariate that was measured once of twice, and is read."""
    with pyro.plate("measured", 2):
        z, mask = torch.tensor([0.5, 0.0]).double(), torch.tensor([True, False])
        prior = dist.Normal(torch.tensor(0.0).double(), 1.0)
        z = pyro.sample("z", prior, obs=z, obs_mask=mask)
    x = pyro.deterministic("x", A.x0(pyro.sample("path", A)), event_dim=1)
    mean = z.sum(-1, keepdim=True) + zeros(x)
    pyro.sample("y", dist.Normal(mean, 0.7), obs=torch.tensor(2.0).double())


def half_covariate_table():
    x = every(3)
    weight = law(A) * density(zeros(x) + 0.5, 2.0, math.sqrt(1.49))
    return weight * density(torch.tensor(0.0), 0.5, 1.0), zeros(x)


BITS = corr_bits(0.2)
BINARY = Absorbing(2)
BESIDE = ReverseChain(LatentKernel(BINARY, BINARY, BITS.denoiser(), Grid.joint(2)), 2)
CODES = ReverseChain(
    InterpolatingKernel(BINARY, CodeDenoiser(BITS.denoiser(), torch.full((2,), 2)), num_steps=1), 1
)
TOLD = InterpolatingKernel(BINARY, AtLatent(BITS.denoiser()), num_steps=2)
VECTORS = BITS.embedded(lambda x: 2.0 * x[:, :1, None] - 1.0)
NOISE = Gaussian("linear", t_min=0.2)
SMOOTH = ReverseChain(
    LatentKernel(BINARY, NOISE, VECTORS.denoiser(NOISE), Grid.sequential(1, 1)), 2
)


def beside():
    """Tokens and a code that are drawn at once; the program reads both."""
    path = pyro.sample("path", BESIDE)
    x = pyro.deterministic("x", BESIDE.x0(path), event_dim=1)
    code = pyro.deterministic("code", BESIDE.latent(path), event_dim=1)
    mean = zeros(x) + code[..., 0]
    pyro.sample("y", dist.Normal(mean, 0.7), obs=torch.tensor(2.0).double())


def beside_table():
    paths = BESIDE.enumerate_support()
    x, code = BESIDE.x0(paths), BESIDE.latent(paths)[:, 0]
    return BESIDE.log_prob(paths).exp() * density(zeros(x) + code, 2.0), zeros(x) * (code + 1)


def coded():
    """A code first, as a chain of its own, and the tokens given it."""
    code = CODES.x0(pyro.sample("latent", CODES))
    code = pyro.deterministic("code", code, event_dim=1)
    chain = ReverseChain(TOLD, 2, given={"latent": code})
    x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
    mean = zeros(x) + code[..., 0]
    pyro.sample("y", dist.Normal(mean, 0.7), obs=torch.tensor(2.0).double())


def coded_table():
    x, code = every(2)[:, None], torch.arange(2)
    value = zeros(x) + code
    return BITS.joint.reshape(4, 2) * density(value, 2.0), zeros(x) * (code + 1)


def smooth():
    """A continuous latent on the path of the chain, before its tokens."""
    path = pyro.sample("path", SMOOTH)
    x = pyro.deterministic("x", SMOOTH.x0(path), event_dim=1)
    code = pyro.deterministic("code", SMOOTH.latent(path)[..., 0], event_dim=1)
    mean = zeros(x) + code[..., 0]
    pyro.sample("y", dist.Normal(mean, 0.7), obs=torch.tensor(2.0).double())


def smooth_table():
    """By quadrature of the noise and of the finished latent, of equal weights."""
    points = torch.linspace(-6.0, 6.0, 241, dtype=torch.float64)
    mesh = float(points[1] - points[0])
    kernel, prior = SMOOTH.kernel, dist.Normal(torch.tensor(0.0).double(), 1.0)
    hidden = torch.full((241, 2), 2)
    first = kernel.resume({"tokens": hidden, "latent": points[:, None, None]})
    moves = kernel.step(first, 0).blocks["latent"].log_prob(points[:, None, None, None]).exp()
    finished = moves @ (prior.log_prob(points).exp() * mesh)  # (241,)
    second = kernel.resume({"tokens": hidden, "latent": points[:, None, None]})
    tokens = kernel.step(second, 1).blocks["tokens"].log_prob(every(2)[:, None]).exp()
    x, weight = zeros(every(2))[:, None], tokens * finished * mesh
    return weight * density(x + points, 2.0), x * (points + 1)


@dataclass(frozen=True)
class Row:
    words: str
    program: object
    table: object
    first: object = staticmethod(lambda s: zeros(s["x"]))


def with_code(s):
    return zeros(s["x"]) * (s["code"][..., 0] + 1)


HELD = clamp(plain, tokens=torch.tensor([0, 2]), mask=torch.tensor([False, True]))
TWISTED = twist(plain, logits=lambda carry, log_probs, k: LOGITS)
ROWS = {
    "unlike": Row("two chains of different length, alphabet, grid, kernel", unlike, unlike_table),
    "plate": Row("plate of sequences", plate, plate_table, lambda s: zeros(s["x"])[..., 0]),
    "continuous": Row("continuous latent", continuous, continuous_table),
    "discrete": Row("discrete latent", discrete, discrete_table),
    "late": Row("latent whose law depends on the sequence", late, continuous_table),
    "label": Row("chain given a label", label, label_table),
    "condition": Row("chain given a continuous latent", condition, condition_table),
    "second": Row("chain given another chain's clean sequence", second, second_table),
    "clamp": Row("clamp", HELD, clamped_table),
    "prompt": Row("prompt per row", prompted, prompted_table, lambda s: zeros(s["x"])[..., 0]),
    "twist": Row("twist", TWISTED, plain_table),
    "hint": Row("steering hint", hinted, plain_table),
    "obs_mask": Row("obs_mask", half_observed, half_observed_table, lambda s: s["y"][..., 1]),
    "counts": Row("obs_mask of counts", half_counted, half_counted_table, lambda s: s["y"][..., 1]),
    "covariate": Row("obs_mask of a covariate", half_covariate, half_covariate_table),
    "beside": Row("chain of tokens and a code (JOINT)", beside, beside_table, with_code),
    "coded": Row("code first, tokens given it (SEQ, two chains)", coded, coded_table, with_code),
    "smooth": Row("chain of a vector and tokens (SEQ)", smooth, smooth_table, with_code),
}
STEERED = {"unlike": "a", "second": "b", "coded": "path"}
"""Programs of several chains, and the one that is guided where a method takes them."""
SIZE = {"num_particles": 12, "num_runs": 200}
BITWISE = ("condition", "beside", "coded", "smooth")
"""Programs over two tokens."""


@cache
def expected(name):
    """Return the evidence and the posterior mean of the row's value."""
    weight, value = ROWS[name].table()
    total = weight.sum()
    return float(total), float((weight * value).sum() / total)


def smc(method, name):
    options = {
        "smc": {"twist": "persistent"},
        "steering": {"twist": "persistent"},
        "beam": {"num_children": 4},
        "tempering": {"powers": [0.0, 0.4, 1.0]},  # no pilot: the ladder is not what is tested
    }
    own = options.get(method, {})
    if methods()[method].needs.guide:  # free to be wrong: it likes the first token
        codes = torch.eye(2 if name in BITWISE else 3, dtype=torch.float64)
        guide = EmbeddedPotential(lambda e: e[..., 0].sum(-1), codes)
        # This one steers a chain among others.
        each = method == "aps-smc" and name in STEERED
        own = {**own, "guide": {STEERED[name]: guide} if each else guide}
    return SMC(ROWS[name].program, method=method, **SIZE, **own)


def gibbs(name, **options):
    shallow = {"max_tree_depth": 3}  # any depth leaves the law alone
    return ParticleGibbs(ROWS[name].program, num_particles=6, nuts=shallow, **options)


@cache
def refusal(method, name):
    """Return why a method does not take a program, None if it does."""
    try:
        if method == "particle-gibbs":
            gibbs(name, num_runs=1, num_samples=1, num_warmup=0).run(seed=0)
        else:
            smc(method, name).bind((), {})
    except CapabilityError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("method", methods())
def test_a_method_on_a_program(method, name):
    if (why := refusal(method, name)) is not None:
        assert why == declared(method, name)
        return
    posterior = smc(method, name).run(seed=7)
    if not methods()[method].exact:
        assert not posterior.exact
        assert bool((posterior.log_potential.amax(-1) > -torch.inf).all())
        return
    assert posterior.exact
    evidence, mean = expected(name)
    estimate = posterior.log_evidence.exp()
    means = torch.where(posterior.alive, posterior.expectation(ROWS[name].first), 0.0)
    assert abs(z_score(estimate, evidence)) < 4
    assert abs(z_score(estimate * means, evidence * mean)) < 4


def declared(method, name):
    """Return the sentence of the property that a method declares, for the programs here."""
    needs, owner = methods()[method].needs, methods()[method].__name__
    if needs.uniform:
        process = Absorbing(2 if name in BITWISE else 3)
        return (
            "SplitGibbs: a copy differs from its sequence by uniform noise, and the chain is one "
            f"of {process!r}; take a prior of the Uniform process, or another method."
        )
    if needs.guide and name in STEERED:
        return f"{owner}: it restores one chain, and there are 2; use SMC."
    if needs.own_moves and name == "twist":
        return (
            f"{owner} moves particles its own way and has no use for the twist of the program "
            "plain; take the twist off, or use another method."
        )
    if needs.free_chains and name in ("second", "coded"):
        chain = {"second": "b", "coded": "path"}[name]
        return (
            f"{owner}: the chain {chain!r} of {name} depends on the sequence of another one, which "
            "is moved again here; use SMC."
        )
    if needs.free_chains and name in ("beside", "smooth"):
        return (
            "SuffixRefresh: a LatentKernel remembers more than its tokens, so its steps cannot be "
            "taken again from a state; use OrderRefresh or no move."
        )
    if method == "aps-smc" and name in ("beside", "smooth"):
        kernel = {"beside": BESIDE, "smooth": SMOOTH}[name].kernel
        return (
            "AnchoredSMC: anchors are for masked chains at kappa=1 (InterpolatingKernel, or "
            f"OrderedKernel), which {kernel!r} is not; use method='smc'."
        )
    if method == "g2d2" and name in ("beside", "smooth"):
        kernel = {"beside": BESIDE, "smooth": SMOOTH}[name].kernel
        return (
            "G2D2: it noises whole sequences to a level of their own at every step, which "
            f"{kernel!r} does not have; use InterpolatingKernel, or OrderedKernel in one block."
        )
    if method == "aps" and name in ("beside", "smooth"):
        kernel = {"beside": BESIDE, "smooth": SMOOTH}[name].kernel
        return (
            f"AnchoredPosteriorSampler: it commits masks, group after group, which {kernel!r} does "
            "not have; use InterpolatingKernel or OrderedKernel over an Absorbing process."
        )
    if method == "corrector" and name in ("beside", "smooth"):
        kernel = {"beside": BESIDE, "smooth": SMOOTH}[name].kernel
        return (
            "Corrector: lockstep reveals need a masked chain at kappa=1 whose law is its "
            f"denoiser's, which {kernel!r} is not; use InterpolatingKernel or OrderedKernel "
            "(clock='mean'), or form='path' for other processes."
        )
    return "nothing is declared"


@pytest.mark.parametrize("name", ROWS)
def test_particle_gibbs_on_a_program(name):
    if (why := refusal("particle-gibbs", name)) is not None:
        assert "is discrete, which NUTS cannot move" in why
        assert name in ("discrete", "label")
        return
    posterior = gibbs(name, num_runs=60, num_samples=2, num_warmup=4).run(seed=3)
    values = ROWS[name].first(posterior.samples).mean(1)
    assert abs(z_score(values, expected(name)[1])) < 4  # chains are independent


@pytest.mark.parametrize("schedule", ["sequential", "interleaved"])
@pytest.mark.parametrize("method", ["smc", "twisted"])
@pytest.mark.parametrize("name", ["unlike", "second"])
def test_a_schedule_is_no_part_of_the_law(name, method, schedule):
    options = {"twist": "persistent"} if method == "smc" else {}
    posterior = SMC(ROWS[name].program, method=method, schedule=schedule, **SIZE, **options).run(
        seed=11
    )
    assert abs(z_score(posterior.log_evidence.exp(), expected(name)[0])) < 4
    lockstep = SMC(ROWS[name].program, method=method, num_particles=8, **options).run(seed=0)
    assert posterior.law == lockstep.law


# Mutants: what must be found out.


def many(name):
    size = {"num_particles": 12, "num_runs": 600, "ess_threshold": 2.0}
    # Moves draw latents anew, and would mend in part what is broken here.
    return SMC(ROWS[name].program, twist="persistent", moves=None, **size).run(seed=1)


def test_conditions_left_behind_by_their_particles_are_found_out(monkeypatch):
    def conditions_stay(state, ancestors):
        moved = take_particles(state, ancestors)
        for name, carry in state["sites"].items():
            if "given" in carry:
                moved["sites"][name]["given"] = carry["given"]
        return moved

    monkeypatch.setattr(Bound, "gather", staticmethod(conditions_stay))
    with pytest.raises(CapabilityError, match="moved under another 'label'"):
        many("label")


def test_latents_left_behind_by_their_particles_are_found_out(monkeypatch):
    def latents_stay(state, ancestors):
        return {**take_particles(state, ancestors), "latents": state["latents"]}

    monkeypatch.setattr(Bound, "gather", staticmethod(latents_stay))
    posterior = many("discrete")
    weight, _ = discrete_table()
    product = torch.arange(3) * zeros(every(3))[:, None]
    mean = posterior.expectation(lambda s: s["level"] * zeros(s["x"]))
    estimate = posterior.log_evidence.exp() * mean
    assert abs(z_score(estimate, float((weight * product).sum()))) > 6


def test_a_latent_whose_law_is_counted_twice_is_found_out(monkeypatch):
    start = Bound.open

    def forgets(self, state, group, generator):
        opened = start(self, state, group, generator)
        return {**opened, "log_r": torch.zeros_like(opened["log_r"])}

    monkeypatch.setattr(Bound, "open", forgets)
    posterior = many("discrete")
    assert abs(z_score(posterior.log_evidence.exp(), expected("discrete")[0])) > 6


# The page.


def page():
    """Return the table of what every method takes, in Markdown."""
    names = [*methods(), "particle-gibbs"]
    lines = [
        "# What every method takes",
        "",
        "Written by `tests/exact/test_support_matrix.py`, which holds every cell to enumeration.",
        "",
        "| program | " + " | ".join(f"`{name}`" for name in names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    reasons: dict[str, int] = {}
    for name, row in ROWS.items():
        cells = []
        for method in names:
            why = refusal(method, name)
            if why is not None:
                number = reasons.setdefault(why, len(reasons) + 1)
                cells.append(f"no ({number})")
            elif method == "particle-gibbs" or methods()[method].exact:
                cells.append("exact")
            else:
                cells.append("runs, no law")
        lines.append(f"| {row.words} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {why}" for why, number in reasons.items())]
    return "\n".join(lines) + "\n"


def test_the_page_says_what_is_so():
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
