"""Uniforms and categorical draws: exact inversion, no class without mass, no lattice."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_diffusion.processes import noise
from ppl_diffusion.processes.noise import (
    _threefry,
    draw_categorical,
    draw_normalised,
    jax_uniforms,
    uniforms,
)
from ppl_diffusion.testing import chi_square_p_value

LAST = 1 - 2.0**-53
SIZES = [1, 2, 5, 255, 1024, 1025, 5000]


@pytest.fixture
def _x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


def holey_rows(rows, size, seed=0):
    """Random log-probabilities, half of the classes without mass, never all."""
    rng = np.random.default_rng(seed)
    p = rng.gamma(0.3, size=(rows, size)) * (rng.uniform(size=(rows, size)) < 0.5)
    p[:, rng.integers(size)] += 0.1
    return p / p.sum(-1, keepdims=True)


def assert_inverts(p, u, drawn):
    """The draw's interval of the distribution function holds ``u``, and has mass."""
    rows = np.arange(len(p))
    cdf = np.cumsum(p, -1)
    above = cdf[rows, drawn]
    below = above - p[rows, drawn]
    assert (p[rows, drawn] > 0).all()
    assert (below - 1e-12 <= u).all()
    assert (u <= above + 1e-12).all()


@pytest.mark.parametrize(
    ("library", "size"), [*(("torch", size) for size in SIZES), ("jax", 5), ("jax", 1025)]
)
@pytest.mark.usefixtures("_x64")
def test_draws_invert_the_distribution_function(library, size):
    """At random points and at both ends; 1025 and more are searched in two levels."""
    p = holey_rows(60, size, seed=size)
    u = np.random.default_rng(1).uniform(size=60)
    u[:20], u[20:40] = 0.0, LAST
    wrap = torch.as_tensor if library == "torch" else jnp.asarray
    with np.errstate(divide="ignore"):
        drawn = np.asarray(draw_categorical(wrap(np.log(p)), wrap(u)))
        shifted = np.asarray(draw_categorical(wrap(np.log(p) + 3.0), wrap(u)))
    assert drawn.dtype == np.int64
    assert_inverts(p, u, drawn)
    assert_inverts(p, u, shifted)


def test_the_neighbouring_class_does_not_pass():
    """The power of ``assert_inverts``."""
    p, u = holey_rows(60, 50), np.random.default_rng(1).uniform(size=60)
    with np.errstate(divide="ignore"):
        drawn = draw_categorical(torch.tensor(np.log(p)), torch.tensor(u)).numpy()
    with pytest.raises(AssertionError):
        assert_inverts(p, u, np.minimum(drawn + 1, 49))


