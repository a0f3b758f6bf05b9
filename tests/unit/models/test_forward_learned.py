"""Priors of learned noise: the contract of every family, and what is their own."""

import dataclasses
import json
from contextlib import contextmanager

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from training_toy import RECIPE, letters

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.models import ForwardLearned, MaskedDiffusion, UniformForwardLearned, load
from ppl_diffusion.models.forward_marginals import Baseline
from ppl_diffusion.models.forward_objective import ForwardObjective
from ppl_diffusion.models.samplers import SamplerSettings, make_chain
from ppl_diffusion.models.training import train
from ppl_diffusion.processes.couplings import Monotone, Sinkhorn
from ppl_diffusion.testing import ModelContract
from ppl_diffusion.testing.dense import all_states
from ppl_diffusion.testing.forward_learned_laws import ForwardLaw
from ppl_diffusion.testing.latent_toys import corr_bits

TINY = {"dim": 8, "depth": 1, "heads": 1, "num_steps": 2, "dropout": 0.0}


@contextmanager
def pyro_seed(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def exact(model, rows):
    """Return ``-log p(x0)`` by the sum over all paths of two steps."""
    chain = model.chain()
    states = all_states(model.process.num_states, model.length)
    n = len(states)
    first, middle = states.repeat_interleave(n, 0), states.repeat(n, 1)
    total = []
    for row in rows:
        paths = torch.stack([first, middle, row.expand_as(first)], 1)
        total.append(-torch.logsumexp(chain.log_prob(paths), 0))
    return torch.stack(total)


class Contract(ModelContract):
    steps = 2

    def least(self, model, rows):
        return exact(model, rows)


class TestMasks(Contract):
    def make_model(self):
        return ForwardLearned.build("abc", 2, **TINY)


class TestReveals(Contract):
    def make_model(self):
        return ForwardLearned.build("abc", 2, noise="reveals", **TINY)


class TestUniform(Contract):
    def make_model(self):
        return UniformForwardLearned.build("abc", 2, **TINY)


def spread(model):
    """Give a fresh model something to say."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def law_of(model, x, law):
    """Return the noise of a model as tables, and the bound of its chain by enumeration."""
    tables = ForwardLaw(law, x, model.marginals(x), model.steps_coupling)
    bound = tables.bound(lambda z, t: model.denoiser(z, t / model.num_steps).double())
    return tables, float(bound)


def exact_bound(model, x):
    """Return the bound of each sequence, ``(n,)``."""
    one = torch.ones(1, dtype=torch.float64)
    return torch.tensor([law_of(model, row[None], one)[1] for row in x], dtype=torch.float64)


@pytest.mark.parametrize("family", [ForwardLearned, UniformForwardLearned])
def test_the_bound_and_the_loss_are_worth_what_enumeration_says(family):
    """Four standard errors, 6e-5 per number; seeds are fixed."""
    model = spread(family.build("ab", 2, **{**TINY, "num_steps": 3}))
    x = all_states(2, 2)
    exact = exact_bound(model, x)
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        terms = model.bound_terms(x, num_times=800, generator=source)
        losses = [model.loss(x.repeat(30, 1), generator=source) for _ in range(60)]
    for values, expected in ((terms, exact), (torch.stack(losses), exact.mean())):
        error = values.std(0) / len(values) ** 0.5
        assert bool(((values.mean(0) - expected).abs() < 4 * error).all())


@pytest.mark.parametrize("family", [ForwardLearned, UniformForwardLearned])
def test_trace_elbo_of_model_and_guide_is_the_bound(family):
    """Four standard errors, 6e-5 per number; seeds are fixed."""
    model = spread(family.build("ab", 2, **{**TINY, "num_steps": 3}))
    x = all_states(2, 2)
    batch = x.repeat(100, 1)
    with pyro_seed(11), torch.no_grad():
        losses = [Trace_ELBO().loss(model.model, model.guide, batch) for _ in range(60)]
    values = torch.tensor(losses, dtype=torch.float64) / len(batch)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact_bound(model, x).mean()) < 4 * error


def test_svi_trains_noise_and_chain():
    """Also where Pyro has seen another prior before."""
    pyro.clear_param_store()
    with pyro_seed(3):
        other = ForwardLearned.build("ab", 2, **TINY)
        Trace_ELBO().loss(other.model, other.guide, torch.tensor([[0, 0], [1, 1]]))
        model = ForwardLearned.build("ab", 2, **TINY)
        rows = torch.tensor([[0, 0], [1, 1]]).repeat(32, 1)
        before = model.denoiser.noise.shown.clone()
        elbo = TraceGraph_ELBO()
        svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
        losses = [svi.step(rows) / len(rows) for _ in range(60)]
    pyro.clear_param_store()
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert not torch.equal(before, model.denoiser.noise.shown)


@pytest.mark.parametrize("family", [ForwardLearned, UniformForwardLearned])
def test_sampled_sequences_have_probability_one(family):
    model = spread(family.build("ab", 2, **TINY))
    assert float((-exact(model, all_states(2, 2))).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_masks_alone_show_a_token_or_the_mask():
    model = spread(ForwardLearned.build("abc", 2, noise="reveals", **TINY))
    x = all_states(3, 2)
    u = model.marginals(x).detach()
    assert u.shape == (3, 9, 2, 4)
    shown = u.gather(-1, x.expand(3, 9, 2)[..., None])[..., 0]
    torch.testing.assert_close(shown + u[..., 3], torch.ones_like(shown), rtol=0, atol=1e-12)
    torch.testing.assert_close(u.sum(-1), torch.ones_like(shown), rtol=0, atol=1e-12)
    assert float(shown[1].max() - shown[1].min()) > 1e-2  # it depends on the sequence


def test_the_coupling_is_saved_and_changes_the_bound(tmp_path):
    model = spread(UniformForwardLearned.build("ab", 2, **{**TINY, "num_steps": 3}))
    model.coupling = "independent"
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.coupling == "independent"
    x, bounds = all_states(2, 2), []
    for coupling in ("independent", "maximum"):
        again.coupling = coupling
        source = torch.Generator().manual_seed(1)
        bounds.append(again.bound_terms(x, num_times=400, generator=source).mean(0))
    assert float((bounds[0] - bounds[1]).abs().min()) > 1e-3


def test_soft_states_that_are_hard_are_states():
    model = spread(ForwardLearned.build("ab", 2, **TINY))
    z = all_states(3, 2)
    soft = model.denoiser.from_mixture(
        torch.nn.functional.one_hot(z, 3).double(), torch.full((9,), 1)
    )
    torch.testing.assert_close(soft, model.denoiser(z, 0.5), rtol=1e-5, atol=1e-5)


def masked(length=3, **shape):
    shape = {"dim": 8, "depth": 1, "heads": 1, "dropout": 0.0, "learned_positions": True, **shape}
    return spread(MaskedDiffusion.build("abc", length, **shape))


def test_it_starts_as_the_chain_of_a_masked_prior():
    prior = masked()
    model = ForwardLearned.starting_from(prior, num_steps=4, noise="reveals", dim=99).eval()
    assert model.denoiser.config.dim == 8
    assert (model.num_steps, model.denoiser.config.noise) == (4, "reveals")
    hidden = torch.full((1, 3), 3)
    log_x0 = prior.denoiser(hidden, 1.0)
    for t in (4, 3, 1):
        found = model.denoiser(hidden, t / 4)
        torch.testing.assert_close(found[..., 4:], log_x0, rtol=0, atol=1e-6)
        wanted = torch.cat([log_x0.exp() / t, torch.full((1, 3, 1), 1 - 1 / t)], -1)
        torch.testing.assert_close(
            found[..., :4].exp(), 0.999 * wanted + 0.001 / 4, rtol=0, atol=1e-5
        )
    seen = torch.tensor([[0, 3, 3]])
    assert model.denoiser(seen, 0.5)[0, 0, 0].exp().item() == pytest.approx(0.999 + 0.001 / 4)


def test_a_coupling_of_ones_own_is_taken_and_not_saved(tmp_path):
    own = Sinkhorn(torch.ones(3, 3).double() - torch.eye(3))
    model = spread(ForwardLearned.build("ab", 2, **{**TINY, "num_steps": 3}, coupling=own))
    x, source = all_states(2, 2), torch.Generator().manual_seed(7)
    with torch.no_grad():
        terms = model.bound_terms(x, num_times=400, generator=source)
    error = terms.std(0) / len(terms) ** 0.5
    assert bool(((terms.mean(0) - exact_bound(model, x)).abs() < 4 * error).all())
    with pytest.raises(TypeError, match="a Sinkhorn coupling cannot be saved"):
        model.save(tmp_path)
    model.coupling = "monotone"
    assert isinstance(model.steps_coupling, Monotone)
    with pytest.raises(ValueError, match="no coupling 'best'"):
        model.coupling = "best"


def test_a_running_mean_is_updated_behind_its_estimate(monkeypatch):
    """Before it the gradient would be biased: a draw would be its own baseline."""
    seen = []
    monkeypatch.setattr(Baseline, "at", lambda self, t: seen.append("at") or torch.zeros(len(t)))
    monkeypatch.setattr(Baseline, "update", lambda self, t, cost: seen.append("update"))
    objective = ForwardObjective(
        ForwardLearned.build("ab", 2, **TINY), steps=4, lead=0.0, warmup=0.0, draws=1
    )
    for step in range(2):
        objective.loss(all_states(2, 2), step)
    assert seen == ["at", "update"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = ForwardLearned.build("ab", 2, **TINY)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}


def test_what_is_no_start_is_refused():
    own = ForwardLearned.build("abc", 3, **TINY)
    assert ForwardLearned.starting_from(own, num_steps=2, dim=99) is own
    for shape in ({"num_steps": 7}, {"noise": "reveals"}):
        with pytest.raises(ValueError, match="is another network; start from a masked prior"):
            ForwardLearned.starting_from(own, **shape)
    with pytest.raises(ValueError, match="give both the same one"):
        ForwardLearned.build("abc", 3, **TINY).denoiser.start_from(masked().denoiser)
    assert UniformForwardLearned.starting_from(masked()).family == "masked"


def test_training_starts_from_a_masked_prior(tmp_path):
    """By default that of the recipe; the run says which."""
    masked(8, stem_width=3, dim=16, heads=2).save(tmp_path / "start")
    rows = torch.arange(3)[:, None].expand(3, 8).repeat(16, 1)
    data = dataclasses.replace(letters(), train=rows, valid=rows[:16], test=rows[:8],
                               related=rows, vocabulary="abc")  # fmt: skip
    data = dataclasses.replace(data, related_weights=torch.ones(len(rows)).double())
    recipe = dataclasses.replace(
        RECIPE, family="forward-learned", objective="fldd", steps=10, shares=(1.0, 1.0),
        init=str(tmp_path / "start"), shape={**RECIPE.shape, "num_steps": 3}, valid_times=2,
    )  # fmt: skip
    run = train("toy", out=tmp_path / "run", recipe=recipe, sequences=data, quiet=True)
    assert run.program.num_steps == 3
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["init"] == recipe.init
    assert 0.0 <= record["notes"]["reach_low"] < record["notes"]["reach_high"] <= 1.0
    other = dataclasses.replace(recipe, family="forward-learned-uniform")
    with pytest.raises(ValueError, match="is masked over 8 tokens of 'abc', but toy needs forward"):
        train("toy", out=tmp_path / "other", recipe=other, sequences=data, quiet=True)


@pytest.mark.parametrize("noise", ["tokens", "reveals", "positions"])
def test_positions_alone_ignore_the_sequence(noise):
    model = ForwardLearned.build("abc", 3, **TINY, noise=noise)
    x = all_states(3, 3)
    u = model.marginals(x).detach()
    shown = u.gather(-1, x.expand(u.shape[:-1])[..., None])[..., 0]
    differs = bool((shown[1] - shown[1, :1]).abs().max() > 1e-9)
    assert differs == (noise != "positions")
    assert float(shown[1].std(-1).min()) > 0.1  # positions differ from the start


def test_there_is_one_sampler():
    model = ForwardLearned.build("abc", 3, **TINY)
    assert make_chain(model).num_steps == make_chain(model, "ancestral").num_steps == 2
    with pytest.raises(CapabilityError, match="has 2 steps, not 5"):
        make_chain(model, settings=SamplerSettings(num_steps=5))
    with pytest.raises(ValueError, match="there is one sampler"):
        make_chain(model, "psi")
    with pytest.raises(ValueError, match="there is one sampler"):
        make_chain(model, settings=SamplerSettings(filters=("nucleus:0.9",)))


def test_a_network_learns_what_enumeration_says_is_best():
    """Masks of two steps leave 0.19 nats. Half a minute of training in the benchmark leaves .004;
    a few seconds here come half the way."""
    torch.manual_seed(0)
    problem = corr_bits(0.05)
    x = all_states(2, 2)
    data = problem.log_prob(x).exp()
    shape = {"dim": 32, "depth": 2, "heads": 2, "dropout": 0.0, "learned_positions": True}
    model = ForwardLearned.build("01", 2, num_steps=2, **shape)
    steps = 400
    objective = ForwardObjective(model, steps=steps)
    optimiser = torch.optim.AdamW(model.denoiser.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(steps):
        optimiser.zero_grad()
        objective.loss(x[torch.multinomial(data, 128, True)], step).backward()
        optimiser.step()
    tables, bound = law_of(model.eval(), x, data)
    assert tables.entropy < bound < tables.entropy + 0.09


@pytest.mark.parametrize("options", [{}, {"draws": 1}, {"lead": 0.0, "warmup": 1.0}, {"every": 3}])
def test_the_objective_trains_and_notes_the_reach(options):
    torch.manual_seed(0)
    model = ForwardLearned.build("ab", 2, **TINY)
    objective = ForwardObjective(model, steps=40, **options)
    optimiser = torch.optim.AdamW(model.denoiser.parameters(), lr=1e-2)
    rows = torch.tensor([[0, 0], [1, 1]]).repeat(32, 1)
    losses = []
    for step in range(40):
        optimiser.zero_grad()
        loss = objective.loss(rows, step)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    notes = objective.notes()
    assert 0 <= notes["reach_low"] <= notes["reach_high"] <= 1
    again = ForwardObjective(model, steps=40, **options)
    again.load_state_dict(objective.state_dict())
    means, kept = (o.state_dict()["baseline"] for o in (objective, again))
    assert kept == pytest.approx(means, nan_ok=True)


def test_noise_learns_at_every_so_many_steps():
    model = spread(ForwardLearned.build("ab", 2, **TINY))
    objective = ForwardObjective(model, steps=10, lead=0.0, warmup=0.0, every=3)
    rows, moved = all_states(2, 2), []
    for step in range(4):
        model.denoiser.zero_grad(set_to_none=True)
        objective.loss(rows, step).backward()
        moved.append(model.denoiser.noise.shown.grad is not None)
    assert moved == [True, False, False, True]


def test_a_bound_below_the_entropy_is_an_error():
    model = spread(ForwardLearned.build("ab", 2, **TINY))
    objective = ForwardObjective(model, steps=300, warmup=0.0, entropy=100.0)
    rows = all_states(2, 2)
    for step in range(199):
        objective.loss(rows, step)
    with pytest.raises(ValueError, match="below the entropy of the data, 100"):
        objective.loss(rows, 199)


def test_a_running_mean_starts_with_what_it_sees_first():
    baseline = Baseline(2, decay=0.5)
    assert baseline.at(torch.tensor([1, 2])).tolist() == [0, 0]
    baseline.update(torch.tensor([1, 2]), torch.tensor([[1.0, 5.0], [3.0, 7.0]]))
    assert baseline.at(torch.tensor([2, 1])).tolist() == [6, 2]
    baseline.update(torch.tensor([1]), torch.tensor([[4.0]]))
    assert baseline.at(torch.tensor([1])).tolist() == [3]


def test_what_cannot_be_is_refused():
    model = ForwardLearned.build("ab", 2, **TINY)
    with pytest.raises(CapabilityError, match="has 2 steps, not 8"):
        model.chain(8)
    with pytest.raises(CapabilityError, match="give it as a likelihood"):
        model.chain(prompt=torch.tensor([0, -1])).sample()
    with pytest.raises(CapabilityError, match="no classes"):
        model.loss(all_states(2, 2), labels=torch.zeros(4).long())
    with pytest.raises(ValueError, match="no coupling 'best'"):
        ForwardLearned(model.denoiser, vocabulary="ab", length=2, coupling="best")
    with pytest.raises(ValueError, match="has noise that is given"):
        ForwardObjective(MaskedDiffusion.build("ab", 2, dim=8, depth=1, heads=1), steps=1)
    for options in (
        {"warmup": 2.0},
        {"lead": 0.9},
        {"temperatures": (0.1, 1.0)},
        {"temperatures": (1.0, float("nan"))},
        {"temperatures": ()},
        {"entropy": float("nan")},
        {"temperatures": (0.0, 1.0)},
        {"draws": 0},
        {"every": 0},
    ):
        with pytest.raises(ValueError, match="fldd"):
            ForwardObjective(model, steps=1, **options)
    for wrong in ([[0, 2]], [[0, 1, 0]], [0, 1], [[0.0, 1.0]]):  # a mask, lengths, no batch, floats
        for ask in (model.marginals, model.bound_terms, model.loss, model.guide):
            with pytest.raises(ValueError, match="clean sequences are int64 ids 0 to 1"):
                ask(torch.tensor(wrong))
    with pytest.raises(TypeError, match=r"fldd: every must be a whole number, got 1\.5"):
        ForwardObjective(model, steps=1, every=1.5)
    for shape in ({"num_steps": 0}, {"num_steps": 2.5}, {"num_classes": 3}, {"kind": "cavity"}):
        with pytest.raises(ValueError, match="DirectConfig"):
            ForwardLearned.build("ab", 2, **{**TINY, **shape})
    with pytest.raises(ValueError, match="needs a mask"):
        UniformForwardLearned.build("ab", 2, noise="reveals", **TINY)
