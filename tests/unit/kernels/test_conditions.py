"""Chains whose law depends on values drawn before them: every row is predicted by its own."""

import pyro
import pytest
import torch

from ppl_diffusion import handlers
from ppl_diffusion.denoisers import (
    EvaluatedDenoiser,
    Guided,
    Labelled,
    Nucleus,
    TableDenoiser,
    Temperature,
    Transformer,
    TransformerConfig,
)
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import IntractableLogProb
from ppl_diffusion.kernels import (
    Absorbing,
    ClassifierFreeKernel,
    ClassifierKernel,
    ConfidenceKernel,
    ExtrapolatedKernel,
    InterpolatingKernel,
    OrderedKernel,
    Uniform,
)
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.smc.feynman_kac import take_particles
from ppl_diffusion.testing import (
    CountingDenoiser,
    ExactChain,
    KernelContract,
    random_joint,
    toy_potential,
)

SIZE, LENGTH = 3, 2


class Conditional:
    """One table per label, tilted by a vector: a denoiser of two conditions."""

    vocab_size, kind, conditions = SIZE, "cavity", {"label": 0, "tilt": 1}

    def __init__(self, process):
        self.time_free = process.absorbing
        self.tables = [
            TableDenoiser(random_joint(SIZE, LENGTH, seed=seed), process) for seed in range(2)
        ]

    def __call__(self, tokens, t, *, label, tilt):
        assert label.shape == tokens.shape[:-1]
        assert tilt.shape == (*tokens.shape[:-1], SIZE)
        first, second = (table(tokens, t) for table in self.tables)
        chosen = torch.where(label[..., None, None] == 1, second, first)
        return torch.log_softmax(chosen + tilt[..., None, :], -1)


class Sparse(Conditional):
    """The same with hidden states, which a kernel prefers to the table."""

    hidden_size = 2

    def hidden(self, tokens, t, *, label, tilt):
        table = super().__call__(tokens, t, label=label, tilt=tilt)
        return table[..., :2] - table[..., 2:]

    def head(self, rows):
        return torch.nn.functional.pad(rows, (0, 1)).log_softmax(-1)


class Specialised:
    """A conditional denoiser with its conditions filled in."""

    def __init__(self, denoiser, **given):
        self.denoiser, self.given = denoiser, given
        self.vocab_size, self.kind = denoiser.vocab_size, denoiser.kind
        self.time_free = denoiser.time_free

    def __call__(self, tokens, t):
        batch = tokens.shape[:-1]
        label = self.given["label"].expand(batch)
        tilt = self.given["tilt"].expand(*batch, SIZE)
        return self.denoiser(tokens, t, label=label, tilt=tilt)


def guided(level):
    def make(process, denoiser):
        flat = Temperature(denoiser, 2.0)
        return ClassifierFreeKernel(process, denoiser, flat, weight=2.0, level=level, num_steps=3)

    return make


def classified(process, denoiser):
    kernel = InterpolatingKernel(process, denoiser, num_steps=2)
    return ClassifierKernel(kernel, lambda z, t: -(z == 0).sum(-1).double())


MASKED = {
    "events": lambda p, d: InterpolatingKernel(p, d, num_steps=3),
    "steps": lambda p, d: InterpolatingKernel(p, d, num_steps=3, kappa=0.8),
    "ordered": lambda p, d: OrderedKernel(p, d, length=LENGTH),
    "confidence": lambda p, d: ConfidenceKernel(p, d, num_steps=3),
    "extrapolated": lambda p, d: ExtrapolatedKernel(p, d, num_steps=3),
    "guided prediction": guided("denoiser"),
    "guided step": guided("kernel"),
    "classifier": classified,
    "filtered": lambda p, d: InterpolatingKernel(p, Nucleus(d, 0.9), num_steps=3),
    "counted": lambda p, d: InterpolatingKernel(p, CountingDenoiser(d), num_steps=3),
    "cached": lambda p, d: InterpolatingKernel(p, EvaluatedDenoiser(d), num_steps=3),
}
UNIFORM = {name: MASKED[name] for name in ("events", "guided step", "classifier", "cached")}
CASES = [(Absorbing, name) for name in MASKED] + [(Uniform, name) for name in UNIFORM]


