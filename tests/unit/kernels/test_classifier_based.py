"""Classifier-based guidance: exact and first-order tilts, and what they ask the classifier."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from torch.nn import functional as F

from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.handlers import steer, unroll
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.kernels.classifier_based import ClassifierKernel
from ppl_diffusion.testing import PROCESSES, KernelContract, all_states, state_matrix, toy_chain

SIZE, LENGTH = 3, 2
MODES = ("exact", "first-order")


def linear(process, length=LENGTH, *, seed=5, scale=1.0):
    """Return ``log P`` linear in the one-hot encoding, for ids and for one-hot rows, float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (length, process.num_states)
    weight = scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def log_likelihood(states, t):
        if not states.is_floating_point():
            states = F.one_hot(states, process.num_states)
        return (1 + t) * (states.double() * weight).sum((-2, -1)) - 3

    return log_likelihood


def logistic(process, length=LENGTH, *, scale=1.0):
    """Return ``log P`` with a logit linear in the one-hot encoding."""
    logit = linear(process, length, scale=scale)
    return lambda states, t: F.logsigmoid(logit(states, t))


def base_kernel(name="uniform", *, length=LENGTH, **options):
    return toy_chain(name, length=length, **options).kernel


def guided(
    name="uniform", *, classifier=logistic, length=LENGTH, kappa=1.0, num_steps=3, **options
):
    kernel = base_kernel(name, length=length, kappa=kappa, num_steps=num_steps)
    return ClassifierKernel(kernel, classifier(kernel.process, length), **options)


def table(kernel, k, tokens, **options):
    return kernel.step({"tokens": tokens}, k, **options).dense_log_probs().exp()


class Counting:
    """A classifier that notes the rows it is asked about."""

    def __init__(self, classifier):
        self.classifier, self.rows, self.sizes, self.times = classifier, [], [], []

    def __call__(self, states, t):
        self.rows += states.tolist()
        self.sizes.append(len(states))
        self.times.append(t)
        return self.classifier(states, t)


class TestExact(KernelContract):
    def make_kernel(self):
        return guided("absorbing", kappa=0.9, scale=2.0)


class TestExactUniform(KernelContract):
    def make_kernel(self):
        return guided("uniform", max_rows=5)


class TestFirstOrder(KernelContract):
    def make_kernel(self):
        return guided("absorbing", mode="first-order")


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kappa", [1.0, 0.8])
@pytest.mark.parametrize("name", PROCESSES)
def test_exact_tilt_by_hand(name, kappa, scale):
    """``p(v | z) P(y | z with site l := v)**g`` over all states of every site, one loop per factor.

    The mask is one of the states. The classifier is read at the time after the step, for masks
    half way through it.
    """
    kernel = guided(name, kappa=kappa, scale=scale)
    process, plain = kernel.process, kernel.kernel
    states = all_states(process.num_states, LENGTH)
    for k in range(kernel.num_steps):
        t = kernel.times[k : k + 2].mean() if name == "absorbing" else kernel.times[k + 1]
        expected = table(plain, k, states)
        for row, state in enumerate(states):
            for site in range(LENGTH):
                for v in range(process.num_states):
                    other = state.clone()
                    other[site] = v
                    log_p = kernel.log_likelihood(other[None], t)[0]
                    expected[row, site, v] *= (scale * log_p).exp()
        expected /= expected.sum(-1, keepdim=True)
        torch.testing.assert_close(table(kernel, k, states), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_first_order_is_exact_where_the_logarithm_is_linear(name):
    both = [guided(name, classifier=linear, mode=mode, kappa=0.9, scale=1.5) for mode in MODES]
    states = all_states(both[0].process.num_states, LENGTH)
    for k in range(3):
        here, there = (table(kernel, k, states) for kernel in both)
        torch.testing.assert_close(here, there, rtol=0, atol=1e-6)
        assert float((here - table(both[0].kernel, k, states)).abs().max()) > 0.01


def first_order_gap(*, scale=1.0, num_steps=16):
    """Return the largest total variation of a site's law between the two modes, half way."""
    kernel = base_kernel("uniform", num_steps=num_steps)
    classifier = logistic(kernel.process, scale=scale)
    exact, cheap = (ClassifierKernel(kernel, classifier, mode=mode) for mode in MODES)
    states, k = all_states(SIZE, LENGTH), num_steps // 2
    return float((table(exact, k, states) - table(cheap, k, states)).abs().sum(-1).max() / 2)


def test_first_order_error_of_a_linear_logit():
    """Second order in the weights, and proportional to the step; not zero in small steps.

    A step moves with probability O(dt), so the laws differ by O(dt) whatever the tilt: the *rates*
    of the two differ by a factor that does not go away, and only small weights make it one.
    """
    coarse, fine = first_order_gap(num_steps=512), first_order_gap(num_steps=1024)
    assert coarse / fine == pytest.approx(2, rel=0.15)
    gaps = [first_order_gap(scale=0.02 * 0.5**i) for i in range(3)]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.15)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.15)
    assert 1024 * fine > 0.1  # the gap of the rates


