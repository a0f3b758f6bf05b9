"""Class-conditional networks as denoisers, and two predictions as one denoiser."""

import math

import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, TableDenoiser, Transformer, TransformerConfig
from ppl_diffusion.denoisers.conditional import Guided, Labelled, Paired
from ppl_diffusion.denoisers.filters import Nucleus, Temperature
from ppl_diffusion.denoisers.prediction import has_head
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.classifier_free import ClassifierFreeKernel
from ppl_diffusion.testing import (
    DenoiserContract,
    all_states,
    random_joint,
    site_rows,
    toy_process,
)

LEVELS = ("denoiser", "kernel")
SIZE, LENGTH = 3, 2


def geometric(p, q, weight):
    """``p**w q**(1 - w)`` where both are positive, normalised, in plain probabilities."""
    both = (p > 0) & (q > 0)
    mixed = torch.where(both, p, 1.0) ** weight * torch.where(both, q, 1.0) ** (1 - weight)
    mixed = torch.where(both, mixed, 0.0)
    return mixed / mixed.sum(-1, keepdim=True)


def table(kernel, k, tokens, **options):
    return kernel.step({"tokens": tokens}, k, **options).dense_log_probs().exp()


class ToyNetwork:
    """A class-conditional network made of tables, which counts its calls and rows."""

    kind, num_classes = "cavity", 2

    def __init__(self, process):
        self.process, self.vocab_size = process, process.vocab_size
        self.time_free = process.absorbing
        self.tables = [
            TableDenoiser(random_joint(SIZE, LENGTH, seed=label), process) for label in range(3)
        ]
        self.calls = self.rows = 0

    def parameters(self):
        return iter([table.joint for table in self.tables])

    def __call__(self, tokens, t, *, label):
        self.calls += 1
        self.rows += tokens[..., 0].numel()
        every = torch.stack([table(tokens, t) for table in self.tables], -1)
        index = label.expand(tokens.shape[:-1])[..., None, None, None].expand(*every.shape[:-1], 1)
        return every.gather(-1, index)[..., 0]


class SparseNetwork(ToyNetwork):
    """The same with a vocabulary head of its own."""

    hidden_size = SIZE

    def hidden(self, tokens, t, *, label):
        return super().__call__(tokens, t, label=label)

    def head(self, hidden):
        return hidden.log_softmax(-1)


class TestGuidedIsADenoiser(DenoiserContract):
    length, ignores_own_token = LENGTH, True

    def make_process(self):
        return toy_process("skewed")

    def make_denoiser(self, process):
        return Guided(*ToyNetwork(process).tables[:2], 2.0)


class TestLabelled(DenoiserContract):
    length, ignores_own_token = LENGTH, True

    def make_process(self):
        return toy_process("absorbing")

    def make_denoiser(self, process):
        return Labelled(SparseNetwork(process), 1)


@pytest.mark.parametrize("network_type", [ToyNetwork, SparseNetwork])
def test_labels_pick_a_member(network_type):
    process = toy_process("uniform")
    network, tokens = network_type(process), all_states(3, LENGTH)
    for label, which in ((0, 0), (1, 1), (None, 2)):
        denoiser = Labelled(network, label)
        torch.testing.assert_close(denoiser(tokens, 0.5), network.tables[which](tokens, 0.5))
        assert denoiser.unconditional == (label is None)
        assert has_head(denoiser) == (network_type is SparseNetwork)
    assert repr(Labelled(network, None)) == f"Labelled({network_type.__name__}, no label)"


@pytest.mark.parametrize("network_type", [ToyNetwork, SparseNetwork])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Temperature(Nucleus(d, 0.9), 0.7)])
def test_one_network_is_asked_once(network_type, level, wrap):
    """One call on twice the rows, filters included, with the law of two separate calls."""
    process = toy_process("uniform")
    network = network_type(process)
    separate = [wrap(network.tables[i]) for i in (1, 2)]
    shared = [wrap(Labelled(network, label)) for label in (1, None)]
    options = {"weight": 2.0, "level": level, "num_steps": 3}
    two = ClassifierFreeKernel(process, *separate, **options)
    one = ClassifierFreeKernel(process, *shared, **options)
    cached = EvaluatedDenoiser(one.denoiser)
    states = all_states(3, LENGTH)
    here = table(one.with_denoiser(cached), 1, states.repeat(5, 1))
    torch.testing.assert_close(here, table(two, 1, states).repeat(5, 1, 1), rtol=0, atol=1e-12)
    assert (network.calls, network.rows) == (1, 2 * len(states))
    assert one.denoiser.network_rows == two.denoiser.network_rows == 2


