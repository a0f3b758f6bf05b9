"""Options, refusals, costs and small parts of the rivals of anchored posterior sampling."""

import math
from dataclasses import replace

import pyro
import pytest
import torch

from ppl_diffusion.denoisers import Transformer, TransformerConfig
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import G2D2, SMC, ClassifierGuidance, RelaxedDPS, SplitGibbs, methods
from ppl_diffusion.inference.embedded_guide import distinct_points, score_at
from ppl_diffusion.inference.renoising import masked_again, masks_after, nucleus
from ppl_diffusion.inference.split_gibbs import log_accept, mismatch_log_odds
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel, Uniform
from ppl_diffusion.potentials import EmbeddedPotential, factor
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.testing.anchored_toys import measured_toy

TOY = measured_toy()
CHAIN = ReverseChain(InterpolatingKernel(TOY.process, TOY.denoiser, num_steps=4), 4)
ORDERED = ReverseChain(OrderedKernel(TOY.process, TOY.denoiser, length=4), 4)
NAMES = ("g2d2", "d-cbg", "relaxed-dps", "split-gibbs")


@pytest.mark.parametrize("name", NAMES)
def test_they_are_registered_and_claim_nothing(name):
    cls = methods()[name]
    assert cls().name == name
    assert not cls.exact
    assert not cls.needs.any_target


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("chain", [CHAIN, ORDERED], ids=["grid", "ordered"])
def test_results_say_what_they_are_and_can_be_kept(name, chain, tmp_path):
    posterior = SMC(chain, TOY.potential, method=name, num_particles=8, num_runs=2).run(seed=0)
    assert not posterior.exact
    assert posterior.target.startswith("no declared law: ")
    assert bool(posterior.log_evidence.isnan().all())
    torch.testing.assert_close(posterior.log_weights.exp(), torch.full((2, 8), 1 / 8).double())
    again = ParticlePosterior.load(posterior.save(tmp_path / "run"))
    assert again.settings["method"] == name
    assert again.law == posterior.law


@pytest.mark.parametrize("name", NAMES[:3])
def test_equal_seeds_give_equal_results(name):
    runner = SMC(CHAIN, TOY.potential, method=name, num_particles=16)
    assert torch.equal(runner.run(seed=4).x0, runner.run(seed=4).x0)
    assert not torch.equal(runner.run(seed=4).x0, runner.run(seed=5).x0)


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("transition", ["star", "markov"])
def test_prompts_and_clamps_are_held(name, transition):
    prompt = torch.tensor([2, -1, -1, -1])
    chain = ReverseChain(CHAIN.kernel, 4, prompt=prompt)
    mask = torch.tensor([False, False, False, True])

    def program():
        factor("y", TOY.potential, chain.x0(pyro.sample("path", chain)))

    held = clamp(program, tokens=torch.tensor([0, 0, 0, 1]), mask=mask)
    options = {"transition": transition} if name == "g2d2" else {}
    runner = SMC(held, method=name, guide=TOY.potential, num_particles=32, **options)
    x0 = runner.run(seed=0).x0
    assert bool((x0[..., 0] == 2).all())
    assert bool((x0[..., 3] == 1).all())


@pytest.mark.parametrize("name", NAMES[:3])
def test_elements_of_a_plate_are_steered_each_by_itself(name):
    chain = CHAIN.expand((3,))
    posterior = SMC(chain, TOY.potential, method=name, num_particles=8).run(seed=0)
    assert tuple(posterior.x0.shape) == (1, 8, 3, 4)