def make_given(*batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, batch, generator=generator)
    return {"label": label, "tilt": 2 * torch.randn(*batch, SIZE, generator=generator).double()}


def row(given, i):
    return {name: value[i] for name, value in given.items()}


class TestContract(KernelContract):
    def make_kernel(self):
        return InterpolatingKernel(Uniform(SIZE), Conditional(Uniform(SIZE)), num_steps=2)

    def make_given(self):
        return row(make_given(1), 0)


@pytest.mark.parametrize(("process", "name"), CASES)
@pytest.mark.parametrize("denoiser", [Conditional, Sparse])
def test_each_row_has_the_law_of_its_own_condition(process, name, denoiser):
    """The batch scores as the chains around a denoiser with the condition filled in, row by row,
    and what was remembered while sampling is that score."""
    process = process(SIZE)
    asked, given = denoiser(process), make_given(6)
    chain = ReverseChain(MASKED[name](process, asked), LENGTH, given=given)
    assert chain.batch_shape == (6,)
    path = chain.sample((4,), generator=torch.Generator().manual_seed(1))
    found = chain.log_prob(path.clone())
    torch.testing.assert_close(chain.log_prob(path), found, rtol=1e-9, atol=1e-9)
    for i in range(6):
        alone = MASKED[name](process, Specialised(Conditional(process), **row(given, i)))
        expected = ReverseChain(alone, LENGTH).log_prob(path[:, i])
        torch.testing.assert_close(found[:, i], expected, rtol=1e-9, atol=1e-9)
    swapped = {"label": 1 - given["label"], "tilt": -given["tilt"]}
    other = ReverseChain(chain.kernel, LENGTH, given=swapped)
    assert not bool(torch.isclose(other.log_prob(path), found).all())


@pytest.mark.parametrize("process", [Absorbing, Uniform])
def test_samples_follow_the_condition(process):
    """Frequencies of x0 per row against enumeration: 2 rows of 20000 draws, each of 9 cells within
    5 standard errors (false-alarm rate below 2e-5)."""
    process, given = process(SIZE), make_given(2, seed=3)
    kernel = InterpolatingKernel(process, Conditional(process), num_steps=3)
    chain = ReverseChain(kernel, LENGTH, given=given)
    x0 = chain.x0(chain.sample((20000,), generator=torch.Generator().manual_seed(5)))
    for i in range(2):
        exact = ExactChain.of(ReverseChain(kernel, LENGTH, given=row(given, i)))
        law = exact.x0_law().flatten()
        seen = torch.bincount(x0[:, i, 0] * SIZE + x0[:, i, 1], minlength=SIZE**2) / 20000
        assert bool(((seen - law).abs() < 5 * (law * (1 - law) / 20000).sqrt() + 1e-12).all())


