"""Quantised expectation: options, batches, codes, cost, and what is refused."""

import pytest
import torch

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import QuantisedExpectation
from ppl_diffusion.inference.mean_field import jacobian_of
from ppl_diffusion.inference.quantisers import FLOOR, nearest_code, quantised
from ppl_diffusion.potentials import EmbeddedPotential, GaussianMeasurement
from ppl_diffusion.testing import DeviceDiscipline
from ppl_diffusion.testing.anchored_toys import CODES, averages, measured_toy

TOY = measured_toy()
TOKENS = torch.tensor([[4, 4, 4, 4], [0, 4, 4, 1], [3, 2, 1, 0]])
LOG_D = TOY.denoiser(TOKENS, torch.tensor(1.0))
REWARD = EmbeddedPotential(lambda e: e[..., 0].sum(-1), CODES, name="reward")


def found(potential=TOY.potential, tokens=TOKENS, log_d=LOG_D, generator=None, **options):
    return QuantisedExpectation(**options)(potential, tokens, log_d, generator=generator)


def test_what_is_visible_stays():
    result = found()
    seen = TOKENS < 4
    assert torch.equal(result.anchors[seen], TOKENS[seen])
    point = torch.nn.functional.one_hot(TOKENS[seen], 4).double()
    assert torch.equal(result.log_r.exp()[seen], point)
    assert torch.equal(result.log_average.exp()[seen], point)
    total = result.log_r.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert bool((result.anchors < 4).all())


def test_the_loss_is_that_of_the_anchors():
    result = found()
    torch.testing.assert_close(result.loss, -TOY.potential(result.anchors))
    worst = found(num_iterations=0)
    assert bool((result.loss <= worst.loss).all())


def test_the_cost_is_counted():
    """A row with nothing to find is decoded once, the others once per iterate."""
    before = TOY.potential.num_embedded
    result = found(num_iterations=7)
    assert result.num_losses == 2 * 8 + 1
    assert TOY.potential.num_embedded - before == result.num_losses
    assert found(tokens=TOKENS[2:], log_d=LOG_D[2:]).num_losses == 1


def test_a_row_that_is_explained_stops():
    result = found(stop_at=2.0, num_iterations=50, keep="last")
    residual = TOY.potential.residual(CODES[result.anchors]).square().sum(-1) / (4 * 0.25)
    first = found(tokens=TOKENS[:1], log_d=LOG_D[:1], stop_at=2.0, num_iterations=50, keep="last")
    assert float(residual[0]) <= 2.0
    assert first.num_losses < 51
    assert torch.equal(first.anchors[0], result.anchors[0])  # what the others did changed nothing


def test_a_warm_start_mixes_logits():
    """``f log d + (1 - f) Phi``, and without an iteration that is all there is."""
    previous = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    loop = QuantisedExpectation(num_iterations=0, warm_start=0.3)
    mixed = loop(TOY.potential, TOKENS, LOG_D, previous=previous).log_r[0]
    expected = (0.3 * LOG_D[0] + 0.7 * previous[0].log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(mixed, expected)
    anew = QuantisedExpectation(num_iterations=0)(TOY.potential, TOKENS, LOG_D, previous=previous)
    torch.testing.assert_close(anew.log_r[0], LOG_D[0])
    again = loop(TOY.potential, TOKENS, LOG_D, previous=anew.logits)
    torch.testing.assert_close(again.log_r[0], LOG_D[0])


@pytest.mark.parametrize(("log_mass", "anchor"), [(-15.0, 1), (-torch.inf, 0)])
def test_tokens_of_tiny_prior_mass_are_found(log_mass, anchor):
    """Adam's steps have one size for all gradients above its epsilon: an impossible token is lost.

    By plain gradient steps the first would be lost, too: they shrink with its mass.
    """
    log_d = torch.tensor([[[0.0, log_mass]]], dtype=torch.float64)
    codes = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    one = GaussianMeasurement(lambda e: e[..., 0], torch.ones(1).double(), 0.1, codes)
    result = QuantisedExpectation(num_iterations=100)(one, torch.tensor([[2]]), log_d)
    assert result.anchors.tolist() == [[anchor]]
    start = QuantisedExpectation(num_iterations=0)(one, torch.tensor([[2]]), log_d)
    assert float(start.logits.amin()) == pytest.approx(max(log_mass, FLOOR))


def test_the_prior_in_the_loss_holds_the_table_back():
    free, held = found(quantiser="soft"), found(quantiser="soft", kl_weight=50.0)

    def divergence(result):
        log_r = result.log_r[0]
        return float((log_r.exp() * (log_r - LOG_D[0])).sum())

    assert divergence(held) < divergence(free) / 10


def test_the_prior_in_the_loss_is_the_prediction():
    """Where data say nothing, no other table has a lower loss than the prediction itself."""
    flat = EmbeddedPotential(lambda e: 0 * e.sum((-1, -2)), TOY.potential.codebook)
    result = found(flat, quantiser="soft", kl_weight=1.0)
    assert float((LOG_D[0] - LOG_D[0].exp().mean(-1, keepdim=True).log()).abs().max()) > 0.5
    torch.testing.assert_close(result.log_r[0], LOG_D[0].double(), rtol=0, atol=0.1)


def test_noise_comes_from_the_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return found(quantiser="gumbel", num_iterations=3, generator=generator).log_r

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_any_potential_of_embeddings_will_do():
    result = found(REWARD, num_iterations=50)
    assert bool((CODES[result.anchors[0]][:, 0] == 1).all())
    torch.testing.assert_close(result.loss, -REWARD(result.anchors))


def test_networks_behind_the_potential_are_left_alone():
    network = torch.nn.Linear(8, 1).double()
    learned = EmbeddedPotential(lambda e: network(e.flatten(-2))[..., 0], CODES)
    found(learned, num_iterations=3)
    assert network.weight.grad is None
    assert not found(learned, num_iterations=3).loss.requires_grad


def test_half_precision_codes_are_computed_with_in_single():
    half = EmbeddedPotential(lambda e: e[..., 0].sum(-1), CODES.half())
    assert found(half, num_iterations=3).logits.isfinite().all()


@pytest.mark.parametrize("quantiser", ["straight-through", "gumbel"])
def test_hard_quantisers_ask_about_codes(quantiser):
    points, ids = quantised(torch.randn(9, 4).double(), CODES, quantiser)
    torch.testing.assert_close(points, CODES[ids])


def test_soft_quantisers_ask_about_means_and_what_lies_between():
    phi = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    mean, ids = quantised(phi, CODES, "soft")
    torch.testing.assert_close(mean, phi.softmax(-1) @ CODES)
    between, again = quantised(phi, CODES, "entropy-mix")
    assert torch.equal(ids, again)
    r = phi.softmax(-1)
    share = -(r * r.log()).sum(-1, keepdim=True) / torch.tensor(4.0).log()
    torch.testing.assert_close(between, mean + share * (CODES[ids] - mean))


def test_binary_codes_are_read_bit_by_bit():
    """As the nearest of all codes wherever there is one; a zero bit is -1."""
    bits = torch.arange(32)[:, None] // 2 ** torch.arange(4, -1, -1) % 2
    codes = 2.0 * bits - 1
    points = torch.randn(200, 5, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    assert torch.equal(nearest_code(codes)(points), order[nearest_code(codes[order])(points)])
    assert nearest_code(codes)(torch.zeros(5)).tolist() == 0
    assert nearest_code(codes)(torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0])).tolist() == 8