# G2D2.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transition": "moon"}, "transition is 'moon'; choose 'star' or 'markov'"),
        ({"preset": "best"}, "unknown preset 'best'"),
        ({"num_iterations": -1}, "num_iterations must be >= 0"),
        ({"forget": 0.0}, "forget must lie above 0"),
        ({"top_p": 1.5}, "top_p must lie above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite"),
        ({"kl_weight": -1.0}, "kl_weight must be finite and >= 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_options_of_tables_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        G2D2(**options)


def test_rates_are_the_published_ones():
    """``lr * 10**linspace(w / 2, -w / 2)`` and ``3e-4 * 10**linspace(1, -1)``."""
    for preset, rate, decades in (("super-resolution", 10.0, 2.0), ("deblurring", 15.0, 1.0)):
        found = [G2D2(preset=preset).rates(k, 100) for k in range(100)]
        rates, weights = torch.tensor(found, dtype=torch.float64).T
        steps = torch.linspace(decades / 2, -decades / 2, 100, dtype=torch.float64)
        torch.testing.assert_close(rates, rate * 10**steps)
        torch.testing.assert_close(
            weights, 3e-4 * 10 ** torch.linspace(1, -1, 100, dtype=torch.float64)
        )
    assert G2D2(learning_rate=2.0, decades=0.0).rates(3, 8)[0] == 2.0
    assert G2D2().rates(0, 1) == (10.0, 3e-4)


def test_the_nucleus_holds_the_mass_that_is_asked_for():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.94, 0.005, 0.005]]).double()
    kept = nucleus(p.log(), 0.95) > -torch.inf
    assert kept.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert nucleus(p.log(), 1.0) is not None
    assert bool((nucleus(p.log(), 1e-9) > -torch.inf).sum(-1).eq(1).all())


def test_so_many_free_sites_are_masked_again():
    x0, fixed = torch.zeros(500, 4, dtype=torch.int64), torch.tensor([True, False, False, False])
    free, two = ~fixed.expand(500, 4), torch.full((500,), 2)
    masked = masked_again(x0, two, 9, free, torch.Generator().manual_seed(0)) == 9
    assert bool((masked.sum(-1) == 2).all())
    assert not bool(masked[:, 0].any())
    share = masked[:, 1:].double().mean(0)
    assert bool((share - 2 / 3).abs().max() < 4 * math.sqrt(2 / 9 / 500))  # false alarm 2e-4
    every = masked_again(x0, torch.full((500,), 9), 9, free, None) == 9
    assert torch.equal(every, free)


