"""Sparse heads: the same law as the table of the vocabulary, and the head only where it enters."""

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, Transformer, TransformerConfig
from ppl_diffusion.denoisers import prediction as room
from ppl_diffusion.denoisers.prediction import (
    DensePrediction,
    HeadPrediction,
    as_prediction,
    has_head,
    prefers_head,
)
from ppl_diffusion.distributions import ReverseChain, TokenStep
from ppl_diffusion.kernels import Absorbing, Interpolating, InterpolatingKernel, Uniform
from ppl_diffusion.processes import three_way

V, L = 5, 4
PROCESSES = {
    "absorbing": Absorbing(V),
    "uniform": Uniform(V),
    "skewed": Interpolating([0.4, 0.3, 0.2, 0.1, 0.0]),
}
KAPPAS = {
    "ancestral": 1.0,
    "psi": 0.7,
    "sites": torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64),
    "zero": 0.0,
}
each_process = pytest.mark.parametrize("name", PROCESSES)
each_kappa = pytest.mark.parametrize("kappa", KAPPAS.values(), ids=KAPPAS)


class Sparse:
    """Two hidden numbers per position, five tokens; counts what its head is asked."""

    vocab_size, kind, time_free, hidden_size = V, "cavity", False, 2

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        self.embedding, self.weight = torch.randn(V + 1, 2, **draw), torch.randn(2, V, **draw)
        self.weight[:, 3] *= 8  # some probabilities are tiny
        self.head_rows, self.calls = [], 0

    def hidden(self, tokens, t):
        self.calls += 1
        time = torch.as_tensor(t, dtype=torch.float64).expand(tokens.shape[:-1])
        return self.embedding[tokens.roll(1, -1)] * (2 - time[..., None, None])

    def head(self, rows):
        self.head_rows.append(rows[..., 0].numel())
        # A sum and no matrix product: its last bits must not depend on the number of rows.
        return (rows[..., None] * self.weight).sum(-2).log_softmax(-1)

    def __call__(self, tokens, t):
        return self.head(self.hidden(tokens, t))


class Dense(Sparse):
    """The same network without the way in between."""

    hidden_size = V


def pair(process, kappa=1.0, *, batch=(6,), fixed=None, levels=(0.2, 0.6)):
    """Return a step of hidden states, the same of a table, and the network."""
    denoiser = Sparse()
    tokens = torch.randint(process.num_states, (*batch, L))
    hidden = HeadPrediction(denoiser.hidden(tokens, 0.5), denoiser.head, V)
    options = {"fixed": fixed, "validate_args": False}
    sparse = TokenStep(process, tokens, hidden, *levels, kappa, **options)
    dense = TokenStep(process, tokens, hidden.dense(), *levels, kappa, **options)
    denoiser.head_rows.clear()
    return sparse, dense, denoiser


# one step


@each_process
@each_kappa
@pytest.mark.parametrize("fixed", [None, torch.tensor([True, False, False, True])])
@pytest.mark.parametrize("levels", [(0.2, 0.6), (0.0, 0.5), (0.5, 1.0), (0.5, 0.5)], ids=str)
def test_same_uniforms_same_states_same_density(name, kappa, fixed, levels):
    sparse, dense, _ = pair(PROCESSES[name], kappa, fixed=fixed, levels=levels)
    noise = torch.rand(2, 50, 6, L, dtype=torch.float64)
    drawn = sparse.draw(*noise)
    assert torch.equal(drawn, dense.draw(*noise))
    anything = torch.randint(PROCESSES[name].num_states, (50, 6, L))
    for value in (drawn, anything):
        here, there = sparse.log_prob(value), dense.log_prob(value)
        assert torch.equal(here > -torch.inf, there > -torch.inf)
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)
    assert torch.equal(sparse.expand((3, 6)).draw(*noise[:, :3]), drawn[:3])
    torch.testing.assert_close(
        sparse.expand((50, 6)).log_prob(anything[0]), dense.log_prob(anything[0]).expand(50, 6)
    )
    torch.testing.assert_close(sparse.dense_log_probs(), dense.dense_log_probs())


def test_uniforms_at_the_edges():
    for name in PROCESSES:
        sparse, dense, _ = pair(PROCESSES[name], 0.7)
        edge = float(np.nextafter(1.0, 0.0))
        for move in (0.0, 0.5, edge):
            for token in (0.0, edge):
                noise = (torch.full((6, L), u, dtype=torch.float64) for u in (move, token))
                move_u, token_u = noise
                assert torch.equal(sparse.draw(move_u, token_u), dense.draw(move_u, token_u))