@pytest.mark.parametrize("mode", MODES)
def test_scale_zero_is_the_plain_chain_and_asks_nothing(mode):
    kernel = base_kernel("absorbing", kappa=0.8)

    def never(states, t):
        raise AssertionError

    idle = ClassifierKernel(kernel, never, scale=0.0, mode=mode)
    states = all_states(4, LENGTH)
    torch.testing.assert_close(table(idle, 1, states), table(kernel, 1, states), rtol=0, atol=1e-14)
    assert idle.changes == kernel.changes


def count(name="absorbing", *, tokens, k=1, fixed=None, kappa=1.0, length=3, **options):
    """Return what one step asked the classifier."""
    kernel = base_kernel(name, length=length, kappa=kappa)
    counting = Counting(logistic(kernel.process, length))
    guide = ClassifierKernel(kernel, counting, **options)
    guide.step({"tokens": torch.tensor(tokens)}, k, fixed=fixed)
    return counting


def test_only_masked_sites_are_asked_about():
    """Two masks of three tokens: six neighbours and the state itself, once."""
    asked = count(tokens=[[0, 3, 3]])
    expected = [[0, 3, 3]] + [[0, v, 3] for v in range(3)] + [[0, 3, v] for v in range(3)]
    assert sorted(asked.rows) == sorted(expected)
    assert asked.times == pytest.approx([0.5] * 2)  # half way
    assert count(tokens=[[0, 1, 2]]).rows == []
    last = count(tokens=[[0, 3, 3]], k=2)  # every mask is revealed: staying is impossible
    assert sorted(last.rows) == sorted(expected[1:])


def test_visible_sites_ask_for_the_mask_only():
    """At ``kappa < 1`` a token can be masked again, and nothing else."""
    asked = count(tokens=[[0, 3, 1]], kappa=0.8)
    neighbours = [[3, 3, 1], [0, 3, 3], [0, 3, 1], *([0, v, 1] for v in range(3))]
    assert sorted(asked.rows) == sorted(neighbours)


def test_prompts_are_not_asked_about():
    asked = count(tokens=[[3, 3, 3]], fixed=torch.tensor([True, False, True]))
    assert sorted(asked.rows) == [[3, v, 3] for v in range(4)]
    asked = count("uniform", tokens=[[0, 1, 2]], fixed=torch.tensor([True, False, True]))
    assert sorted(asked.rows) == [[0, v, 2] for v in range(3)]


def test_twins_are_asked_about_once():
    asked = count(tokens=[[[0, 3, 3], [0, 3, 3]]] * 5)
    assert len(asked.rows) == 7
    # Twins under different prompts: the union.
    fixed = torch.tensor([[False, True, False], [False, False, True]])
    assert len(count(tokens=[[3, 3, 3]] * 2, fixed=fixed).rows) == 1 + 9


def test_what_a_twin_asks_does_not_touch_a_prompt():
    """The held site of either row is impossible where it stands, until the other one moves."""

    def different(states, t):
        return torch.where(states[:, 0] == states[:, 1], -torch.inf, 0.0)

    kernel = ClassifierKernel(base_kernel("uniform"), different)
    fixed = torch.tensor([[True, False], [False, True]])
    rows = table(kernel, 1, torch.tensor([[0, 0], [0, 0]]), fixed=fixed)
    assert rows[[0, 1], [0, 1]].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert rows[[0, 1], [1, 0], 0].tolist() == [0, 0]


