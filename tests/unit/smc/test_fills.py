"""Completions and steps that touch what they need are, bit for bit, those of the plain form.

The plain form: float64 tables of all sites, normalised everywhere, from which everything is drawn.
"""

from functools import partial

import pytest
import torch

from ppl_diffusion.deferred import deferred_checks
from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.denoisers.prediction import DensePrediction, HeadPrediction
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.kernels.base import GIVEN, Kernel
from ppl_diffusion.kernels.completions import TableCompletions
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.mixture import (
    log_posterior_mean,
    mixture_log_prob,
    mixture_sample,
    posterior_to_cavity,
)
from ppl_diffusion.processes.noise import likeliest
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.smc.twists import FillTwist

V, L, T, N = 5, 6, 7, 40
ABSORBING, UNIFORM = Absorbing(V), Uniform(V)


class Network:
    """Rows that depend on the neighbours, on the time and on a condition, in any shape there is."""

    vocab_size, time_free = V, False

    def __init__(self, *, kind="cavity", head=False, mask=False, dtype=torch.float32, given=False):
        generator = torch.Generator().manual_seed(3)
        self.kind, columns = kind, V + mask
        self.embedding = torch.randn(V + 1, 3, generator=generator).to(dtype)
        self.weight = torch.randn(3, columns, generator=generator).to(dtype)
        if head:
            self.hidden_size, self.hidden, self.head = 3, self._hidden, self._head
        if given:
            self.conditions = {"shift": 0}

    def _hidden(self, tokens, t, shift=None):
        hidden = self.embedding[tokens.roll(1, -1)] + self.embedding[tokens.roll(-1, -1)]
        time = torch.as_tensor(t).to(hidden.dtype).expand(tokens.shape[:-1])[..., None, None]
        moved = 0.0 if shift is None else shift.to(hidden.dtype)[..., None, None]
        return hidden * (1 + time) + moved

    def _head(self, hidden):
        return (hidden @ self.weight).log_softmax(-1)

    def __call__(self, tokens, t, **given):
        return self._head(self._hidden(tokens, t, **given))


class OnGrid(InterpolatingKernel):
    def on_events(self, free):
        return None


class PlainStep(TokenStep):
    """The three-way mixture of a table."""

    def draw(self, u_move, u_token):
        log_c = self.log_probs.expand(*u_move.shape, -1)
        tokens, (a, b, kappa) = self.tokens.expand_as(u_move), self._levels
        moved = mixture_sample(self.process, tokens, log_c, a, b, u_move, u_token, kappa)
        return moved if self.fixed is None else torch.where(self.fixed, tokens, moved)

    def _site_log_probs(self, tokens, value):
        log_c = self.log_probs.expand(*value.shape, -1)
        return mixture_log_prob(self.process, tokens, value, log_c, *self._levels)


class Plain(OnGrid):
    def table(self, carry, k):
        tokens, a = carry["tokens"], float(self.alphas[k])
        output = self.denoiser(tokens, float(self.times[k]), **carry.get(GIVEN, {}))
        if output.shape[-1] > V:
            output = output[..., :V].log_softmax(-1)
        log_c = output.double()
        log_c = log_c - log_c.exp().sum(-1, keepdim=True).log()
        if self.denoiser.kind == "posterior":
            log_c = posterior_to_cavity(self.process, tokens, log_c, a)
        return log_c

    def step(self, carry, k, *, fixed=None):
        a, b = (float(x) for x in self.alphas[k : k + 2])
        args = self.process, carry["tokens"], self.table(carry, k), a, b, self.site_kappa(carry, k)
        return PlainStep(*args, fixed=fixed, validate_args=False)

    def completions(self, carry, k):
        log_c = self.table(carry, k)
        mean = log_posterior_mean(self.process, carry["tokens"], log_c, float(self.alphas[k]))
        return TableCompletions(mean)


NETWORKS = {
    "dense": {},
    "float64": {"dtype": torch.float64},
    "head": {"head": True},
    "mask column": {"mask": True},
    "posterior": {"kind": "posterior"},
    "posterior head": {"kind": "posterior", "head": True},
    "conditions": {"given": True},
    "conditions head": {"given": True, "head": True},
}


def run(kind, process, options, twist, *, plates=(), kappa=1.0, **more):
    network = Network(**options)
    kernel = kind(process, network, num_steps=T, kappa=kappa)
    prompt = torch.tensor([2, *[-1] * (L - 1)])
    given = {"shift": torch.tensor(0.3)} if options.get("given") else None
    chain = ReverseChain(kernel, L, prompt=prompt, given=given).expand(plates)
    model = FeynmanKac(chain, lambda x0: (x0 == 1).sum(-1) * 0.7, twist=twist)
    generator = torch.Generator().manual_seed(11)
    return run_smc(model, N, num_runs=2, generator=generator, **more)