def test_round_off_keeps_no_mask_at_the_clean_end():
    """At ``b = 1`` the weights may sum to less than the largest uniform; nothing may stay."""
    edge = torch.full((6, L), float(np.nextafter(1.0, 0.0)), dtype=torch.float64)
    short = 0
    for a in np.linspace(0.01, 0.99, 50):
        for kappa in (1.0, 0.7, 0.3):
            sparse, _, _ = pair(PROCESSES["absorbing"], kappa, levels=(float(a), 1.0))
            assert int(sparse.draw(edge, edge).max()) < V
            weight = torch.tensor([0.0], dtype=torch.float64), torch.tensor([1.0]).double()
            short += float(three_way(float(a), 1.0, kappa, *weight)[1]) <= float(edge[0, 0])
    assert short > 0  # otherwise no uniform is large enough to tell


@each_process
def test_negative_kappa(name):
    """Masks never need the table; elsewhere "stay" can be negative, and the table is taken."""
    sparse, dense, denoiser = pair(PROCESSES[name], -0.05, levels=(0.3, 0.35))
    noise = torch.rand(2, 200, 6, L, dtype=torch.float64)
    assert torch.equal(sparse.draw(*noise), dense.draw(*noise))
    value = dense.draw(*noise)
    torch.testing.assert_close(sparse.log_prob(value), dense.log_prob(value), rtol=0, atol=1e-12)
    if name != "absorbing":
        assert denoiser.head_rows == [6 * L] * 2  # the table once, however many samples


@each_process
@each_kappa
def test_gradients_are_those_of_the_table(name, kappa):
    sparse, _, denoiser = pair(PROCESSES[name], kappa)
    value = sparse.sample((20,))
    value[10:] = torch.randint(PROCESSES[name].num_states, (10, 6, L))  # some are impossible
    grads = []
    for table in (False, True):
        weight = denoiser.weight.clone().requires_grad_()
        hidden = sparse.prediction.hidden.clone().requires_grad_()
        denoiser.weight = weight
        prediction = HeadPrediction(hidden, denoiser.head, V)
        prediction = prediction.dense() if table else prediction
        step = TokenStep(
            sparse.process, sparse.tokens, prediction, 0.2, 0.6, kappa, validate_args=False
        )
        log_p = step.log_prob(value)
        loss = torch.where(log_p > -torch.inf, log_p, 0.0).sum()
        grads.append(torch.autograd.grad(loss, (weight, hidden)))
    for here, there in zip(*grads, strict=True):
        assert float(here.abs().max()) > 0.1
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-10)


@each_kappa
def test_head_runs_where_it_enters(kappa):
    """Masks: once per drawn token, once per scored reveal. Elsewhere every site has its own c_z."""
    sparse, _, denoiser = pair(PROCESSES["absorbing"], kappa)
    drawn = sparse.sample((30,))
    masked = (sparse.tokens == V).expand_as(drawn)
    revealed = masked & (drawn < V)
    assert sum(denoiser.head_rows) == int(revealed.sum())
    denoiser.head_rows.clear()
    sparse.log_prob(drawn)
    assert sum(denoiser.head_rows) == int(revealed.sum())
    sparse, _, denoiser = pair(PROCESSES["uniform"], kappa)
    sparse.log_prob(sparse.tokens)
    assert sum(denoiser.head_rows) == 6 * L


def test_chunks_bound_the_rows_of_the_head_and_change_nothing(monkeypatch):
    for name in PROCESSES:
        sparse, dense, denoiser = pair(PROCESSES[name], 0.7, batch=(40,))
        monkeypatch.setattr(room, "CHUNK", 7 * V + 3)
        noise = torch.rand(2, 40, L, dtype=torch.float64)
        drawn = sparse.draw(*noise)
        log_p = sparse.log_prob(drawn)
        assert max(denoiser.head_rows) == 7
        monkeypatch.undo()
        assert torch.equal(drawn, dense.draw(*noise))
        torch.testing.assert_close(log_p, dense.log_prob(drawn), rtol=0, atol=1e-12)