def test_shared_neighbours_are_asked_about_once():
    """All states of a masked pair: neighbours of one are neighbours of others."""
    states = all_states(4, 2).tolist()
    asked = count(tokens=states, length=2)
    moving = [state for state in states if 3 in state]
    neighbours = {tuple(state) for state in states}
    assert len(asked.rows) == len(moving) + len(neighbours - {(3, 3)})


@pytest.mark.parametrize("mode", MODES)
def test_blocks(mode):
    states = all_states(4, 3)
    asked = count(tokens=states.tolist(), mode=mode, max_rows=7)
    assert max(asked.sizes) == 7
    kernel = base_kernel("absorbing", length=3)
    whole, parts = (
        ClassifierKernel(kernel, logistic(kernel.process, 3), mode=mode, max_rows=n)
        for n in (4096, 7)
    )
    torch.testing.assert_close(table(whole, 1, states), table(parts, 1, states), rtol=0, atol=1e-12)


def test_first_order_asks_once_per_moving_state():
    asked = count(tokens=[[0, 3, 3], [1, 1, 1], [0, 3, 3], [3, 1, 1]], mode="first-order")
    assert asked.sizes == [2]


def test_what_the_classifier_sees():
    seen = {}

    def classifier(states, t):
        seen[states.is_floating_point()] = (states.dtype, tuple(states.shape), type(t))
        return (states.double() if states.is_floating_point() else states).flatten(1).sum(-1) * 1.0

    kernel = base_kernel("absorbing")
    for mode in MODES:
        guide = ClassifierKernel(kernel, classifier, mode=mode)
        guide.step({"tokens": torch.tensor([[0, 3]])}, 0)
    assert seen[False] == (torch.int64, (3, LENGTH), float)
    assert seen[True] == (torch.float32, (1, LENGTH, 4), float)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_recorded(mode, context):
    states = all_states(4, LENGTH)
    kernel = guided("absorbing", mode=mode)
    with context():
        here = table(kernel, 1, states)
    torch.testing.assert_close(here, table(kernel, 1, states))


def test_hard_classifier():
    """``-inf`` excludes a state of a site; excluding all of them is an error."""

    def no_twos(states, t):
        return torch.where((states == 2).any(-1), -torch.inf, 0.0)

    kernel = ClassifierKernel(base_kernel("uniform"), no_twos)
    rows = table(kernel, 1, torch.tensor([[0, 1]]))
    assert bool((rows[..., 2] == 0).all())
    with pytest.raises(PotentialError, match="position 0 of row 1 can take has likelihood zero"):
        table(kernel, 1, torch.tensor([[0, 1], [1, 2]]))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda s, t: torch.full((len(s),), math.nan),
            "log_likelihood is nan at index .* time 0.333",
        ),
        (lambda s, t: torch.full((len(s),), math.inf), "log_likelihood is inf at index"),
        (lambda s, t: torch.zeros(len(s), 1), r"returned \(\d+, 1\) for \d+ states, expected"),
        (lambda s, t: 0.0, "returned float for"),
    ],
)
def test_bad_answers(answer, message):
    kernel = ClassifierKernel(base_kernel("uniform"), answer)
    with pytest.raises(PotentialError, match=message):
        kernel.step({"tokens": torch.tensor([[0, 1]])}, 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, t: torch.zeros(len(s)), "no gradient in its one-hot input"),
        (
            lambda s, t: s.argmax(-1).sum(-1) * torch.ones((), requires_grad=True),
            "no gradient in its one-hot input",
        ),
        (lambda s, t: s.sum((1, 2)) - math.inf, "log_likelihood is -inf"),
        (lambda s, t: (s[:, 0, 1]).sqrt(), "the gradient of log_likelihood is inf"),
    ],
)
def test_bad_gradients(answer, message):
    kernel = ClassifierKernel(base_kernel("uniform"), answer, mode="first-order")
    with pytest.raises(PotentialError, match=message):
        kernel.step({"tokens": torch.tensor([[0, 1]])}, 1)


