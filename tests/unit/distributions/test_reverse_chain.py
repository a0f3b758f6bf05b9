"""Reverse chains in Pyro programs: network calls, the memo, enumeration, refusals."""

import copy
import gc
import io
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam

from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import clamp
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.testing import (
    PROCESSES,
    CountingDenoiser,
    ExactChain,
    all_states,
    counted,
    toy_chain,
    toy_markov_chain,
    toy_potential,
    z_score,
)

T = 4


@pytest.fixture(params=["uniform", "absorbing"])
def chain_and_counter(request):
    """A chain that is never finished early: its last position is masked until the end."""
    return counted(toy_markov_chain(request.param, length=12, num_steps=T))


def test_sample_and_score_cost_one_call_per_step(chain_and_counter):
    chain, counter = chain_and_counter
    path = chain.sample((7,))
    log_p = chain.log_prob(path)
    assert counter.calls <= T
    assert counter.calls == T or chain.kernel.process.absorbing
    calls, rows = counter.calls, counter.rows
    again = chain.log_prob(path.clone())
    assert counter.calls <= 2 * calls  # known paths are scored in larger batches
    assert counter.rows == 2 * rows
    torch.testing.assert_close(again, log_p, rtol=0, atol=1e-9)


def model(chain, plate=None):
    if plate is None:
        path = pyro.sample("path", chain)
    else:
        with pyro.plate("sequences", plate):
            path = pyro.sample("path", chain)
    pyro.factor("reward", 0.1 * chain.x0(path).sum(-1).sum().double())
    return path


@pytest.mark.parametrize("plate", [None, 3])
def test_trace_and_score(chain_and_counter, plate):
    chain, counter = chain_and_counter
    trace = poutine.trace(model).get_trace(chain, plate)
    trace.compute_log_prob()
    assert trace.nodes["path"]["value"].shape == (*([] if plate is None else [plate]), T + 1, 12)
    assert counter.calls <= T


@pytest.mark.parametrize("plate", [None, 3])
def test_replay(chain_and_counter, plate):
    chain, counter = chain_and_counter
    guide = poutine.trace(model).get_trace(chain, plate)
    spent = counter.calls
    replayed = poutine.trace(poutine.replay(model, guide)).get_trace(chain, plate)
    replayed.compute_log_prob()
    assert counter.calls == spent
    assert torch.equal(replayed.nodes["path"]["value"], guide.nodes["path"]["value"])


@pytest.mark.parametrize("plate", [None, 3])
def test_importance(chain_and_counter, plate):
    chain, counter = chain_and_counter
    Importance(model, num_samples=5).run(chain, plate)
    assert counter.calls <= 5 * T
    if not chain.kernel.process.absorbing:
        assert counter.calls == 5 * T


def scored_again(counter, chain, path):
    """Return whether scoring cost network calls, and the score."""
    before = counter.calls
    log_p = chain.log_prob(path)
    return counter.calls > before, log_p


def test_memo_is_forgotten_when_the_path_is_edited(chain_and_counter):
    chain, counter = chain_and_counter
    path = chain.sample((5,))
    before = chain.log_prob(path).clone()
    path[..., -1, 0] = (path[..., -1, 0] + 1) % 3
    paid, after = scored_again(counter, chain, path)
    assert paid
    torch.testing.assert_close(after, chain.log_prob(path.clone()))
    assert not torch.equal(after, before)


def test_memo_belongs_to_its_kernel(chain_and_counter):
    chain, counter = chain_and_counter
    path = chain.sample((5,))
    process = chain.kernel.process
    kernel = InterpolatingKernel(process, counter, num_steps=T, kappa=[1, 0.9, 0.9, 1])
    other = ReverseChain(kernel, 12)
    paid, log_p = scored_again(counter, other, path)
    assert paid
    assert not torch.allclose(log_p, chain.log_prob(path))


def test_memo_serves_an_equal_kernel_and_expanded_chains(chain_and_counter):
    chain, counter = chain_and_counter
    path = chain.sample((5,))
    equal = ReverseChain(chain.kernel.with_denoiser(counter), 12)
    for same in (equal, chain.expand((5,)), chain.expand((2, 5))):
        paid, log_p = scored_again(counter, same, path)
        assert not paid
        assert log_p.shape == torch.broadcast_shapes((5,), same.batch_shape)