@pytest.mark.parametrize("size", [4, 10, 20])
def test_masks_fall_with_the_steps(size):
    """One by one, whatever the grid rounds to; of known sites none is counted."""
    grid = InterpolatingKernel(TOY.process, TOY.denoiser, num_steps=size)
    for kernel in (grid, OrderedKernel(TOY.process, TOY.denoiser, length=size)):
        found = [masks_after(kernel, k, torch.tensor([size, size // 2])) for k in range(size)]
        assert [int(each[0]) for each in found] == list(range(size - 1, -1, -1))
        assert [int(each[1]) for each in found] == [k // 2 for k in range(size - 1, -1, -1)]


@pytest.mark.parametrize("chain", [CHAIN, ORDERED], ids=["grid", "ordered"])
@pytest.mark.parametrize("held", [None, "prompt", "clamp"])
def test_the_star_form_revises_all_that_is_not_known(chain, held):
    """Tokens that were visible are masked again, at every step as many as the step says."""
    base, kernel = chain, chain.kernel
    if held == "prompt":
        base = ReverseChain(kernel, 4, prompt=torch.tensor([2, -1, -1, 1]))

    def program():
        x = pyro.deterministic("x", base.x0(pyro.sample("path", base)))
        factor("y", TOY.potential, x)

    model = program
    if held == "clamp":
        known = torch.tensor([True, False, False, True])
        model = clamp(program, tokens=torch.tensor([2, 0, 0, 1]), mask=known)
    for form in ("star", "markov"):
        method = G2D2(guide=TOY.potential, transition=form, num_iterations=0)
        posterior = SMC(model, method=method, num_particles=64).run(seed=0)
        path = posterior.path
        assert path is not None
        masked = path[0] == 4  # (N, T + 1, L)
        again = (~masked[:, :-1] & masked[:, 1:]).any((0, 1))
        if form == "markov":
            assert not bool(again.any())
        elif held is None:
            assert bool(again.all())
            assert masked.sum(-1).tolist() == [[4, 3, 2, 1, 0]] * 64
        else:
            assert again.tolist() == [False, True, True, False]
            assert masked[:, 1:].sum(-1).tolist() == [[1, 1, 0, 0]] * 64


def test_a_nucleus_of_next_to_nothing_is_the_likeliest_token():
    one = ReverseChain(InterpolatingKernel(TOY.process, TOY.denoiser, num_steps=1), 4)
    likeliest = TOY.denoiser(torch.full((1, 4), 4), 1.0).argmax(-1)
    method = G2D2(num_iterations=0, top_p=1e-9)
    found = SMC(one, TOY.potential, method=method, num_particles=64).run(seed=0).x0[0]
    assert bool((found == likeliest).all())
    drawn = SMC(one, TOY.potential, method=replace(method, top_p=1.0), num_particles=64)
    assert len(drawn.run(seed=0).x0[0].unique(dim=0)) > 10


def test_a_batch_of_tables_is_what_its_rows_are_alone():
    """Losses are summed: nobody's step depends on who else is there."""
    method = G2D2(num_iterations=5)
    log_d = TOY.denoiser(torch.tensor([[[4, 4, 4, 4], [4, 1, 4, 4]]]), 1.0)
    noiseless = replace(method, temperature=1.0)
    together = noiseless._fitted(TOY.potential, log_d, None, (0.5, 1e-3), _Fixed())
    alone = [
        noiseless._fitted(TOY.potential, log_d[:, i : i + 1], None, (0.5, 1e-3), _Fixed())
        for i in range(2)
    ]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=1e-9)


class _Fixed:
    """No generator at all: see the fixture below."""


@pytest.fixture(autouse=True)
def _no_noise(request, monkeypatch):
    if "batch_of_tables" in request.node.name:
        monkeypatch.setattr(
            "ppl_diffusion.inference.star.uniforms",
            lambda shape, generator, device: torch.full(shape, 0.3, dtype=torch.float64),
        )


def test_other_potentials_are_fitted_by_their_own_value():
    bare = EmbeddedPotential(TOY.potential.embedded, TOY.potential.codebook, name="bare")
    posterior = SMC(CHAIN, bare, method="g2d2", num_particles=64).run(seed=0)
    alone = SMC(CHAIN, bare, method=G2D2(num_iterations=0), num_particles=64).run(seed=0)
    assert float(posterior.log_potential.mean()) > float(alone.log_potential.mean())


def test_nothing_is_fitted_where_all_is_known():
    prompt = torch.tensor([0, 3, 3, 1])
    before = TOY.potential.num_embedded
    chain = ReverseChain(CHAIN.kernel, 4, prompt=prompt)
    posterior = SMC(chain, TOY.potential, method="g2d2", num_particles=4).run(seed=0)
    assert bool((posterior.x0 == prompt).all())
    assert TOY.potential.num_embedded - before <= 2  # the end alone is asked about


# Split Gibbs.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_sweeps": 0}, "num_sweeps must be >= 1"),
        ({"num_moves": 0}, "num_moves must be >= 1"),
        ({"last_time": 0.0}, "last_time must lie above 0"),
        ({"output": "both"}, "output is 'both'"),
    ],
)
def test_options_of_sweeps_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        SplitGibbs(**options)


def test_a_copy_at_full_noise_knows_nothing_of_its_sequence():
    assert mismatch_log_odds(0.0, 7) == pytest.approx(0, abs=1e-12)
    assert mismatch_log_odds(1.0, 7) == -math.inf


def test_a_forbidden_copy_moves_until_it_is_allowed():
    old = torch.tensor([-torch.inf, -torch.inf, 0.0])
    new = torch.tensor([-torch.inf, -3.0, -torch.inf])
    apart = torch.tensor([0, 0, 0])
    assert log_accept(old, new, apart, -1.0).tolist() == [0.0, math.inf, -math.inf]
    assert log_accept(old[2:], old[2:], apart[2:], -math.inf).tolist() == [0.0]


def test_copies_of_clamped_chains_are_refused():
    kernel = InterpolatingKernel(Uniform(4), _uniform_denoiser(), num_steps=2)
    chain = ReverseChain(kernel, 4)

    def program():
        factor("y", TOY.potential, chain.x0(pyro.sample("path", chain)))

    held = clamp(program, tokens=torch.zeros(4).long(), mask=torch.arange(4) < 1)
    with pytest.raises(CapabilityError, match="the site 'path' is clamped"):
        SMC(held, method="split-gibbs").run(seed=0)

    def two():
        x0 = chain.x0(pyro.sample("a", chain))
        factor("y", TOY.potential, x0)
        pyro.sample("b", chain)

    with pytest.raises(CapabilityError, match="it makes a copy of one chain, and there are 2"):
        SMC(two, method="split-gibbs").run(seed=0)


def _uniform_denoiser():
    def denoiser(tokens, t, /):
        return torch.full((*tokens.shape, 4), -math.log(4), dtype=torch.float64)

    denoiser.kind, denoiser.time_free, denoiser.vocab_size = "cavity", True, 4
    return denoiser


# Tilted steps.


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: ClassifierGuidance(gamma=-1.0), "gamma must be finite and >= 0"),
        (lambda: ClassifierGuidance(mode="second"), "mode is 'second'"),
        (lambda: RelaxedDPS(zeta=math.inf), "zeta must be finite"),
        (lambda: RelaxedDPS(form="half"), "form is 'half'"),
        (lambda: RelaxedDPS(form="full", second_order=True), "use form='cheap'"),
    ],
)
def test_options_of_tilts_are_checked(method, words):
    with pytest.raises(ValueError, match=words):
        method()