def chain_of(process=None, **options):
    process = process or Absorbing(SIZE)
    kernel = InterpolatingKernel(process, Conditional(process), num_steps=3, **options)
    return kernel, make_given(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": torch.zeros(4)}, r"given has 'colour', which Conditional does not read"),
        ({"tilt": None}, r"Conditional reads the condition 'tilt', which is missing"),
        ({"tilt": torch.tensor(1.0)}, r"'tilt' has 1 event dimensions .* got shape \(\)"),
        ({"tilt": torch.zeros(5, SIZE)}, r"batch shapes .* do not broadcast"),
    ],
)
def test_wrong_conditions_are_refused(change, message):
    kernel, given = chain_of()
    given = {name: x for name, x in {**given, **change}.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        ReverseChain(kernel, LENGTH, given=given)


def test_a_chain_without_conditions_takes_none():
    process = Absorbing(SIZE)
    table = TableDenoiser(random_joint(SIZE, LENGTH), process)
    kernel = InterpolatingKernel(process, table, num_steps=2)
    assert ReverseChain(kernel, LENGTH).given == {}
    with pytest.raises(ValueError, match="it reads no conditions"):
        ReverseChain(kernel, LENGTH, given={"label": torch.tensor(1)})
    assert kernel.init_carry((2,), LENGTH).keys() == {"tokens"}


def test_conditions_are_expanded_and_broadcast():
    kernel, given = chain_of()
    one = ReverseChain(kernel, LENGTH, given={"label": 1, "tilt": given["tilt"][0]})
    assert one.batch_shape == ()
    many = one.expand((5, 2))
    assert many.given["tilt"].shape == (5, 2, SIZE)
    prompt = torch.tensor([[-1, 0], [1, -1], [-1, -1]])[:, None]
    both = ReverseChain(kernel, LENGTH, prompt=prompt, given=given)
    assert both.batch_shape == (3, 4)
    carry = both.start((7, 3, 4), torch.Generator().manual_seed(0))
    assert carry["given"]["label"].shape == (7, 3, 4)
    assert bool((carry["tokens"][:, 0, :, 1] == 0).all())
    shapes = ReverseChain.infer_shapes(kernel, LENGTH, prompt, given=given)
    assert shapes == (both.batch_shape, both.event_shape)
    path = one.sample()
    torch.testing.assert_close(many.log_prob(path.clone()), one.log_prob(path).expand(5, 2))


def test_a_remembered_score_belongs_to_its_condition():
    """Not to another one, and not to the same tensor edited since."""
    kernel, given = chain_of()
    chain = ReverseChain(kernel, LENGTH, given=given)
    path = chain.sample()
    other = ReverseChain(kernel, LENGTH, given={**given, "label": 1 - given["label"]})
    torch.testing.assert_close(other.log_prob(path), other.log_prob(path.clone()), rtol=0, atol=0)
    assert not torch.allclose(other.log_prob(path), chain.log_prob(path))
    before = chain.log_prob(path)
    chain.given["tilt"].add_(torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(chain.log_prob(path), chain.log_prob(path.clone()), rtol=0, atol=0)
    assert not torch.allclose(chain.log_prob(path), before)


@pytest.mark.parametrize("process", [Absorbing, Uniform])
def test_marginals_are_conditional(process):
    """Bound and estimate draw the same numbers as around the specialised denoiser."""
    process = process(SIZE)
    kernel, given = chain_of(process)
    x0 = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]])
    chain = ReverseChain(kernel, LENGTH, given=row(given, 0))
    alone = kernel.with_denoiser(Specialised(kernel.denoiser, **row(given, 0)))
    asked = [law.marginal() for law in (chain, ReverseChain(alone, LENGTH))]
    here, there = (law.log_prob(x0) for law in asked)
    torch.testing.assert_close(here, there)
    for name in ("log_prob_bound", "log_prob_estimate"):
        here, there = (
            getattr(m, name)(x0, generator=torch.Generator().manual_seed(2)) for m in asked
        )
        torch.testing.assert_close(here, there)
    many = ReverseChain(kernel, LENGTH, given=given).marginal()
    assert many.log_prob_bound(x0[0]).shape == (4,)
    with pytest.raises(IntractableLogProb, match=r"one value of '(label|tilt)'"):
        many.log_prob(x0)


def test_unrolled_steps_read_the_condition():
    kernel, given = chain_of(Uniform(SIZE))
    chain = ReverseChain(kernel, LENGTH, given=given)
    path = chain.sample()

    def program():
        with pyro.plate("rows", 4):
            pyro.sample("x", chain, obs=path.clone())

    trace = pyro.poutine.trace(handlers.unroll(program)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(path.clone()).sum())


