"""Pyro programs as inference reads them: names, errors, and what is refused before a run."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import clamp, steer, twist
from ppl_diffusion.inference import SMC, ParticleGibbs
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.programs.reading import Program, _histories, trial_sequences
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.smc import FeynmanKac
from ppl_diffusion.smc.rejuvenation import SuffixRefresh
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import random_joint, toy_chain, toy_markov_chain, toy_potential

GOAL = toy_potential(3, 2)
PROMPT = torch.tensor([-1, 2])
STEERING, TWISTED, TEMPERING, CORRECTOR, IMPORTANCE_SAMPLING, BEST_OF_N, BEAM = (
    partial(SMC, method=name)
    for name in (
        "steering",
        "twisted",
        "tempering",
        "corrector",
        "importance-sampling",
        "best-of-n",
        "beam",
    )
)
LOOKING = [SMC, STEERING, TWISTED, TEMPERING]


def owner(method):
    """What errors call a method."""
    return "ParticleGibbs" if method is ParticleGibbs else method(design).owner


def design(chain):
    pyro.factor("goal", GOAL(chain.x0(pyro.sample("path", chain))))


def narrow(chain):
    """It does not broadcast: the sum runs over particles too."""
    x = chain.x0(pyro.sample("path", chain))
    pyro.factor("goal", (x == 0).sum().double())


def empty():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def held(program):
    return clamp(program, tokens=torch.tensor([1, 2]), mask=torch.tensor([True, False]))


@pytest.mark.parametrize(
    "wrap",
    [held, lambda program: steer(program, potential=GOAL), lambda program: held(held(program))],
)
def test_a_handler_around_a_program_leaves_its_name(wrap):
    assert Program(wrap(design), (toy_chain(),), {}).name == "design"
    assert Program(partial(wrap(design), toy_chain()), (), {}).name == "design"


def test_a_twisted_program_keeps_its_name():
    twisted = twist(design, proposal=lambda step, carry, k: step)
    assert Program(twisted, (toy_chain(),), {}).name == "design"


def test_an_object_goes_by_its_class():
    class Assay:
        def __call__(self, chain):
            design(chain)

    assert Program(Assay(), (toy_chain(),), {}).name == "Assay"


@pytest.mark.parametrize("method", [*LOOKING, CORRECTOR, ParticleGibbs])
def test_errors_name_the_method_and_advise_what_it_has(method):
    with pytest.raises(ValueError, match=f"^{owner(method)}: empty has no unobserved"):
        method(empty, num_particles=4).run()
    with pytest.raises(ValueError, match=f"^{owner(method)}: .*narrow") as caught:
        method(narrow, num_particles=4).run(toy_chain())
    assert str(caught.value).endswith("or pass vectorize_particles=False.")


def ordered_chain(length=2):
    process = Absorbing(3)
    denoiser = TableDenoiser(random_joint(3, length, seed=0), process)
    return ReverseChain(OrderedKernel(process, denoiser, length=length), length)


def first_state(chain):
    """Its density reads the state after the first step."""
    path = pyro.sample("path", chain)
    pyro.factor("f", (path[..., 1, :] == 1).sum(-1).double())


def pair(first, second):
    """The second of two chains is read before its end, by the law of a latent."""
    pyro.factor("f", -first.x0(pyro.sample("a", first)).sum(-1).double())
    masks = (pyro.sample("b", second)[..., 0, :] == 3).sum(-1).double()
    pyro.sample("z", dist.Normal(masks, 1.0))


TOKENS_ONLY = torch.arange(3).double()


def fails_on_masks(chain):
    path = pyro.sample("path", chain)
    pyro.factor("f", TOKENS_ONLY[path].sum((-1, -2)) * 0)


def shown(chain):
    """Only a deterministic site reads the path."""
    path = pyro.sample("path", chain)
    x = pyro.deterministic("x", chain.x0(path), event_dim=1)
    pyro.deterministic("revealed", (path != 3).double().sum(-1), event_dim=1)
    pyro.factor("f", (x == 0).sum(-1).double())


WITHOUT_PATHS = [
    STEERING,
    TWISTED,
    TEMPERING,
    IMPORTANCE_SAMPLING,
    partial(SMC, store_path=False),
    partial(SMC, store_path=False, vectorize_particles=False),
    ParticleGibbs,
]


@pytest.mark.parametrize("method", WITHOUT_PATHS)
def test_a_program_that_reads_the_path_is_refused(method):
    with pytest.raises(
        CapabilityError, match=f"{owner(method)}: first_state reads the path at site 'path'"
    ):
        method(first_state, num_particles=4).run(ordered_chain())
    with pytest.raises(CapabilityError, match=r"fails_on_masks reads the path .* store_path=True"):
        method(fails_on_masks, num_particles=4).run(ordered_chain())


def test_the_refusal_names_the_chain_that_is_read():
    with pytest.raises(CapabilityError, match="pair reads the path at site 'b'"):
        SMC(pair, store_path=False, num_particles=4).run(ordered_chain(), ordered_chain(3))


def test_whole_paths_are_read_where_they_are_kept():
    """E[exp f] over the first reveal: each position first with probability one half."""
    chain = ordered_chain()
    law = random_joint(3, 2, seed=0)
    ones = (law[1].sum() + law[:, 1].sum()) / 2
    posterior = SMC(first_state, num_particles=64, num_runs=200).run(chain, seed=0)
    evidence = float(1 + ones * (torch.e - 1))
    assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4  # false alarm 6e-5


@pytest.mark.parametrize("seed", range(20))
def test_the_trial_does_not_depend_on_luck(seed):
    with pytest.raises(CapabilityError, match="reads the path"):
        SMC(first_state, method="steering", num_particles=4).run(ordered_chain(), seed=seed)


def test_the_trial_has_every_token_of_a_small_alphabet_and_many_of_a_large_one():
    for size, distinct in ((3, 3), (8, 8), (50, 8)):
        chain = toy_markov_chain(vocab_size=size, length=4)
        clean = trial_sequences(ChainSite("path", chain), 8)
        assert clean.shape == (8, 4)
        assert all(len(set(column)) == distinct for column in clean.T.tolist())
        assert bool(((clean >= 0) & (clean < size)).all())


def test_the_trial_leaves_prompts_alone():
    site = ChainSite("path", toy_chain(num_steps=3, prompt=PROMPT))
    clean = trial_sequences(site, 8)
    assert bool((clean[:, 1] == 2).all())
    for path in _histories(clean, site):
        assert path.shape == (8, 4, 2)
        assert torch.equal(path[:, -1], clean)
        assert bool((path[..., 1] == 2).all())
        assert bool((path[:, 0, 0] == 3).all())


def test_the_trial_changes_no_draw(monkeypatch):
    run = SMC(shown, method="steering", num_particles=4).run
    posterior = run(ordered_chain(), seed=0)
    monkeypatch.setattr(Program, "_check", lambda self, sites: None)
    assert torch.equal(posterior.x0, run(ordered_chain(), seed=0).x0)


@pytest.mark.parametrize("method", [SMC, STEERING])
def test_a_deterministic_site_needs_the_path_it_reads(method):
    chain = ordered_chain()
    posterior = method(shown, num_particles=4).run(chain, seed=0)
    kept = posterior.samples
    assert "left_out" not in posterior.settings
    assert set(kept) == {"path", "x", "revealed"}
    assert bool((kept["revealed"] == torch.arange(3)).all())
    without = method(shown, num_particles=4, store_path=False).run(chain, seed=0)
    assert set(without.samples) == {"x"}
    assert without.settings["left_out"] == ["revealed"]


def test_methods_that_rate_ends_alone_say_what_they_leave_out():
    posterior = SMC(shown, method="soft-value", num_particles=4).run(ordered_chain(), seed=0)
    assert posterior.settings["left_out"] == ["revealed"]
    assert set(posterior.samples) == {"path", "x"}


def test_particle_gibbs_shows_deterministic_sites_of_whole_paths():
    options = {"num_particles": 4, "num_samples": 3, "num_warmup": 0, "num_runs": 2}
    samples = ParticleGibbs(shown, **options).run(ordered_chain(), seed=0).samples
    assert bool((samples["revealed"] == torch.arange(3)).all())


def noisy(chain):
    pyro.factor("f", chain.x0(pyro.sample("path", chain)).sum(-1) + torch.randn(()).double())


@pytest.mark.parametrize("method", [*WITHOUT_PATHS, partial(SMC, vectorize_particles=False)])
def test_a_program_that_is_random_given_its_values_is_refused(method):
    with pytest.raises(
        CapabilityError, match=r"site 'f' of noisy has another density when .* again"
    ):
        method(noisy, num_particles=4).run(toy_chain())


@pytest.mark.parametrize("method", [*LOOKING, CORRECTOR, ParticleGibbs])
def test_a_target_says_what_is_held(method):
    options = {"num_samples": 1, "num_warmup": 0} if method is ParticleGibbs else {}

    def target(program, chain):
        return method(program, num_particles=4, **options).run(chain, seed=0).target

    free, prompted = toy_chain(num_steps=2), toy_chain(num_steps=2, prompt=PROMPT)
    assert "clamped" not in target(design, free)
    assert "prompted" not in target(design, free)
    assert "clamped at 1 of 2 positions" in target(held(design), free)
    assert "prompted at 1 of 2 positions" in target(design, prompted)


@pytest.mark.parametrize(
    "method",
    [
        BEST_OF_N,
        BEAM,
        partial(SMC, method="soft-value", weighted=False),
    ],
)
def test_results_without_a_law_say_what_is_held_too(method):
    def target(program, chain):
        return method(program, num_particles=80).run(chain, seed=0).target

    free, prompted = toy_chain(num_steps=2), toy_chain(num_steps=2, prompt=PROMPT)
    assert "the chain is" not in target(design, free)
    both = target(held(design), prompted)
    assert both.endswith("; the chain is clamped at 1 of 2 positions, prompted at 1 of 2 positions")


def test_a_target_counts_what_is_held_over_plates():
    def program(chain):
        with pyro.plate("three", 3):
            x = chain.x0(pyro.sample("path", chain))
            pyro.factor("f", (x == 0).sum(-1).double())

    for method in (SMC, STEERING):
        posterior = method(held(program), num_particles=4).run(toy_chain(prompt=PROMPT), seed=0)
        assert "clamped at 3 of 6 positions, prompted at 3 of 6" in posterior.target


def test_a_bare_chain_says_what_it_was_prompted_with():
    chain = toy_chain(prompt=PROMPT)
    target = SMC(chain, GOAL, method="steering", num_particles=4).run(seed=0).target
    assert "reverse chain, prompted at 1 of 2 positions, normalised" in target
    assert FeynmanKac(chain, GOAL).target == target
    assert (
        FeynmanKac(toy_chain(), GOAL).target
        == SMC(toy_chain(), GOAL, method="steering").run(seed=0).target
    )


@pytest.mark.parametrize("method", LOOKING)
def test_whole_paths_are_no_draws_of_a_posterior(method):
    def program(chain):
        with pyro.plate("two", 2):
            x = pyro.deterministic("x", chain.x0(pyro.sample("tokens", chain)), event_dim=1)
            pyro.factor("f", (x == 0).sum(-1).double())

    data = method(program, num_particles=4).run(ordered_chain(), seed=0).to_arviz()
    assert set(data["sequences"].data_vars) == {"x0", "x"}
    shown = data["smc_history"]["tokens"]
    assert shown.shape == (1, 4, 2, 3, 2)
    assert shown.dims[2] == "two"
    assert shown.dims[-1] == "position"


@pytest.mark.parametrize("method", [*LOOKING, IMPORTANCE_SAMPLING, ParticleGibbs])
@pytest.mark.parametrize("number", [-3, 0, 2.5])
@pytest.mark.parametrize("name", ["num_particles", "num_runs"])
def test_counts_are_checked_before_anything(method, number, name):
    who = "ParticleGibbs" if method is ParticleGibbs else "SMC"  # the runner has the numbers
    with pytest.raises(ValueError, match=rf"^{who}: .*{name}.*>= .* got .*{number}"):
        method(design, **{name: number})


@pytest.mark.parametrize("method", [*LOOKING[1:], IMPORTANCE_SAMPLING, ParticleGibbs])
def test_the_marginal_of_a_chain_is_no_chain(method):
    with pytest.raises(TypeError, match=f"^{owner(method)}: .* ChainMarginal, .* pass the chain"):
        method(toy_chain().marginal(), GOAL, num_particles=4).run()


def test_smc_needs_a_target():
    with pytest.raises(TypeError, match=r"^SMC: a bare chain needs a potential; pass one"):
        SMC(toy_chain())
    with pytest.raises(TypeError, match=r"^SMC: .* got the distribution ChainMarginal"):
        SMC(toy_chain().marginal())
    with pytest.raises(TypeError, match=r"^SMC: .* got int"):
        SMC(3)


@pytest.mark.parametrize("method", [ParticleGibbs, TEMPERING])
@pytest.mark.parametrize(("moves", "found"), [(["x"], "str"), (SuffixRefresh(1), "SuffixRefresh")])
def test_moves_are_path_moves(method, moves, found):
    with pytest.raises(TypeError, match=rf"^{owner(method)}: moves must be .* got {found}\.$"):
        method(design, moves=moves)


def bonus(chain):
    """A factor that only some sequences have."""
    x = chain.x0(pyro.sample("path", chain))
    pyro.deterministic("x", x, event_dim=1)
    if bool((x == 0).all()):
        pyro.factor("bonus", torch.tensor(2.0).double())
        pyro.deterministic("special", x, event_dim=1)


@pytest.mark.parametrize("store_path", [True, False])
def test_sites_that_only_some_particles_have(store_path):
    chain = toy_chain(num_steps=2)
    program = SMC(
        bonus, num_particles=8, num_runs=80, vectorize_particles=False, store_path=store_path
    )
    posterior = program.run(chain, seed=0)
    assert "special" not in posterior.samples
    value = ExactChain.of(chain).evidence(lambda x: 2.0 * (x == 0).all(-1).double())
    assert abs(z_score(posterior.log_evidence.exp(), value)) < 4  # false alarm 6e-5


def test_a_path_that_adds_a_site_is_read():
    def program(chain):
        path = pyro.sample("path", chain)
        if bool((path == 3).any()):
            pyro.factor("masked", torch.tensor(1.0).double())

    with pytest.raises(CapabilityError, match="program reads the path"):
        SMC(program, method="steering", num_particles=4).run(ordered_chain())


def late(chain):
    """The law of the latent has other supports for other sequences."""
    x = chain.x0(pyro.sample("path", chain))
    z = pyro.sample("z", dist.Bernoulli((x == 0).double().mean(-1)))
    pyro.factor("f", z.double())


def branching(chain):
    """It broadcasts only as long as all particles take the same branch."""
    x = chain.x0(pyro.sample("path", chain))
    if bool((x == 0).any()):
        pyro.factor("f", torch.tensor(2.0).double())


@pytest.mark.parametrize("seed", range(40))
def test_what_depends_on_the_sequence_is_found_without_luck(seed):
    """Four random sequences of two positions out of three tokens look alike in one of 13 runs."""
    torch.manual_seed(seed)
    assert Program(late, (toy_chain(),), {}).redrawn == ["z"]
    with pytest.raises(ValueError, match="several particles"):
        Program(branching, (toy_chain(),), {})