def test_prompted_chain_does_not_trust_the_memo_of_the_free_one():
    """Same kernel, other prompt: another law."""
    free = toy_chain("uniform", length=3)
    path = free.sample((200,))
    prompt = torch.tensor([1, -1, -1])
    prompted = ReverseChain(free.kernel, 3, prompt=prompt)
    log_p = prompted.log_prob(path)
    torch.testing.assert_close(log_p, prompted.log_prob(path.clone()))
    assert bool((log_p[path[:, 0, 0] != 1] == -torch.inf).all())
    equal = ReverseChain(free.kernel, 3, prompt=prompt.clone())
    path = prompted.sample((5,))
    torch.testing.assert_close(equal.log_prob(path), equal.log_prob(path.clone()))
    assert not torch.allclose(free.log_prob(path), prompted.log_prob(path))


class Network(torch.nn.Module):
    """A denoiser with one trainable table."""

    vocab_size, kind, time_free = 3, "cavity", True

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        self.calls = 0

    def forward(self, tokens, t):
        self.calls += 1
        return self.logits.log_softmax(-1).expand(*tokens.shape[:-1], 5, 3)


@pytest.fixture
def trainable():
    network = Network()
    process = toy_chain("uniform").kernel.process
    return ReverseChain(InterpolatingKernel(process, network, num_steps=T), 5), network


def test_memo_is_not_used_where_a_gradient_is_wanted(trainable):
    chain, network = trainable
    path = chain.sample((6,))
    assert network.calls == T
    log_p = chain.log_prob(path)
    assert network.calls == 2 * T
    log_p.sum().backward()
    assert float(network.logits.grad.abs().sum()) > 0


def test_memo_serves_frozen_networks_and_no_grad(trainable):
    chain, network = trainable
    path = chain.sample((6,))
    with torch.no_grad():
        chain.log_prob(path)
    network.requires_grad_(False)
    chain.log_prob(path)
    assert network.calls == T


def test_memo_is_forgotten_after_a_parameter_update(trainable):
    chain, network = trainable
    path = chain.sample((6,))
    with torch.no_grad():
        before = chain.log_prob(path)
        network.logits.add_(torch.randn(5, 3))
        after = chain.log_prob(path)
    assert network.calls == 2 * T
    assert not torch.allclose(before, after)


def test_memo_is_forgotten_after_loading_weights(trainable):
    """Also where the update goes through ``.data``, as optimisers of old code do."""
    chain, network = trainable
    path = chain.sample((6,))
    network.load_state_dict({"logits": torch.randn(5, 3, dtype=torch.float64)})
    with torch.no_grad():
        torch.testing.assert_close(chain.log_prob(path), chain.log_prob(path.clone()))


class PlainDenoiser:
    """No ``parameters()``: a plain class over a tensor, or over Pyro's parameter store."""

    vocab_size, kind, time_free = 3, "cavity", True

    def __init__(self, logits):
        self.logits, self.calls = logits, 0

    def __call__(self, tokens, t):
        self.calls += 1
        return self.logits().log_softmax(-1).expand(*tokens.shape[:-1], 5, 3)


TABLE = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
SOURCES = {"tensor": lambda: TABLE, "pyro.param": lambda: pyro.param("table", TABLE.detach())}


def wrapped_chain(denoiser, wrap=lambda d: d):
    process = toy_chain("uniform").kernel.process
    return ReverseChain(InterpolatingKernel(process, wrap(denoiser), num_steps=T), 5)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("wrap", [lambda d: d, CountingDenoiser, EvaluatedDenoiser])
@pytest.mark.parametrize("grad", [True, False])
def test_memo_does_not_swallow_gradients_it_was_not_told_of(source, wrap, grad):
    logits = SOURCES[source]
    denoiser = PlainDenoiser(logits)
    chain = wrapped_chain(denoiser, wrap)
    with torch.set_grad_enabled(grad):
        path = chain.sample((6,))
    assert denoiser.calls == T  # looking for a gradient costs nothing
    assert not path.requires_grad
    log_p = chain.log_prob(path)
    leaf = pyro.get_param_store()["table"] if source == "pyro.param" else TABLE
    assert log_p.requires_grad
    assert float(torch.autograd.grad(log_p.sum(), leaf)[0].abs().sum()) > 0
    with torch.no_grad():
        leaf.add_(torch.randn(5, 3))
        again = chain.log_prob(path)
    assert not torch.allclose(log_p, again)


def test_memo_serves_plain_denoisers_without_gradients():
    table = torch.randn(5, 3, dtype=torch.float64)
    denoiser = PlainDenoiser(lambda: table)
    chain = wrapped_chain(denoiser)
    chain.log_prob(chain.sample((6,)))
    assert denoiser.calls == T