def test_refusals():
    kernel = base_kernel()
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be finite and >= 0"):
            ClassifierKernel(kernel, logistic(kernel.process), scale=scale)
    with pytest.raises(ValueError, match="choose 'exact' or 'first-order'"):
        ClassifierKernel(kernel, logistic(kernel.process), mode="second-order")
    with pytest.raises(ValueError, match="max_rows must be >= 1"):
        ClassifierKernel(kernel, logistic(kernel.process), max_rows=0)
    assert ClassifierKernel(kernel, logistic(kernel.process)).max_rows is None
    with pytest.raises(CapabilityError, match="no kernel whose steps are products over sites"):
        ClassifierKernel(toy_chain(), logistic(kernel.process))


def test_prompts_stay():
    chain = ReverseChain(guided("uniform"), LENGTH, prompt=torch.tensor([2, -1]))
    path = chain.sample((50,), generator=torch.Generator().manual_seed(0))
    assert bool((path[..., 0] == 2).all())
    assert bool(torch.isfinite(chain.log_prob(path)).all())


@pytest.mark.parametrize("prompt", [None, torch.tensor([2, -1])])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROCESSES)
def test_one_path_needs_no_batch(name, mode, prompt):
    """A single path is drawn, scored, unrolled and steered with the numbers of a batch of one."""

    def program(chain):
        return pyro.sample("path", chain)

    chain = ReverseChain(guided(name, mode=mode, kappa=0.9), LENGTH, prompt=prompt)
    states = all_states(chain.kernel.process.num_states, LENGTH)
    rows = torch.stack([table(chain.kernel, 1, state) for state in states])
    torch.testing.assert_close(rows, table(chain.kernel, 1, states), rtol=0, atol=1e-12)
    path = chain.sample()
    assert path.shape == chain.event_shape
    torch.testing.assert_close(chain.log_prob(path.clone()), chain.log_prob(path[None].clone())[0])
    written = poutine.trace(unroll(program)).get_trace(chain)
    drawn = written.nodes["path"]["value"].clone()
    torch.testing.assert_close(written.log_prob_sum(), chain.log_prob(drawn))
    drawn = steer(program, potential=lambda x0: x0.sum(-1).double(), num_particles=3)(chain)
    torch.testing.assert_close(chain.log_prob(drawn.clone()), chain.log_prob(drawn[None])[0])


def test_the_length_of_the_guided_kernel():
    """Psi parameters for three sites fit no chain of two, guided or not."""
    kernel = guided("uniform", length=3, kappa=torch.full((3, 3), 0.9).numpy())
    with pytest.raises(ValueError, match="kappa is for 3 sites, but the chain has 2"):
        ReverseChain(kernel, 2)


def test_another_denoiser_and_the_same_law():
    kernel = guided("absorbing", kappa=0.9)
    cached = EvaluatedDenoiser(kernel.denoiser)
    again = kernel.with_denoiser(cached)
    states = all_states(4, LENGTH)
    assert torch.equal(table(again, 1, states), table(kernel, 1, states))
    assert cached.rows_evaluated > 0
    assert again.asks_denoiser({"tokens": states}, 1)
    assert not again.asks_denoiser({"tokens": states[:1]}, 1)
    for options in ({"scale": 2.0}, {"mode": "first-order"}):
        other = ClassifierKernel(kernel.kernel, kernel.log_likelihood, **options)
        assert not kernel.same_as(other)
    assert not kernel.same_as(kernel.kernel)


def test_the_look_ahead_is_the_plain_one():
    kernel = guided("uniform")
    states = all_states(SIZE, LENGTH)
    for ask in ("posterior_mean", "cavity_log_probs"):
        here, there = (getattr(x, ask)({"tokens": states}, 1) for x in (kernel, kernel.kernel))
        assert torch.equal(here, there)


def test_what_changed_is_said():
    kernel = guided("uniform", scale=2.0, mode="first-order")
    (phrase,) = kernel.changes
    assert phrase.startswith("classifier guidance 2 (first-order) of every site")
    assert "may count the evidence once for each site" in phrase
    assert "scale=2, mode=first-order" in repr(kernel)