@pytest.mark.filterwarnings("ignore:twist='sample'")
@pytest.mark.parametrize("twist", ["argmax", "persistent", "sample", "defensive"])
@pytest.mark.parametrize("process", [ABSORBING, UNIFORM], ids=["masked", "uniform"])
@pytest.mark.parametrize("name", NETWORKS)
def test_runs_are_those_of_the_plain_form(name, process, twist):
    lazy, plain = (run(kind, process, NETWORKS[name], twist) for kind in (OnGrid, Plain))
    assert torch.equal(lazy.path, plain.path)
    assert torch.equal(lazy.log_evidence, plain.log_evidence)
    assert torch.equal(lazy.log_weights, plain.log_weights)


@pytest.mark.parametrize("process", [ABSORBING, UNIFORM], ids=["masked", "uniform"])
@pytest.mark.parametrize("options", [{}, {"head": True}], ids=["dense", "head"])
def test_plates_and_corrections(options, process):
    given = {"plates": (3,), "kappa": 0.6}
    lazy, plain = (run(k, process, options, "defensive", **given) for k in (OnGrid, Plain))
    assert torch.equal(lazy.x0, plain.x0)
    assert torch.equal(lazy.log_evidence, plain.log_evidence)


@pytest.mark.parametrize("kappa", [1.0, 0.4])
@pytest.mark.parametrize("process", [ABSORBING, UNIFORM], ids=["masked", "uniform"])
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_those_of_the_plain_form(name, process, kappa):
    """Draws and log-probabilities, of impossible moves too, and the gradient of a possible one."""
    tokens = torch.randint(process.num_states, (50, L))
    given = {GIVEN: {"shift": torch.rand(50)}} if NETWORKS[name].get("given") else {}
    noise, found = torch.rand(2, 4, 50, L, dtype=torch.float64), []
    wild = torch.randint(process.num_states, (50, L))
    for kind in (OnGrid, Plain):
        network = Network(**NETWORKS[name])
        network.weight.requires_grad_()
        step = kind(process, network, num_steps=T, kappa=kappa).step({"tokens": tokens, **given}, 3)
        moved = step.draw(*noise)
        (gradient,) = torch.autograd.grad(step.log_prob(moved).sum(), network.weight)
        found.append((moved, step.log_prob(moved), step.log_prob(wild), gradient))
    for lazy, plain in zip(*(f[:3] for f in found), strict=True):
        assert torch.equal(lazy, plain)
    torch.testing.assert_close(found[0][3], found[1][3], rtol=1e-4, atol=1e-3)


class Watched(Network):
    """Counts the rows that its head makes."""

    def __init__(self):
        super().__init__(head=True)
        self.rows, plain = 0, self.head

        def head(hidden):
            self.rows += len(hidden)
            return plain(hidden)

        self.head = head


def test_only_masked_sites_are_asked_for():
    network = Watched()
    kernel = OnGrid(ABSORBING, network, num_steps=T)
    tokens = torch.tensor([[5, 1, 5, 2, 0, 1], [3, 1, 5, 2, 0, 1]])
    completions = kernel.completions({"tokens": tokens}, 2)
    assert torch.equal(completions.likeliest()[tokens < V], tokens[tokens < V])
    assert network.rows == 3
    completions.draw(torch.rand(2, L, 4, dtype=torch.float64))
    assert network.rows == 6


def test_chunks_do_not_show(monkeypatch):
    for process in (ABSORBING, UNIFORM):
        whole = run(OnGrid, process, {"head": True}, "defensive")
        monkeypatch.setattr("ppl_diffusion.denoisers.prediction.CHUNK", 7 * V)
        parts = run(OnGrid, process, {"head": True}, "defensive")
        monkeypatch.undo()
        assert torch.equal(whole.path, parts.path)