@pytest.mark.parametrize("wrap", [CountingDenoiser, EvaluatedDenoiser])
def test_memo_sees_parameters_through_wrappers(wrap):
    network = Network()
    chain = wrapped_chain(network, wrap)
    path = chain.sample((6,))
    with torch.no_grad():
        before = chain.log_prob(path)
        assert network.calls == T
        network.logits.add_(torch.randn(5, 3))
        assert not torch.allclose(before, chain.log_prob(path))
    assert chain.log_prob(path).requires_grad


def test_memo_sees_a_parameter_replaced():
    network = Network()
    chain = wrapped_chain(network)
    path = chain.sample((6,))
    network.logits = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(chain.log_prob(path), chain.log_prob(path.clone()))


def test_site_of_a_denoiser_that_hides_a_gradient_is_scored_with_it():
    """A clamped site moves without gradients, so it cannot know that there is one."""
    chain = wrapped_chain(PlainDenoiser(lambda: TABLE))
    held = {"tokens": torch.zeros(5).long(), "mask": torch.tensor([True] + [False] * 4)}
    trace = poutine.trace(clamp(lambda: pyro.sample("path", chain), **held)).get_trace()
    assert chain.log_prob(trace.nodes["path"]["value"]).requires_grad


def test_training_by_maximum_likelihood_in_pyro(trainable):
    """An observed path site inside SVI: the loss falls, gradients reach the network."""
    chain, network = trainable
    paths = toy_markov_chain("uniform", length=5, num_steps=T).sample((20,))

    def program():
        pyro.module("network", network)
        with pyro.plate("data", 20):
            pyro.sample("path", chain, obs=paths)

    svi = SVI(program, lambda: None, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("plate", [None, 2])
def test_enumeration(name, plate):
    """``TraceEnum_ELBO`` sums over whole paths, also inside a plate: minus log evidence."""
    chain, potential = toy_chain(name, num_steps=1), toy_potential()

    def program():
        if plate is None:
            path = pyro.sample("path", chain)
            pyro.factor("reward", potential(chain.x0(clean(path))))
        else:
            with pyro.plate("sequences", plate):
                path = pyro.sample("path", chain)
                pyro.factor("reward", potential(chain.x0(clean(path))))

    def clean(path):  # paths that end in a mask have probability zero and no potential
        return path.clamp_max(2)

    elbo = TraceEnum_ELBO(max_plate_nesting=0 if plate is None else 1)
    loss = elbo.loss(config_enumerate(program), config_enumerate(lambda: None))
    z = ExactChain.of(chain).evidence(potential)
    assert -loss == pytest.approx((plate or 1) * torch.tensor(z).log().item(), abs=1e-5)


def test_importance_is_right():
    """Plain ``Importance`` on a program with a chain: the evidence within 4 s.e. (6e-5)."""
    chain, potential = toy_chain("uniform"), toy_potential(scale=1.5)

    def program():
        path = pyro.sample("path", chain)
        pyro.factor("reward", potential(chain.x0(path)))

    posterior = Importance(program, num_samples=400).run()
    weights = torch.tensor(posterior.log_weights).exp().double()
    assert abs(z_score(weights, ExactChain.of(chain).evidence(potential))) < 4


def test_conditioning_scores_the_given_path():
    chain = toy_chain("uniform")
    path = chain.sample()
    conditioned = poutine.condition(lambda: pyro.sample("path", chain), {"path": path})
    trace = poutine.trace(conditioned).get_trace()
    assert float(trace.log_prob_sum()) == pytest.approx(float(chain.log_prob(path)))


def test_mask_and_scale():
    chain = toy_chain("uniform")
    path = chain.sample((3,))
    assert float(chain.mask(False).log_prob(path).abs().sum()) == 0
    with poutine.scale(scale=0.5):
        trace = poutine.trace(lambda: pyro.sample("path", chain)).get_trace()
    path = trace.nodes["path"]["value"]
    expected = 0.5 * chain.log_prob(path)
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected))


def test_mixture_of_chain_and_continuous_latents():
    """A program with another latent traces and scores in one go."""
    chain = toy_chain("absorbing")

    def program():
        path = pyro.sample("path", chain)
        gain = pyro.sample("gain", dist.LogNormal(0.0, 0.5))
        signal = gain * chain.x0(path).sum(-1)
        pyro.sample("y", dist.Normal(signal, 0.2), obs=torch.tensor(2.0))

    assert torch.isfinite(poutine.trace(program).get_trace().log_prob_sum())


def test_x0_is_the_last_state():
    chain = toy_chain(num_steps=5)
    path = chain.sample((2, 3))
    assert torch.equal(chain.x0(path), path[..., -1, :])
    assert int(chain.x0(path).max()) < 3


