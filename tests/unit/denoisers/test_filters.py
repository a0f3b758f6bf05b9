"""Filters: the two nucleus conventions and temperature, row by row and behind sparse heads."""

import math

import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, TableDenoiser, Transformer, TransformerConfig
from ppl_diffusion.denoisers.conditional import Paired
from ppl_diffusion.denoisers.filters import Nucleus, Temperature, peel
from ppl_diffusion.denoisers.prediction import has_head
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.testing import DenoiserContract, random_joint, toy_chain, toy_process

NAN = math.nan


class Fixed:
    """A denoiser that says the same rows whatever it is asked."""

    kind, time_free = "cavity", True

    def __init__(self, log_probs):
        self.log_probs = torch.as_tensor(log_probs)
        self.vocab_size = self.log_probs.shape[-1]

    def __call__(self, tokens, t, /):
        return self.log_probs.expand(*tokens.shape, -1)


def table(process):
    return TableDenoiser(random_joint(process.vocab_size, 3, seed=4), process)


class TestNucleus(DenoiserContract):
    ignores_own_token = True

    def make_process(self):
        return toy_process("uniform")

    def make_denoiser(self, process):
        return Nucleus(table(process), 0.7)


class TestTemperature(DenoiserContract):
    ignores_own_token = True

    def make_process(self):
        return toy_process("absorbing")

    def make_denoiser(self, process):
        return Temperature(table(process), 0.5)


def filtered(probs, wrapper):
    """Return the filtered probabilities of one row."""
    denoiser = wrapper(Fixed(torch.tensor(probs, dtype=torch.float64).log()))
    return denoiser(torch.zeros(1, dtype=torch.int64), 0.5)[0].exp()


def by_hand(probs, p, keep_crossing):
    """The nucleus with a loop over ranks, the lower id first among equals."""
    order = sorted(range(len(probs)), key=lambda v: (-probs[v], v))
    kept, mass = [], 0.0
    for v in order:
        inside = mass < p if keep_crossing else mass + probs[v] <= p or not kept
        mass += probs[v]
        if not inside:
            break
        kept.append(v)
    total = sum(probs[v] for v in kept)
    return [probs[v] / total if v in kept else 0.0 for v in range(len(probs))]


@pytest.mark.parametrize("keep_crossing", [True, False])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_nucleus_by_hand(p, keep_crossing):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        probs = torch.randn(7, generator=generator, dtype=torch.float64).softmax(0).tolist()
        here = filtered(probs, lambda d: Nucleus(d, p, keep_crossing=keep_crossing))
        expected = torch.tensor(by_hand(probs, p, keep_crossing), dtype=torch.float64)
        torch.testing.assert_close(here, expected, rtol=0, atol=1e-12)


def test_the_conventions_differ_by_the_crossing_token():
    probs = [0.5, 0.3, 0.15, 0.05]
    keep = filtered(probs, lambda d: Nucleus(d, 0.7))
    drop = filtered(probs, lambda d: Nucleus(d, 0.7, keep_crossing=False))
    assert keep.tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert drop.tolist() == pytest.approx([1, 0, 0, 0])


def test_the_top_token_always_survives():
    probs = [0.1, 0.6, 0.3]
    for keep_crossing in (True, False):
        one = filtered(probs, lambda d, keep=keep_crossing: Nucleus(d, 1e-9, keep_crossing=keep))
        assert one.tolist() == [0, 1, 0]


def test_ties_are_cut_by_id():
    for keep_crossing, size in ((True, 154), (False, 153)):
        ties = filtered(  # enough of them for a sort that is not stable to shuffle
            [1 / 256] * 256, lambda d, keep=keep_crossing: Nucleus(d, 0.6, keep_crossing=keep)
        )
        assert (ties > 0).tolist() == [v < size for v in range(256)]


@pytest.mark.parametrize("wrapper", [lambda d: Nucleus(d, 0.8), lambda d: Temperature(d, 0.3)])
def test_impossible_tokens_stay_impossible(wrapper):
    probs = filtered([0.0, 0.7, 0.3, 0.0], wrapper)
    assert (probs > 0).tolist() == [False, True, True, False]
    assert float(probs.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda d: Nucleus(d, 0.8),
        lambda d: Nucleus(d, 0.8, keep_crossing=False),
        lambda d: Temperature(d, 0.3),
    ],
)
@pytest.mark.parametrize("row", [[NAN, -0.1, -2.0], [-0.1, NAN, -2.0], [-math.inf] * 3])
def test_nan_is_not_hidden(wrapper, row):
    """A broken network must reach the kernel's own check."""
    kernel = InterpolatingKernel(Uniform(3), wrapper(Fixed(torch.tensor(row))), num_steps=2)
    with pytest.raises(ValueError, match="NaN or unnormalised"):
        kernel.cavity_log_probs({"tokens": torch.zeros(2, dtype=torch.int64)}, 0)


