"""How codes are learnt: the library's indices, straight gradients, revival, temperatures."""

import math
import sys

import pytest
import torch

from ppl_diffusion.denoisers.quantiser import (
    GumbelQuantiser,
    VectorQuantiser,
    nearest,
    unit_codes,
)

N, K, D = 3, 6, 4


def codebook():
    return unit_codes(torch.randn(K, D))


def test_codes_are_those_of_the_library():
    quantiser = VectorQuantiser(codebook())
    for _ in range(5):
        quantiser(torch.randn(50, N, D), 0.0)
    vectors = torch.randn(50, N, D)
    quantiser.library.eval()
    unit, indices, _ = quantiser.library(vectors)
    assert torch.equal(nearest(vectors, quantiser.codebook), indices)
    torch.testing.assert_close(quantiser.codebook[indices], math.sqrt(D) * unit)


def test_vectors_pass_gradients_straight():
    """The gradient at the unit vector is that at its code, times ``sqrt(d)``."""
    quantiser = VectorQuantiser(codebook(), commitment=0.0)
    vectors = torch.randn(20, N, D, requires_grad=True)
    found = quantiser(vectors, 0.0)
    weight = torch.randn(20, N, D)
    (found.vectors * weight).sum().backward()
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    wanted = torch.autograd.grad((math.sqrt(D) * unit * weight).sum(), vectors)[0]
    torch.testing.assert_close(vectors.grad, wanted)


def test_commitment_pulls_vectors_to_their_codes():
    quantiser = VectorQuantiser(codebook(), commitment=0.5)
    vectors = torch.randn(20, N, D, requires_grad=True)
    found = quantiser(vectors, 0.0)
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    distance = (found.vectors.detach() / math.sqrt(D) - unit).square().mean()
    torch.testing.assert_close(found.loss, 0.5 * distance)


def far_from_all(quantiser):
    """Let all codes but one point away from the positive axes."""
    away = -torch.ones(K, D) + 0.01 * torch.randn(K, D)
    away[0] = torch.eye(D)[0]
    inner = quantiser.library._codebook
    for buffer in (inner.embed, inner.embed_avg):
        buffer.copy_(torch.nn.functional.normalize(away, dim=-1)[None])
    inner.cluster_size.fill_(1.0)
    inner.initted.fill_(True)


@pytest.mark.parametrize(("revival_share", "used"), [(0.3, D), (0.0, 1)])
def test_dead_codes_are_revived(revival_share, used):
    """Without revival one code takes all clusters, and the others stay where nothing is."""
    quantiser = VectorQuantiser(codebook(), revival_share=revival_share)
    far_from_all(quantiser)
    for _ in range(60):
        near = torch.eye(D)[torch.randint(D, (50, N))] + 0.05 * torch.randn(50, N, D)
        found = quantiser(near, 0.0)
    found_codes = len(found.codes.unique())
    assert found_codes == 1 if used == 1 else found_codes >= used


def test_learning_goes_on_from_its_state():
    one, other = VectorQuantiser(codebook()), VectorQuantiser(codebook())
    for _ in range(3):
        one(torch.randn(50, N, D), 0.0)
    other.load_state_dict(one.state_dict())
    vectors, state = torch.randn(50, N, D), torch.get_rng_state()
    first = one(vectors, 0.0)
    torch.set_rng_state(state)
    second = other(vectors, 0.0)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(one.codebook, other.codebook)


def test_drawn_codes_follow_the_softmax_and_pass_gradients():
    book = torch.nn.Parameter(codebook())
    quantiser = GumbelQuantiser(book)
    one = torch.randn(1, 1, D, requires_grad=True)
    found = quantiser(one.expand(20_000, 1, D), 0.0)
    assert torch.equal(found.vectors.detach(), book.detach()[found.codes])
    shares = found.codes.flatten().bincount(minlength=K) / 20_000
    law = (one @ book.T).softmax(-1).flatten().detach()
    # Six standard errors over six codes: false alarm 2e-8.
    assert torch.all((shares - law).abs() < 6 * (law * (1 - law) / 20_000).sqrt() + 1e-6)
    found.vectors.sum().backward()
    assert one.grad.abs().max() > 0
    assert book.grad.abs().max() > 0


def test_temperatures_fall_and_wrong_ones_are_refused():
    quantiser = GumbelQuantiser(codebook(), temperatures=(1.0, 0.01))
    taus = []
    original = torch.nn.functional.gumbel_softmax
    try:
        torch.nn.functional.gumbel_softmax = lambda x, tau, hard: (
            taus.append(tau),
            original(x, tau, hard),
        )[1]
        for progress in (0.0, 0.5, 1.0, 2.0):
            quantiser(torch.randn(2, N, D), progress)
    finally:
        torch.nn.functional.gumbel_softmax = original
    assert taus == pytest.approx([1.0, 0.1, 0.01, 0.01])
    with pytest.raises(ValueError, match="temperatures must fall"):
        GumbelQuantiser(codebook(), temperatures=(0.1, 1.0))


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ppl-diffusion\[latent\]'"):
        VectorQuantiser(codebook())