def test_ties_go_to_the_lowest_id():
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert nearest_code(codes)(torch.zeros(3, 2)).tolist() == [0, 0, 0]
    assert nearest_code(codes)(torch.tensor([-0.5, 0.5])).tolist() == 1


@pytest.mark.parametrize("num_data", [3, 40])
def test_jacobians_forwards_and_backwards(num_data):
    weight = torch.randn(num_data, 8, generator=torch.Generator().manual_seed(1)).double()

    def curved(e):
        return torch.tanh(e.flatten(-2) @ weight.T)

    potential = GaussianMeasurement(curved, torch.zeros(num_data).double(), 1.0, CODES)
    points = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(2)).double()
    found, cost = jacobian_of(potential, points)
    assert cost == 2 * min(num_data, 8)
    for row, own in zip(points, found, strict=True):
        expected = torch.autograd.functional.jacobian(curved, row)
        torch.testing.assert_close(own, expected)


def test_tensors_live_where_the_potential_does():
    with DeviceDiscipline():
        for options in ({}, {"quantiser": "gumbel"}, {"inner": "cavi"}, {"stop_at": 1.0}):
            found(num_iterations=2, kl_weight=1.0, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_iterations": -1}, "num_iterations must be finite and between 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"kl_weight": -1.0}, "kl_weight must be finite and between 0"),
        ({"warm_start": 1.5}, "warm_start must be finite and between 0 and 1"),
        ({"quantiser": "hard"}, "quantiser must be one of straight-through, soft"),
        ({"keep": "all"}, "keep must be one of best, last"),
        ({"loss": "l2"}, "loss must be one of likelihood, l1"),
        ({"inner": "newton"}, "inner must be one of gradient, cavi, gauss-newton"),
    ],
)
def test_what_is_no_option_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        QuantisedExpectation(**options)


def test_what_a_potential_lacks_is_said():
    for options, text in (
        ({"loss": "l1"}, "loss='l1' reads residuals"),
        ({"stop_at": 1.0}, "stop_at reads residuals"),
        ({"inner": "cavi"}, "inner='cavi' reads residuals"),
    ):
        with pytest.raises(CapabilityError, match=f"{text}.*reward does not show"):
            found(REWARD, **options)
    curved = GaussianMeasurement(
        lambda e: torch.tanh(averages(e)), TOY.potential.y, 0.5, CODES, name="curved"
    )
    with pytest.raises(CapabilityError, match="curved is not said to be; use inner='gauss-newton'"):
        found(curved, inner="cavi")
    assert found(curved, inner="gauss-newton", num_iterations=2).loss.isfinite().all()
    with pytest.raises(CapabilityError, match="gradients go through a codebook"):
        found(lambda x: x)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"4 codes take tokens \(n, L\) and a prediction"):
        found(log_d=LOG_D[..., :3])
    with pytest.raises(ValueError, match="4 codes take tokens"):
        found(tokens=TOKENS[0], log_d=LOG_D[0])