@pytest.mark.parametrize("shapes", [
    ((3, 1, 4), (3, 6, 4)), ((), (7,)), ((6,), ()), ((2, 1), (5, 1, 3)), ((0, 4), (0, 4)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [5, 2000])
def test_shapes_broadcast(shapes, size):
    batch, fan = shapes
    log_c = torch.randn(*batch, size, dtype=torch.float64)
    u = torch.rand(fan, dtype=torch.float64)
    shape = torch.broadcast_shapes(batch, fan)
    drawn = draw_categorical(log_c, u)
    expected = draw_categorical(log_c.expand(*shape, size).contiguous(), u.expand(shape))
    assert drawn.shape == shape
    assert torch.equal(drawn, expected)


def test_chunks_do_not_matter(monkeypatch):
    log_c, u = torch.randn(37, 1500), torch.rand(37, dtype=torch.float64)
    whole = draw_categorical(log_c, u)
    monkeypatch.setattr(noise, "CHUNK", 4000)
    assert torch.equal(draw_categorical(log_c, u), whole)


def test_draws_keep_no_graph():
    log_c = torch.randn(4, 3000, requires_grad=True)
    assert not draw_categorical(log_c, torch.rand(4)).requires_grad


def test_rows_without_mass_stay_in_range():
    """No law, no promise; but an index that exists."""
    for size in (4, 3000):
        drawn = draw_categorical(torch.full((2, size), -torch.inf), torch.rand(2))
        assert bool((drawn < size).all())


def test_draws_follow_a_large_vocabulary():
    """Chi-square over 2000 classes, two levels, level 1e-4."""
    p = torch.tensor(np.arange(1, 2001.0) ** -0.7)
    p /= p.sum()
    generator = torch.Generator().manual_seed(0)
    drawn = draw_categorical(p.log(), uniforms((400_000,), generator=generator))
    assert chi_square_p_value(torch.bincount(drawn, minlength=2000), p) > 1e-4


def one_in_front(rare=200, mass=1e-9):
    """One class with nearly everything, then ``rare`` classes of ``mass`` each."""
    return np.log(np.append(1 - rare * mass, np.full(rare, mass)))


def test_float32_jax_finds_rare_classes():
    """Two hundred classes of 1e-9 behind one that has the rest: each gets its share of points."""
    log_c = one_in_front()
    u = (np.arange(2000) + 0.5) * 1e-10
    drawn = np.asarray(draw_categorical(jnp.asarray(log_c), jnp.asarray(u)))
    assert drawn.dtype == np.int32
    counts = np.bincount(drawn, minlength=201)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 10).max() <= 1
    rest = draw_categorical(jnp.asarray(log_c), jnp.asarray([2.1e-7, 0.5, 1 - 2.0**-24]))
    assert np.asarray(rest).tolist() == [0, 0, 0]


def test_float32_in_given_order_loses_them():
    """The power of the test above: no float32 uniform reaches a rare class behind a large one."""
    p = np.exp(one_in_front()).astype(np.float32)
    cdf = np.cumsum(p, dtype=np.float32)
    ends = np.float32([1 - 2.0**-24, 1 - 2.0**-23])
    assert (np.searchsorted(cdf, ends * cdf[-1], side="right") == 0).all()


def test_torch_uniforms_are_float64():
    first, second = (uniforms((2, 9), generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert first.dtype == torch.float64
    assert first.shape == (2, 9)
    assert torch.equal(first, second)


def on_lattice(u, spacing):
    """Return which share of the numbers below 2^-8 are multiples of ``spacing``."""
    small = np.asarray(u, dtype=np.float64)
    small = small[small < 2.0**-8] / spacing
    assert len(small) > 1000
    return float(np.mean(small == np.floor(small)))


def draws_of(name, n=2**19):
    key = jax.random.key(3)
    return {
        "torch": lambda: uniforms((n,), generator=torch.Generator().manual_seed(3)).numpy(),
        "torch float32": lambda: torch.rand(n, generator=torch.Generator().manual_seed(3)).numpy(),
        "jax": lambda: jax_uniforms(key, (n,)),
        "jax.random": lambda: jax.random.uniform(key, (n,)),
    }[name]()


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_no_lattice_near_zero(name):
    """The probe at the size of CI: about 2048 numbers below 2^-8.

    With 24 or more random bits after the first one, a number ``u < 2^-8`` is a multiple of
    ``2^-24`` with probability ``2^-8`` at most; 40 of 2048 has a false-alarm rate below 1e-12.
    """
    assert on_lattice(draws_of(name), 2.0**-24) < 40 / 2048


@pytest.mark.parametrize("name", ["torch float32", "jax.random"])
def test_lattice_probe_has_power(name):
    assert on_lattice(draws_of(name), 2.0**-24) == 1.0


@pytest.mark.slow
def test_smallest_exponential_of_jax():
    """Smallest of 2^27 draws below 2^-23, and not zero: false alarm e^-16 (a lattice: never)."""
    smallest = jax.jit(
        lambda key: jnp.min(jnp.where((u := jax_uniforms(key, (2**22,))) > 0, u, 1.0))
    )
    assert min(float(smallest(jax.random.key(i))) for i in range(32)) < 2.0**-23


BITS = [(0, 2**32 - 1), (1, 0), (1, 2**32 - 1), (2**24, 1), (2**31, 0), (2**31 - 1, 2**32 - 1),
        (2**32 - 1, 2**32 - 1), (123456789, 987654321), (5, 3_000_000_000)]  # fmt: skip


@pytest.mark.parametrize("digits", [24, 53])
def test_every_bit_counts(digits, monkeypatch):
    """The float is the 64-bit number cut to ``digits`` bits, and so never one."""
    words = jnp.asarray(np.array(BITS, dtype=np.uint32).T)
    monkeypatch.setattr(noise, "_threefry", lambda key, shape, streams: words)
    with jax.enable_x64(digits == 53):
        got = np.asarray(jax_uniforms(None, (len(BITS),)))
    for value, (high, low) in zip(got, BITS, strict=True):
        whole = (high << 32) | low
        # Without a set bit among the first 32 the second word is all there is.
        cut = max(0, whole.bit_length() - digits)
        assert float(value) == ((whole >> cut) << cut) / 2**64
        assert value < 1


@pytest.mark.parametrize("digits", [24, 53])
def test_jax_uniforms_are_uniform(digits):
    """Chi-square over the binades and over even cells, level 1e-4 each; compiled and not alike."""
    with jax.enable_x64(digits == 53):
        key = jax.random.key(7)
        u = np.asarray(jax_uniforms(key, (300_000,)))
        compiled = np.asarray(jax.jit(lambda k: jax_uniforms(k, (300_000,)))(key))
    assert u.dtype == (np.float32 if digits == 24 else np.float64)
    np.testing.assert_array_equal(u, compiled)
    cells = torch.bincount(torch.tensor(np.floor(u * 64)).long(), minlength=64)
    assert chi_square_p_value(cells, torch.full((64,), 1 / 64).double()) > 1e-4
    binade = torch.tensor(np.clip(-np.floor(np.log2(u)), 1, 12)).long() - 1
    law = torch.tensor([0.5**k for k in range(1, 12)] + [0.5**11], dtype=torch.float64)
    assert chi_square_p_value(torch.bincount(binade, minlength=12), law) > 1e-4


def test_streams_and_numbers_depend_on_nothing_beside_them():
    """On pain of another run for another number of particles, or of devices."""
    key = jax.random.key(7)
    many = np.asarray(jax_uniforms(key, (6, 5), jnp.arange(40)))
    assert many.shape == (40, 6, 5)
    assert len(np.unique(many)) == many.size
    np.testing.assert_array_equal(jax_uniforms(key, (2, 5), jnp.arange(3, 9)), many[3:9, :2])
    np.testing.assert_array_equal(jax_uniforms(key, (6, 5)), many[0])


def test_streams_are_not_the_keys_that_are_folded_off():
    """What a key's children are made of is never handed out as its numbers."""
    key = jax.random.key(7)
    drawn = np.asarray(_threefry(key, (50,), jnp.arange(50))).reshape(2, -1)
    children = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(50))
    words = {tuple(pair) for pair in np.asarray(jax.random.key_data(children)).tolist()}
    assert not words & {tuple(pair) for pair in drawn.T.tolist()}


def test_uniforms_may_be_float32():
    """A coarse source is the caller's business; the draw itself stays in float64."""
    log_c = torch.randn(50, 2000)
    u = torch.rand(50)
    assert torch.equal(draw_categorical(log_c, u), draw_categorical(log_c, u.double()))


@pytest.mark.parametrize("size", [5, 5000])
def test_one_pass_draws_and_adds_up(size):
    generator = torch.Generator().manual_seed(0)
    log_c = torch.log_softmax(4 * torch.randn(64, size, generator=generator), -1)
    u = uniforms((64,), generator=generator)
    drawn, total = draw_normalised(log_c, u)
    exact = log_c.double().exp()
    # In float32 an edge of the distribution function may move by a few rounding errors.
    after = exact.cumsum(-1).gather(-1, drawn[:, None])[:, 0]
    before = after - exact.gather(-1, drawn[:, None])[:, 0]
    assert bool(((before - 1e-6 < u * total) & (u * total < after + 1e-6)).all())
    torch.testing.assert_close(total, exact.sum(-1), rtol=0, atol=1e-6)
    assert float((total - 1).abs().max()) > 0
    if size == 5:
        assert torch.equal(drawn, draw_categorical(log_c, u))


def test_one_pass_shows_what_is_no_distribution():
    log_c = torch.full((3, 2000), -math.log(2000))
    log_c[1] -= 1.0
    log_c[2, 7] = math.nan
    total = draw_normalised(log_c, torch.full((3,), 0.5, dtype=torch.float64))[1]
    assert float(total[1]) == pytest.approx(math.exp(-1), rel=1e-5)
    assert float(total[0]) == pytest.approx(1, abs=1e-5)
    assert math.isnan(float(total[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_never_draws_the_impossible(dtype):
    log_c = torch.full((4, 2000), -math.inf, dtype=dtype)
    log_c[:, [300, 1500]] = math.log(0.5)
    u = torch.tensor([0.0, 0.5, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert draw_normalised(log_c, u)[0].tolist() == [300, 1500, 300, 1500]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_pairs_of_classes_draw_what_sorted_classes_do(size, monkeypatch):
    """In 32 bits the sums are the same up to round-off, and hardly ever is a uniform in between."""
    source = np.random.default_rng(0)
    logs = np.log(source.dirichlet(np.full(size, 0.2), 4000))
    logs[:, source.integers(size, size=size // 2)] = -np.inf
    logs[::3] = np.round(logs[::3])  # ties
    u = source.random(4000)
    u[:2] = 0.0, 1 - 2.0**-24
    with jax.enable_x64(False):
        log_c, points = jnp.asarray(logs, jnp.float32), jnp.asarray(u, jnp.float32)
        by_pairs = np.asarray(draw_categorical(log_c, points))
        monkeypatch.setattr(noise, "PAIRS", 0)
        by_order = np.asarray(draw_categorical(log_c, points))
    assert (by_pairs != by_order).mean() < 1e-3
    assert (np.take_along_axis(logs, by_pairs[:, None], -1) > -np.inf).all()


def test_pairs_of_classes_draw_rare_ones():
    """A class of probability 1e-12 is drawn by uniforms below it, and by no other."""
    log_c = jnp.log(jnp.asarray([1.0, 1e-12, 0.5], jnp.float32))
    with jax.enable_x64(False):
        u = jnp.asarray([0.0, 0.6e-12, 0.7e-12, 0.3, 0.34, 0.9], jnp.float32)
        assert draw_categorical(log_c, u).tolist() == [1, 1, 2, 2, 0, 0]