@pytest.mark.parametrize(
    "method", [ClassifierGuidance(gamma=0.0), RelaxedDPS(zeta=0.0)], ids=["d-cbg", "relaxed-dps"]
)
def test_a_tilt_of_strength_zero_is_the_chain(method):
    weighted = replace(method, weighted=True, twist=None)
    posterior = SMC(CHAIN, TOY.potential, method=weighted, num_particles=64).run(seed=0)
    log_w = posterior.log_weights - posterior.log_weights.logsumexp(-1, keepdim=True)
    expected = torch.log_softmax(posterior.log_potential, -1)
    torch.testing.assert_close(log_w, expected, rtol=0, atol=1e-9)


def test_equal_points_are_differentiated_once():
    guide = EmbeddedPotential(lambda e: e.square().sum((-2, -1)), TOY.potential.codebook)
    points = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[1.0, 2.0]]], dtype=torch.float64)
    torch.testing.assert_close(score_at(guide, points), 2 * points)
    assert guide.num_embedded == 2
    rows, inverse = distinct_points(points)
    assert torch.equal(rows[inverse], points)


def test_guides_without_a_gradient_are_refused():
    flat = EmbeddedPotential(
        lambda e: e.detach().sum((-2, -1)), TOY.potential.codebook, name="flat"
    )
    steep = EmbeddedPotential(
        lambda e: (e * 0).sqrt().sum((-2, -1)), TOY.potential.codebook, name="steep"
    )
    with pytest.raises(PotentialError, match="flat: log G has no gradient"):
        SMC(CHAIN, flat, method="relaxed-dps", num_particles=4).run(seed=0)
    with pytest.raises(PotentialError, match="steep: the gradient of log G is not finite"):
        SMC(CHAIN, steep, method="d-cbg", num_particles=4).run(seed=0)


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_full_form_differentiates_a_transformer(conditioned):
    config = TransformerConfig(
        vocab_size=4,
        num_states=5,
        max_length=4,
        dim=8,
        depth=1,
        heads=2,
        time_conditioning=conditioned,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Transformer(config).eval()
        torch.nn.init.normal_(network.vocabulary.weight)
    chain = ReverseChain(InterpolatingKernel(TOY.process, network, num_steps=3), 4)
    options = {"method": "relaxed-dps", "num_particles": 8}
    full = SMC(chain, TOY.potential, form="full", **options).run(seed=0)
    cheap = SMC(chain, TOY.potential, **options).run(seed=0)
    assert not torch.equal(full.x0, cheap.x0)
    assert full.num_evaluations >= 3 * 8 + cheap.num_evaluations - 1
    assert all(p.grad is None for p in network.parameters())