class Asked:
    """A denoiser of two tokens that answers what it is told to."""

    vocab_size, kind, time_free = 2, "cavity", True

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, tokens, t, /):
        return self.answer((*tokens.shape, 2))


class AskedForRows(Asked):
    """The same behind a vocabulary head: its answers are those of gathered rows."""

    hidden_size = 1

    def hidden(self, tokens, t):
        return torch.zeros(*tokens.shape, 1)

    def head(self, hidden):
        return self.answer((*hidden.shape[:-1], 2))


def uniform_rows(shape, *, columns=0):
    return torch.zeros(*shape[:-1], shape[-1] + columns).log_softmax(-1)


WRONG = {
    "probabilities": (lambda s: uniform_rows(s).exp(), ValueError, "NaN or unnormalised"),
    "logits": (lambda s: torch.ones(s), ValueError, "NaN or unnormalised"),
    "two columns more": (lambda s: uniform_rows(s, columns=2), ValueError, "returned shape"),
    "a column less": (lambda s: uniform_rows(s, columns=-1), ValueError, "returned shape"),
    "a dimension less": (lambda s: uniform_rows(s[1:]), ValueError, "returned shape"),
    "numpy": (lambda s: uniform_rows(s).numpy(), TypeError, "returned ndarray, expected a torch"),
    "nothing": (lambda s: None, TypeError, "returned NoneType, expected a torch"),
}
WRAPPERS = {
    "plain": lambda d: d,
    "temperature": lambda d: Temperature(d, 0.5),
    "nucleus": lambda d: Nucleus(d, 0.7),
    "both": lambda d: Temperature(Nucleus(d, 0.7), 0.5),
    "inert inside": lambda d: Nucleus(Temperature(d, 1.0), 0.7),
    "cached inside": lambda d: Nucleus(EvaluatedDenoiser(d), 0.7),
    "cached outside": lambda d: EvaluatedDenoiser(Nucleus(d, 0.7)),
}