def test_equal_states_with_other_conditions_are_other_rows():
    """Deduplication and reuse see tokens and conditions, bit by bit, never tokens alone."""
    counter = CountingDenoiser(Conditional(Absorbing(SIZE)))
    cached = EvaluatedDenoiser(counter)
    tokens, given = torch.full((6, LENGTH), SIZE), make_given(6)
    given["label"], given["tilt"] = (
        torch.tensor([0, 1, 0, 1, 0, 0]),
        given["tilt"][[0, 0, 0, 1, 0, 2]],
    )
    with torch.no_grad():
        found = cached(tokens, 0.5, **given)
        assert counter.rows == 4  # rows 0, 2 and 4 agree
        torch.testing.assert_close(found, counter.denoiser(tokens, 0.5, **given), rtol=0, atol=0)
        assert torch.equal(cached(tokens, 0.5, **given), found)
        swapped = {**given, "label": 1 - given["label"]}
        again = cached(tokens, 0.5, **swapped)  # the same tokens object
        assert torch.equal(again, counter.denoiser(tokens, 0.5, **swapped))
        last = cached(tokens, 0.5, **given)
        given["tilt"].mul_(-1)
        moved = cached(tokens, 0.5, **given)
    assert torch.equal(last, found)
    assert torch.equal(moved, counter.denoiser(tokens, 0.5, **given))
    assert not torch.allclose(moved, last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bool])
def test_any_type_of_condition_is_a_key(dtype):
    class Echo:
        vocab_size, kind, time_free, conditions = SIZE, "cavity", True, {"x": 1}
        rows = 0

        def __call__(self, tokens, t, *, x):
            self.rows += len(tokens)
            return torch.log_softmax(x.double(), -1)[..., None, :].expand(*tokens.shape, SIZE)

    x = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0]]).to(dtype)
    echo, tokens = Echo(), torch.zeros(3, LENGTH, dtype=torch.int64)
    cached = EvaluatedDenoiser(echo)
    torch.testing.assert_close(cached(tokens, 0.5, x=x), Echo()(tokens, 0.5, x=x))
    assert echo.rows == 2


def test_smc_on_a_batch_of_conditions_is_exact():
    """Plates with conditions of their own: E[Z_hat] = prod Z_i, 4 standard errors (6e-5)."""
    process, given = Absorbing(SIZE), make_given(2, seed=7)
    kernel, potential = (
        InterpolatingKernel(process, Conditional(process), num_steps=3),
        toy_potential(),
    )
    z = 1.0
    for i in range(2):
        exact = ExactChain.of(ReverseChain(kernel, LENGTH, given=row(given, i)))
        z *= float(exact.evidence(potential))
    chain = ReverseChain(kernel, LENGTH, given=given)
    fk = FeynmanKac(chain, potential, twist=None)
    post = run_smc(fk, 4, 4000, ess_threshold=2.0, generator=torch.Generator().manual_seed(8))
    values = post.log_evidence.exp()
    error = float(values.std() / len(values) ** 0.5)
    assert abs(float(values.mean()) - z) < 4 * error


def test_the_condition_is_gathered_with_its_particle():
    given = {"label": torch.arange(8).reshape(2, 4)}
    ancestors = torch.tensor([[0, 0, 3, 1], [2, 2, 2, 2]])
    gathered = take_particles({"given": given, "other": 3}, ancestors)
    expected = torch.tensor([[0, 0, 3, 1], [6, 6, 6, 6]])
    assert torch.equal(gathered["given"]["label"], expected)
    assert gathered["other"] == 3


def network():
    config = TransformerConfig(SIZE, SIZE + 1, 4, dim=8, depth=1, heads=2, num_classes=2)
    torch.manual_seed(0)
    made = Transformer(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_a_label_per_row():
    """``Labelled(network, "given")`` is ``Labelled(network, y)`` row by row, guided ones too, and
    guidance still costs one call of the network."""
    base, tokens = network(), torch.tensor([[0, 3, 1], [3, 3, 3], [0, 3, 1]])
    label = torch.tensor([0, 1, 1])
    open_one = Labelled(base, "given")
    assert open_one.conditions == {"label": 0}
    pairs = [(open_one, lambda y: Labelled(base, y))]
    null = Labelled(base, None)
    both = Guided(Nucleus(open_one, 0.95), null, 2.0)
    assert both.conditions == {"label": 0}
    pairs.append((both, lambda y: Guided(Nucleus(Labelled(base, y), 0.95), null, 2.0)))
    for many, one in pairs:
        found = many(tokens, 0.5, label=label)
        for i, y in enumerate(label.tolist()):
            torch.testing.assert_close(found[i], one(y)(tokens[i], 0.5), rtol=1e-5, atol=1e-5)
    assert both._shared_network is base
    assert "given" in repr(open_one)