@pytest.mark.parametrize("name", PROCESSES)
def test_pickle(name):
    """A chain survives ``pickle`` (workers, checkpoints) with its law."""
    chain = toy_chain(name, kappa=0.9, prompt=torch.tensor([-1, 2])).expand((3,))
    twin = pickle.loads(pickle.dumps(chain))
    assert isinstance(twin, ReverseChain)
    assert twin.batch_shape == (3,)
    path = chain.sample()
    torch.testing.assert_close(twin.log_prob(path.clone()), chain.log_prob(path))


def test_torch_save_of_a_chain():
    """Pyro's own pickle test saves distributions through torch."""
    buffer = io.BytesIO()
    torch.save(toy_chain(), buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    assert buffer.tell() > 0


def test_a_path_does_not_drag_the_network_along(trainable):
    """Saved and copied paths are plain tensors: they load as weights and score again."""
    chain, network = trainable
    path, buffer = chain.sample((6,)), io.BytesIO()
    torch.save(path, buffer)
    assert buffer.tell() < 8 * path.numel() + 3000
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), path)
    twin = copy.deepcopy(path)
    assert not vars(twin)
    before = network.calls
    with torch.no_grad():
        torch.testing.assert_close(chain.log_prob(twin), chain.log_prob(path))
    assert network.calls == before + T  # the copy was scored, the path was not


def test_a_path_that_is_gone_frees_its_kernel():
    chain = toy_chain("uniform")
    kernel = weakref.ref(chain.kernel)
    path = chain.sample((2,))
    del chain
    gc.collect()
    assert kernel() is not None
    del path
    gc.collect()
    assert kernel() is None


@pytest.mark.parametrize("name", PROCESSES)
def test_inference_mode(name):
    chain = toy_chain(name)
    with torch.inference_mode():
        path = chain.sample((4,))
        log_p = chain.log_prob(path)
        path[..., -1, :] = 0
        torch.testing.assert_close(chain.log_prob(path), chain.log_prob(path.clone()))
    assert bool(torch.isfinite(log_p).all())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda k: ReverseChain(k, 0), "length must be >= 1, got 0"),
        (lambda k: ReverseChain(k, 2, prompt=torch.tensor([0])), r"prompt must have shape \(2,\)"),
        (lambda k: ReverseChain(k, 2, prompt=torch.tensor([0, 3])), "prompt must hold clean token"),
        (lambda k: ReverseChain(k, 2, prompt=torch.tensor([0, -2])), "prompt must hold clean"),
        (
            lambda k: ReverseChain(k, 2).log_prob(torch.zeros(3, 2)),
            "must end in shape|must match event_shape",
        ),
    ],
)
def test_bad_chains(make, text):
    with pytest.raises(ValueError, match=text):
        make(toy_chain(num_steps=1).kernel)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda k: ReverseChain(k, 2.7), "length must be a whole number, got 2.7"),
        (lambda k: ReverseChain(k, 2, prompt=[1.9, -1.0]), "prompt must hold integer ids, got"),
        (lambda k: ReverseChain(k, 2, prompt=[True, False]), "prompt must hold integer ids, got"),
    ],
)
def test_nothing_is_rounded(make, text):
    with pytest.raises(TypeError, match=text):
        make(toy_chain(num_steps=1).kernel)


def test_a_prompt_may_be_a_list():
    assert ReverseChain(toy_chain().kernel, 2, prompt=[1, -1]).prompt.tolist() == [1, -1]


def test_large_supports_are_not_enumerated():
    with pytest.raises(NotImplementedError, match=r"4\*\*60 values, more than max_enumerate"):
        toy_markov_chain(length=12).enumerate_support()


def test_repr():
    text = repr(toy_chain("uniform").expand((3,)))
    assert "Uniform(vocab_size=3" in text
    assert "batch_shape=(3,), event_shape=(4, 2)" in text


def test_log_prob_with_float_values():
    """Pyro's generic tests pass floats; ids are what they say."""
    chain = toy_chain("uniform")
    path = chain.sample((3,))
    torch.testing.assert_close(chain.log_prob(path.float()), chain.log_prob(path))


def test_every_path_of_the_prompt_chain_keeps_it():
    prompt = torch.tensor([-1, 2, -1])
    chain = toy_chain("absorbing", length=3, prompt=prompt)
    path = chain.sample((300,))
    assert bool((path[..., 1] == 2).all())
    states = all_states(3, 3)
    assert float(chain.marginal().log_prob(states).exp().sum()) == pytest.approx(1, abs=1e-10)