def test_parameters_of_both_networks():
    """Of every classifier where a guided kernel is guided again; one that is silent hides all."""
    kernel = base_kernel("uniform")
    networks = [torch.nn.Linear(LENGTH * SIZE, 1) for _ in range(2)]
    once = ClassifierKernel(kernel, networks[0])
    tensors = [*kernel.denoiser.parameters(), *networks[0].parameters()]
    assert [id(p) for p in once.declared_parameters()] == [id(p) for p in tensors]
    twice = ClassifierKernel(once, networks[1])
    assert len(twice.declared_parameters()) == len(tensors) + 2
    plain = guided("uniform")
    assert plain.declared_parameters() is None
    assert ClassifierKernel(plain, networks[0]).declared_parameters() is None


class Weighted(torch.nn.Module):
    """A classifier with a weight to train."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, states, t):
        return self.weight * (states == 1).double().sum(-1)


def test_a_trained_classifier_is_read_again():
    """A remembered density is forgotten when a weight of the classifier moves."""
    classifier = Weighted()
    chain = ReverseChain(ClassifierKernel(base_kernel("uniform"), classifier), LENGTH)
    with torch.no_grad():
        path = chain.sample((5,), generator=torch.Generator().manual_seed(0))
        before = chain.log_prob(path)
        classifier.weight.mul_(2)
        assert float((chain.log_prob(path) - before).abs().max()) > 0.1
    chain.log_prob(path).sum().backward()
    assert float(classifier.weight.grad.abs()) > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_a_gradient_of_a_plain_function_is_found(name, mode):
    """A function cannot name its tensors, so that its densities are not remembered under steer.

    The gradient itself is held against a central difference.
    """
    kernel = base_kernel(name)
    weight = torch.linspace(0.2, 1.0, LENGTH * kernel.process.num_states, requires_grad=True)

    def classifier(states, t):
        if not states.is_floating_point():
            states = F.one_hot(states, kernel.process.num_states).float()
        return -((states.flatten(1) @ weight) ** 2)

    chain = ReverseChain(ClassifierKernel(kernel, classifier, mode=mode), LENGTH)

    def program():
        with pyro.plate("paths", 3):
            return pyro.sample("path", chain)

    drawn = steer(program, potential=lambda x0: x0.sum(-1).double(), num_particles=2)()
    for path in (drawn, chain.sample((3,)), drawn.clone()):
        log_p = chain.log_prob(path)
        assert log_p.requires_grad
        (gradient,) = torch.autograd.grad(log_p.sum(), weight)
        ends = []
        for move in (-0.01, 0.02, -0.01):  # there and back again
            with torch.no_grad():
                weight[1] += move
                ends.append(float(chain.log_prob(path.clone()).sum()))
        assert float(gradient[1]) == pytest.approx((ends[1] - ends[0]) / 0.02, abs=1e-3)
        assert abs(float(gradient[1])) > 0.01


def test_no_gradient_out_of_nothing():
    """Fixed weights leave no trace, though the gradient of such a classifier reads the states."""
    for mode in MODES:
        kernel = guided("uniform", mode=mode)
        assert not kernel.step({"tokens": all_states(SIZE, LENGTH)}, 1).wants_gradient


@pytest.mark.parametrize("mode", MODES)
def test_states_that_cannot_move(mode):
    """A step without progress is the identity and asks nobody."""
    kernel = toy_chain("uniform", length=LENGTH).kernel
    still = InterpolatingKernel(kernel.process, kernel.denoiser, times=[1.0, 0.5, 0.5, 0.0])
    counting = Counting(logistic(kernel.process))
    guide = ClassifierKernel(still, counting, mode=mode)
    states = all_states(SIZE, LENGTH)
    assert torch.equal(table(guide, 1, states), F.one_hot(states, SIZE).double())
    assert counting.rows == []


def test_dense_tables_of_the_oracle_agree():
    """The plain kernel under the tilt is the one that the enumeration oracle knows."""
    kernel = guided("uniform", scale=0.0)
    states = all_states(SIZE, LENGTH)
    matrix = kernel.step({"tokens": states[:, None]}, 1).log_prob(states).exp()
    torch.testing.assert_close(matrix, state_matrix(kernel.kernel, 1, LENGTH), rtol=0, atol=1e-12)