@pytest.mark.parametrize("network", [Asked, AskedForRows])
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(("answer", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_networks_are_not_hidden(network, wrapper, answer, error, message):
    """The kernel's own sentences, which normalised or sliced rows would never cause."""
    for process in (Uniform(2), Absorbing(2)):
        kernel = InterpolatingKernel(process, wrapper(network(answer)), num_steps=2)
        with pytest.raises(error, match=message):
            ReverseChain(kernel, 3).sample((4,))


@pytest.mark.parametrize("network", [Asked, AskedForRows])
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_column_for_the_mask_is_allowed(network, wrapper):
    for columns in (0, 1):
        denoiser = wrapper(network(lambda s, more=columns: uniform_rows(s, columns=more)))
        kernel = InterpolatingKernel(Uniform(2), denoiser, num_steps=2)
        rows = kernel.predict({"tokens": torch.zeros(4, 3, dtype=torch.int64)}, 0).dense().exp()
        torch.testing.assert_close(rows, torch.full((4, 3, 2), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_temperature_is_a_power(temperature):
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    power = probs ** (1 / temperature)
    here = filtered(probs.tolist(), lambda d: Temperature(d, temperature))
    torch.testing.assert_close(here, power / power.sum(), rtol=0, atol=1e-12)


def test_temperature_near_zero_is_the_argmax():
    rows = torch.tensor([-30.5, -30.0, -30.0], dtype=torch.float32).log_softmax(-1)
    here = Temperature(Fixed(rows), 1e-308)(torch.zeros(1, dtype=torch.int64), 0.5)[0].exp()
    assert here.tolist() == [0, 0.5, 0.5]


def test_doing_nothing_is_free():
    rows = torch.tensor([0.2, 0.8]).log()
    for wrapper in (Nucleus(Fixed(rows), 1.0), Temperature(Fixed(rows), 1.0)):
        out = wrapper(torch.zeros(2, dtype=torch.int64), 0.5)
        assert out.data_ptr() == rows.data_ptr()
        assert wrapper.changes == ()


def test_mass_on_the_mask_is_dropped_first():
    rows = torch.tensor([0.1, 0.3, 0.6]).log()
    fixed = Fixed(rows)
    fixed.vocab_size = 2
    assert Nucleus(fixed, 0.7)(torch.zeros(1, dtype=torch.int64), 0.5)[0].tolist() == [-math.inf, 0]


def test_filters_compose_from_the_inside():
    probs = torch.tensor([0.5, 0.3, 0.2])
    inner = Nucleus(Temperature(Fixed(probs.log()), 0.5), 0.6)
    outer = Temperature(Nucleus(Fixed(probs.log()), 0.6), 0.5)
    here = torch.zeros(1, dtype=torch.int64)
    assert int((inner(here, 0.5) > -math.inf).sum()) == 1  # .25 of .38 crosses .6 alone
    assert int((outer(here, 0.5) > -math.inf).sum()) == 2
    assert inner.changes == ("temperature 0.5", "nucleus 0.6")
    assert outer.changes == ("nucleus 0.6", "temperature 0.5")
    base, layers = peel(inner)
    assert isinstance(base, Fixed)
    assert [type(layer) for layer in layers] == [Temperature, Nucleus]


def transformer():
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=5, num_states=6, max_length=8, dim=8, depth=1, heads=2)
    network = Transformer(config).eval()
    torch.nn.init.normal_(network.vocabulary.weight)
    return network


def test_a_sparse_head_stays_sparse():
    network = transformer()
    wrapper = Temperature(Nucleus(network, 0.8), 0.7)
    assert has_head(wrapper)
    tokens = torch.randint(6, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense, hidden = wrapper(tokens, 0.5), wrapper.hidden(tokens, 0.5)
        rows = torch.tensor([0, 5, 17])
        some = wrapper.head(hidden.reshape(-1, hidden.shape[-1])[rows])
    torch.testing.assert_close(some, dense.reshape(-1, 5)[rows], rtol=0, atol=1e-6)
    assert bool((some == -math.inf).any())


def test_no_sparse_head_out_of_nothing():
    wrapper = Nucleus(Fixed([0.0]), 0.8)
    assert not has_head(wrapper)
    assert not hasattr(wrapper, "hidden")
    assert not hasattr(wrapper, "parameters")


def test_what_the_wrapped_denoiser_has_is_forwarded():
    network = transformer()
    wrapper = Nucleus(network, 0.8)
    assert [p.shape for p in wrapper.parameters()] == [p.shape for p in network.parameters()]
    exact = Temperature(table(toy_process("uniform")), 0.5)
    with pytest.raises(CapabilityError, match="was built for"):
        InterpolatingKernel(toy_process("skewed"), exact, num_steps=2)


def test_excluded_tokens_are_announced():
    """By a nucleus, through whatever is around it; a temperature excludes nothing."""
    rows = torch.tensor([0.2, 0.8]).log()
    for inert in (Temperature(Fixed(rows), 0.5), Nucleus(Fixed(rows), 1.0)):
        assert not inert.excludes_tokens
        assert not EvaluatedDenoiser(inert).excludes_tokens
    cut = Nucleus(Fixed(rows), 0.9)
    for wrapper in (cut, Temperature(cut, 0.5), Nucleus(cut, 1.0), EvaluatedDenoiser(cut)):
        assert wrapper.excludes_tokens
    assert Temperature(EvaluatedDenoiser(cut), 0.5).excludes_tokens


def test_gradients_pass_inside_and_stop_outside():
    rows = torch.tensor([[0.6, 0.3, 0.1]]).log().requires_grad_()
    out = Nucleus(Fixed(rows), 0.8)(torch.zeros(1, 1, dtype=torch.int64), 0.5)[0, 0]
    (grad,) = torch.autograd.grad(out[0], rows)
    torch.testing.assert_close(grad, torch.tensor([[1 / 3, -1 / 3, 0.0]]))


def test_filters_under_a_cache():
    denoiser = Nucleus(table(toy_process("uniform")), 0.7)
    tokens = torch.randint(3, (20, 3), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cached = EvaluatedDenoiser(denoiser)(tokens, 0.5)
    assert torch.equal(cached, denoiser(tokens, 0.5))


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, NAN])
def test_bad_mass(p):
    with pytest.raises(ValueError, match=r"Nucleus: p must lie in \(0, 1\]"):
        Nucleus(Fixed([0.0]), p)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, NAN])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="must be positive and finite"):
        Temperature(Fixed([0.0]), temperature)


def test_two_distributions_in_one_row_are_refused():
    denoiser = toy_chain("uniform").kernel.denoiser
    with pytest.raises(CapabilityError, match="filter each of its parts"):
        Nucleus(Paired(denoiser, denoiser), 0.9)


def test_repr():
    assert repr(Nucleus(Temperature(transformer(), 0.5), 0.9, keep_crossing=False)).endswith(
        ", 0.5), 0.9, keep_crossing=False)"
    )