def test_sparse_heads_of_a_pair():
    network = SparseNetwork(toy_process("uniform"))
    both = Guided(Labelled(network, 0), Nucleus(Labelled(network, None), 0.8), 2.0)
    tokens = all_states(3, LENGTH)
    hidden = both.hidden(tokens, 0.5)
    assert hidden.shape[-1] == both.hidden_size == 2 * SIZE + 1
    assert network.calls == 1
    rows = hidden.flatten(0, 1)[[3, 8]]
    dense = both(tokens, 0.5).reshape(-1, SIZE)[[3, 8]]
    torch.testing.assert_close(both.head(rows), dense, rtol=0, atol=1e-12)
    other = Guided(Labelled(network, 0), Labelled(SparseNetwork(network.process), None), 2.0)
    assert other.hidden(tokens, 0.5).shape == hidden.shape


def large_vocabulary(*, level="denoiser", filtered=False):
    """Return a kernel over 40 tokens around one transformer with 12 hidden units and two labels."""
    torch.manual_seed(0)
    shape = {"dim": 12, "depth": 1, "heads": 2, "num_classes": 2}
    config = TransformerConfig(vocab_size=40, num_states=41, max_length=6, **shape)
    network = Transformer(config).eval()
    for tensor in network.requires_grad_(False).parameters():
        torch.nn.init.normal_(tensor, std=0.35)
    pair = [Labelled(network, label) for label in (1, None)]
    pair = [Nucleus(part, 0.5) for part in pair] if filtered else pair
    process = toy_process("absorbing", 40)
    return ClassifierFreeKernel(process, *pair, weight=2.0, level=level, num_steps=3)


def test_a_transformer_with_labels():
    """The sparse path, which runs the head at the sites that draw, has the law of the dense one."""
    kernel = large_vocabulary()
    cached = EvaluatedDenoiser(kernel.denoiser)
    assert cached.hidden_size == kernel.denoiser.hidden_size == 25
    tokens = torch.tensor([[40, 3, 40, 40, 7, 40]] * 4)
    parts = [d(tokens, 0.5).double().exp() for d in kernel.denoiser._parts]
    c_w = geometric(*parts, 2.0)
    with torch.no_grad():
        step = kernel.with_denoiser(cached).step({"tokens": tokens}, 1)
        moved = step.sample(generator=torch.Generator().manual_seed(0))
        log_p = step.log_prob(moved)
    rows = site_rows(kernel.process, tokens, c_w, 1 / 3, 2 / 3)
    expected = rows.gather(-1, moved[..., None])[..., 0].log().sum(-1)
    torch.testing.assert_close(log_p, expected, rtol=0, atol=1e-5)
    assert (cached.num_calls, cached.rows_evaluated) == (1, 2)
    assert float((parts[0] - parts[1]).abs().max()) > 0.01