@pytest.mark.parametrize("bad", [torch.nan, 0.5], ids=["NaN", "unnormalised"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "dense"])
def test_bad_rows_are_refused_where_they_are_used(head, bad):
    """At the first site; it is never used once a token stands there."""
    network = Network(head=head)
    weight = network.weight

    def spoilt(hidden):
        rows = (hidden @ weight).log_softmax(-1)
        return torch.where(hidden[..., :1] > 5, rows + bad, rows)

    network._head = spoilt
    if head:
        network.head = spoilt
    plain = network._hidden

    def marked(tokens, t):
        hidden = plain(tokens, t)
        return torch.cat([hidden[..., :1, :] * 0 + 10, hidden[..., 1:, :] * 0], -2)

    network._hidden = marked
    if head:
        network.hidden = marked
    kernel = OnGrid(ABSORBING, network, num_steps=1)
    masked, known = (torch.tensor([[first, *[V] * (L - 1)]]) for first in (V, 1))
    noise = torch.rand(1, L, dtype=torch.float64)

    def uses(tokens):
        step, completions = (
            kernel.step({"tokens": tokens}, 0),
            kernel.completions({"tokens": tokens}, 0),
        )
        value = torch.full_like(tokens, 1)
        yield partial(step.draw, noise, noise)
        yield partial(step.log_prob, value)
        yield completions.likeliest
        yield partial(completions.draw, noise[..., None])
        yield partial(completions.allow, value)

    for use in uses(known):
        use()
    for use in uses(masked):
        with pytest.raises(ValueError, match="NaN or unnormalised log-probabilities"):
            use()
        with deferred_checks() as checks:
            use()  # noted, and read with what decides the next step
            with pytest.raises(ValueError, match="NaN or unnormalised"):
                checks.read()
    with pytest.raises(ValueError, match="NaN or unnormalised"):
        kernel.predict({"tokens": masked}, 0).dense()


def test_a_kernel_of_its_own_law_is_filled_by_its_table():
    class Own(OnGrid):
        def posterior_mean(self, carry, k):
            rows = torch.full((*carry["tokens"].shape, V), -torch.inf, dtype=torch.float64)
            rows[..., 3] = 0.0
            return rows

    kernel = Own(ABSORBING, Network(), num_steps=T)
    found = kernel.completions({"tokens": torch.full((2, L), V)}, 0)
    assert bool((found.likeliest() == 3).all())
    assert bool((found.draw(torch.rand(2, L, 3, dtype=torch.float64)) == 3).all())

    class OwnCavity(OnGrid):
        def cavity_log_probs(self, carry, k):
            return Own.posterior_mean(self, carry, k)

    kernel = OwnCavity(ABSORBING, Network(head=True), num_steps=T)
    found = kernel.completions({"tokens": torch.full((2, L), V)}, 0)
    assert bool((found.likeliest() == 3).all())


def test_a_fill_of_ones_own():
    """The likeliest tokens, and only the fills know how many there are."""

    class Twice(FillTwist):
        name, num_fills = "twice", 2

        def uniforms(self, carried, shape, generator):
            return None

        def fill(self, completions, uniforms):
            return completions.likeliest()[:, :, None].expand(-1, -1, 2, -1)

    own, argmax = (run(OnGrid, ABSORBING, {}, twist) for twist in (Twice(), "argmax"))
    assert torch.equal(own.path, argmax.path)


@pytest.mark.parametrize("size", [3, 256, 300, 1024, 1025])
def test_likeliest_is_the_first_of_the_largest(size):
    rows = torch.randint(4, (30, size)).float()
    assert torch.equal(likeliest(rows), rows.argmax(-1))
    assert likeliest(rows[:0]).shape == (0,)


def test_near_ties_are_those_of_normalised_rows():
    """Two float64 numbers a bit apart are one after normalising, and the first one wins."""
    low = torch.tensor(0.2499, dtype=torch.float64).log()
    rows = torch.stack([low, torch.nextafter(low, low.new_zeros(())), low, low])
    where, states = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    prediction = DensePrediction(rows[None], raw=True)
    expected = (rows - rows.exp().sum().log()).argmax()
    assert prediction.likeliest(where, states).item() == expected


def test_expanded_tables_are_not_copied():
    table = torch.randn(1, L, V).log_softmax(-1)
    hidden = HeadPrediction(table, lambda rows: rows.double(), V)
    where, u = torch.rand(500, L) < 0.5, torch.rand(500, L, dtype=torch.float64)
    base = torch.zeros(500, L, dtype=torch.int64)
    for prediction in (DensePrediction(table, raw=True), hidden):
        whole = prediction.expand((500,))
        assert whole._kept.data_ptr() == table.data_ptr()
        copied = type(hidden)(table.expand(500, L, V).contiguous(), lambda r: r.double(), V)
        assert torch.equal(whole.draw(u, where, base), copied.draw(u, where, base))


def test_evaluated_networks_are_kept_raw():
    kernel = OnGrid(ABSORBING, EvaluatedDenoiser(Network()), num_steps=T)
    assert isinstance(kernel, Kernel)
    prediction = kernel.predict({"tokens": torch.full((2, L), V)}, 0)
    assert prediction._kept.dtype == torch.float32
    assert prediction.dense().dtype == torch.float64