def test_a_vocabulary_beyond_the_chunk_goes_row_by_row(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", V - 1)
    sparse, _, denoiser = pair(PROCESSES["absorbing"])
    sparse.sample((5,))
    assert set(denoiser.head_rows) <= {0, 1}


# the prediction itself


def test_hidden_states_against_their_table():
    denoiser = Sparse()
    hidden = torch.randn(3, L, 2, dtype=torch.float64)
    sparse = HeadPrediction(hidden, denoiser.head, V)
    dense = as_prediction(sparse.dense())
    assert isinstance(dense, DensePrediction)
    assert as_prediction(sparse) is sparse
    assert sparse.shape == dense.shape == (3, L, V)
    ids, where = torch.randint(V, (3, L, 2)), torch.rand(3, L) < 0.5
    torch.testing.assert_close(
        sparse.probabilities(ids, where), dense.probabilities(ids, where), rtol=0, atol=1e-15
    )
    assert bool((sparse.probabilities(ids, where)[~where] == 0).all())
    noise, kept = torch.rand(3, L, dtype=torch.float64), torch.full((3, L), 77)
    drawn = sparse.draw(noise, where, kept)
    assert torch.equal(drawn, dense.draw(noise, where, kept))
    assert bool((drawn == 77).eq(~where).all())
    assert bool((kept == 77).all())
    nowhere = torch.zeros(3, L, dtype=torch.bool)
    assert torch.equal(sparse.draw(noise, nowhere, kept), kept)
    assert float(sparse.probabilities(ids, nowhere).sum()) == 0
    assert sparse.expand((2, 3)).shape == dense.expand((2, 3)).shape == (2, 3, L, V)


def test_who_prefers_its_head():
    sparse, dense = Sparse(), Dense()
    assert has_head(sparse)
    assert has_head(dense)
    assert prefers_head(sparse)
    assert not prefers_head(dense)  # hidden states are no smaller than the table
    plain = type("Plain", (), {"vocab_size": V})()
    assert not has_head(plain)
    assert not prefers_head(plain)


def test_gradient_is_found_in_hidden_states_and_in_the_head():
    denoiser = Sparse()
    hidden = torch.randn(3, L, 2, dtype=torch.float64)
    assert not HeadPrediction(hidden, denoiser.head, V).requires_grad
    assert HeadPrediction(hidden.clone().requires_grad_(), denoiser.head, V).requires_grad
    denoiser.weight.requires_grad_()
    assert HeadPrediction(hidden, denoiser.head, V).requires_grad
    with torch.no_grad():
        assert HeadPrediction(hidden, denoiser.head, V).requires_grad


# whole chains


def chain_of(denoiser, name, **options):
    options.setdefault("num_steps", 6)
    return ReverseChain(InterpolatingKernel(PROCESSES[name], denoiser, **options), L)


CHAINS = [
    ("absorbing", {}),
    ("absorbing", {"kappa": 0.7}),
    ("uniform", {}),
    ("uniform", {"kappa": [1, 0.5, 0.5, 0.9, 0, 1]}),
    ("skewed", {"kappa": np.linspace(1, 0, 24).reshape(6, 4)}),
]


@pytest.mark.parametrize(("name", "options"), CHAINS, ids=str)
@pytest.mark.parametrize("wrap", [lambda d: d, EvaluatedDenoiser], ids=["bare", "evaluated"])
def test_chains_are_the_same(name, options, wrap):
    paths = []
    for denoiser in (Sparse(), Dense()):
        chain = chain_of(wrap(denoiser), name, **options)
        paths.append(chain.sample((40,), generator=torch.Generator().manual_seed(3)))
        log_p = chain.log_prob(paths[-1])
        torch.testing.assert_close(log_p, chain.log_prob(paths[-1].clone()), rtol=0, atol=1e-12)
    assert torch.equal(*paths)
    other = chain_of(Dense(), name, **options).log_prob(paths[0].clone())
    torch.testing.assert_close(log_p, other, rtol=0, atol=1e-12)
    means = [
        chain_of(d, name, **options).kernel.posterior_mean({"tokens": paths[0][:, 3]}, 3)
        for d in (Sparse(), Dense())
    ]
    torch.testing.assert_close(*means)


def test_who_is_asked_for_hidden_states():
    tokens = torch.full((2, L), V)
    for name, kind, denoiser, sparse in (
        ("absorbing", "cavity", Sparse(), True),
        ("absorbing", "posterior", Sparse(), True),  # of a mask the two are one
        ("uniform", "cavity", Sparse(), True),
        ("uniform", "posterior", Sparse(), False),  # the conversion normalises whole rows
        ("absorbing", "cavity", Dense(), False),
    ):
        denoiser.kind = kind
        kernel = chain_of(denoiser, name).kernel
        state = tokens.clamp_max(kernel.process.num_states - 1)
        assert isinstance(kernel.predict({"tokens": state}, 1), HeadPrediction) == sparse
    calls = denoiser.calls
    assert isinstance(kernel.predict({"tokens": torch.zeros(2, L).long()}, 1), DensePrediction)
    assert denoiser.calls == calls  # nothing is masked


def test_posterior_kind_is_converted_for_the_uniform_process():
    """Not handed to a step as if it were the cavity."""
    both = []
    for denoiser in (Sparse(), Dense()):
        denoiser.kind = "posterior"
        chain = chain_of(denoiser, "uniform")
        path = chain.sample((20,), generator=torch.Generator().manual_seed(3))
        both.append(chain.log_prob(path.clone()))
    torch.testing.assert_close(*both)
    denoiser.kind = "cavity"
    assert not torch.allclose(chain_of(denoiser, "uniform").log_prob(path.clone()), both[0])


def test_transformer_in_float32():
    config = TransformerConfig(vocab_size=50, num_states=51, max_length=8, dim=16, depth=1)
    network = Transformer(config).requires_grad_(False).eval()
    torch.nn.init.normal_(network.vocabulary.weight)
    assert prefers_head(network)

    class Table:
        vocab_size, kind, time_free = 50, network.kind, network.time_free

        def __call__(self, tokens, t):
            return network(tokens, t)

    paths = []
    for denoiser in (network, Table()):
        kernel = InterpolatingKernel(Absorbing(50), denoiser, num_steps=4, kappa=0.9)
        chain = ReverseChain(kernel, 8)
        if not paths:
            path = chain.sample((16,))
        paths.append(chain.log_prob(path.clone()))
    torch.testing.assert_close(*paths, rtol=1e-5, atol=1e-4)


# gradients that hide, heads that misbehave


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
@pytest.mark.parametrize("options", [{}, {"kappa": 0.8}], ids=str)
@pytest.mark.parametrize("leaf", ["embedding", "weight"])
def test_memo_does_not_swallow_the_gradient_of_a_sparse_denoiser(name, options, leaf):
    """The denoiser has no ``parameters()``; only its output can tell."""
    denoiser = Sparse()
    tensor = getattr(denoiser, leaf).requires_grad_()
    chain = chain_of(denoiser, name, **options)
    path = chain.sample((6,))
    log_p = chain.log_prob(path)
    assert log_p.requires_grad
    assert float(torch.autograd.grad(log_p.sum(), tensor)[0].abs().sum()) > 0


def test_memo_serves_sparse_denoisers_without_gradients():
    denoiser = Sparse()
    chain = chain_of(denoiser, "uniform")
    path = chain.sample((6,))
    calls = denoiser.calls
    chain.log_prob(path)
    assert denoiser.calls == calls


BAD_HEADS = {
    "NaN": (lambda h: torch.full((*h.shape[:-1], V), torch.nan), ValueError, "NaN or unnorm"),
    "unnormalised": (lambda h: torch.zeros(*h.shape[:-1], V), ValueError, "NaN or unnormalised"),
    "classes": (lambda h: torch.zeros(*h.shape[:-1], V - 1), ValueError, "returned shape"),
    "numpy": (lambda h: np.zeros((len(h), V)), TypeError, "returned ndarray, expected a torch"),
}
BAD_HIDDEN = {
    "numpy": (lambda z: np.zeros((*z.shape, 2)), TypeError, "returned ndarray, expected a torch"),
    "pooled": (lambda z: torch.zeros(*z.shape[:-1], 2), ValueError, r"returned shape \(6, 2\)"),
}


@pytest.mark.parametrize("bad", BAD_HEADS)
@pytest.mark.parametrize(("name", "options"), CHAINS[:4], ids=str)
def test_bad_heads_are_named(bad, name, options):
    output, error, text = BAD_HEADS[bad]
    denoiser = Sparse()
    path = chain_of(denoiser, name, **options).sample((6,))
    denoiser.head = output
    chain = chain_of(denoiser, name, **options)
    for ask in (lambda: chain.sample((6,)), lambda: chain.log_prob(path.clone())):
        with pytest.raises(error, match=text):
            ask()


@pytest.mark.parametrize("bad", BAD_HIDDEN)
@pytest.mark.parametrize(("name", "options"), CHAINS[:4], ids=str)
def test_bad_hidden_states_are_named(bad, name, options):
    output, error, text = BAD_HIDDEN[bad]
    denoiser = Sparse()
    denoiser.hidden = lambda tokens, t: output(tokens)
    with pytest.raises(error, match=text):
        chain_of(denoiser, name, **options).sample((6,))


def test_a_column_for_the_mask_is_dropped():
    denoiser = Sparse()
    head = denoiser.head
    denoiser.head = lambda rows: torch.cat(
        [head(rows) + np.log(0.7), torch.full((*rows.shape[:-1], 1), np.log(0.3))], -1
    )
    padded, plain = (
        chain_of(denoiser, "absorbing", kappa=0.8),
        chain_of(Sparse(), "absorbing", kappa=0.8),
    )
    path = plain.sample((20,))
    torch.testing.assert_close(
        padded.log_prob(path.clone()), plain.log_prob(path), rtol=0, atol=1e-12
    )