def test_a_time_for_every_row():
    """Chains on event times ask about rows at times of their own."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=4, num_states=5, max_length=3, dim=8, heads=2, depth=1, num_classes=2,
        time_conditioning=True,
    )  # fmt: skip
    network = Transformer(config).eval().requires_grad_(False)
    for tensor in network.parameters():
        torch.nn.init.normal_(tensor, std=0.5)
    both = Guided(Labelled(network, 0), Labelled(network, None), 2.0)
    tokens, t = torch.full((4, 3), 4), torch.tensor([0.1, 0.4, 0.4, 0.9], dtype=torch.float64)
    alone = torch.stack([both(row, float(time)) for row, time in zip(tokens, t, strict=True)])
    torch.testing.assert_close(both(tokens, t), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(both.head(both.hidden(tokens, t)), alone, rtol=0, atol=1e-5)
    assert float((alone[0] - alone[3]).abs().max()) > 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_small_nuclei_of_visible_tokens_do_not_matter(level):
    """At a visible token the two nuclei may be disjoint: nobody reads them."""
    kernel = large_vocabulary(level=level, filtered=True)
    tokens = torch.randint(40, (40, 6), generator=torch.Generator().manual_seed(1))
    tokens[:, 5] = 40
    parts = [d(tokens, 0.5) > -math.inf for d in kernel.denoiser._parts]
    common = (parts[0] & parts[1]).any(-1)
    tokens = tokens[common[:, 5]]
    assert not bool(common[..., :5].all())
    assert len(tokens) > 3
    kernel = kernel.with_denoiser(EvaluatedDenoiser(kernel.denoiser))
    for look_ahead in (kernel.posterior_mean, kernel.cavity_log_probs):
        assert look_ahead({"tokens": tokens}, 1).shape == (*tokens.shape, 40)
    with torch.no_grad():
        assert bool((kernel.step({"tokens": tokens}, 1).sample()[..., :5] == tokens[..., :5]).all())


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


class Asked:
    """A class-conditional network of two tokens that answers what it is told to."""

    vocab_size, kind, time_free, num_classes = 2, "cavity", True, 2

    def __init__(self, answer=uniform_rows):
        self.answer = answer

    def __call__(self, tokens, t, /, *, label=None):
        return self.answer((*tokens.shape, 2))


class AskedForRows(Asked):
    """The same behind a vocabulary head."""

    hidden_size = 1

    def hidden(self, tokens, t, *, label=None):
        return torch.zeros(*tokens.shape, 1)

    def head(self, hidden):
        return self.answer((*hidden.shape[:-1], 2))


class AskedForHidden(AskedForRows):
    """The same with what it is told to as hidden states."""

    def hidden(self, tokens, t, *, label=None):
        return self.answer((*tokens.shape, 1))

    def head(self, hidden):
        return uniform_rows((*hidden.shape[:-1], 2))


def two_networks(network, answer):
    return network(answer), network()


def two_labels(network, answer):
    both = network(answer)
    return Labelled(both, 0), Labelled(both, None)


def two_nuclei(network, answer):
    return [Nucleus(part, 0.9) for part in two_labels(network, answer)]


PAIRS = (two_networks, two_labels, two_nuclei)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("network", [Asked, AskedForRows])
@pytest.mark.parametrize(("answer", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_networks_are_not_hidden(answer, error, message, network, pair, level, cached):
    """Either part is checked with the sentences of the plain kernel before the two are mixed."""
    parts = pair(network, answer)
    for order in (1, -1):
        kernel = ClassifierFreeKernel(
            toy_process("absorbing", 2), *parts[::order], weight=2.0, level=level, num_steps=2
        )
        if cached:
            kernel = kernel.with_denoiser(EvaluatedDenoiser(kernel.denoiser))
        tokens = torch.full((4, 3), 2)
        with pytest.raises(error, match=message):
            kernel.step({"tokens": tokens}, 0)
        if has_head(kernel.denoiser):
            with pytest.raises(error, match=message):
                kernel.denoiser.head(kernel.denoiser.hidden(tokens, 0.5))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("which", ["a dimension less", "numpy", "nothing"])
def test_wrong_hidden_states(which, pair):
    answer, error, message = WRONG[which]
    with pytest.raises(error, match=message):
        Guided(*pair(AskedForHidden, answer), 2.0).hidden(torch.zeros(4, 3, dtype=torch.int64), 0.5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("network", [Asked, AskedForRows])
def test_a_column_for_the_mask_is_allowed(network, pair, level):
    parts = pair(network, lambda s: uniform_rows(s, columns=1))
    process = toy_process("uniform", 2)
    kernel = ClassifierFreeKernel(process, *parts, weight=2.0, level=level, num_steps=2)
    rows = kernel.cavity_log_probs({"tokens": torch.zeros(4, 3, dtype=torch.int64)}, 0).exp()
    torch.testing.assert_close(rows, torch.full((4, 3, 2), 0.5, dtype=torch.float64))
    if has_head(kernel.denoiser):
        rows = kernel.denoiser.head(kernel.denoiser.hidden(torch.zeros(4, 3).long(), 0.5)).exp()
        torch.testing.assert_close(rows, torch.full((4, 3, 2), 0.5, dtype=torch.float64))


class Plain:
    """A denoiser without parameters or classes."""

    vocab_size, kind, time_free = SIZE, "cavity", True


def test_parameters_of_both():
    network = ToyNetwork(toy_process("uniform"))
    both = Paired(Labelled(network, 0), Labelled(network, None))
    assert len(both.parameters()) == 6
    assert not hasattr(Paired(Labelled(network, 0), Plain()), "parameters")


def test_excluded_tokens_are_announced():
    """Those of the filters; what the supports of two networks have in common is not known."""
    network = ToyNetwork(toy_process("uniform"))
    plain, cut = Labelled(network, 0), Nucleus(Labelled(network, None), 0.9)
    for pair in (lambda *parts: Guided(*parts, 2.0), Paired):
        assert not pair(plain, plain).excludes_tokens
        assert pair(plain, cut).excludes_tokens
        assert pair(cut, plain).excludes_tokens


def test_refused_labels():
    network = ToyNetwork(toy_process("uniform"))
    with pytest.raises(ValueError, match=r"label must lie in 0..1, or be None for no label, got 3"):
        Labelled(network, 3)
    with pytest.raises(CapabilityError, match="Plain has no classes; train one with num_classes"):
        Labelled(Plain(), 0)
