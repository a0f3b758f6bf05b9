import math

import pytest
import torch

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC
from ppl_diffusion.models import MaskedDiffusion, UniformDiffusion, load
from ppl_diffusion.potentials import Potential

LAW = [0.0, 0.2, 0.3, 0.5]
SHAPE = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.5}


@pytest.fixture
def prior():
    torch.manual_seed(0)
    program = MaskedDiffusion.build("ab_", 3, name="short", lengths=LAW, **SHAPE)
    torch.nn.init.normal_(program.denoiser.vocabulary.weight, std=0.5)
    return program.eval()


def test_text_of_every_length_comes_back(prior):
    texts = ["a", "ab", "bba"]
    ids = prior.encode(texts)
    assert ids.tolist() == [[0, 2, 2], [0, 1, 2], [1, 1, 0]]
    assert prior.decode(ids) == texts
    assert prior.encode("ab").tolist() == [0, 1, 2]
    assert torch.equal(prior.encode("ab_"), prior.encode("ab"))
    assert prior.padding == "_"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abab", "short: a sequence has 1 to 3 letters, but 'abab' has 4; cut it, or train on such "
         "sequences."),
        ("", "short: a sequence has 1 to 3 letters, but '' has 0; cut it, or train on such "
         "sequences."),
        ("a_b", "short: '_' only fills sequences up behind their end, but stands at position 1 of "
         "3; leave it out."),
    ],
)  # fmt: skip
def test_texts_it_cannot_have_are_refused(prior, text, message):
    with pytest.raises(ValueError) as caught:
        prior.encode(text)
    assert str(caught.value) == message


def test_it_is_saved_and_loaded_with_its_law(prior, tmp_path):
    prior.save(tmp_path)
    again = load(tmp_path)
    assert again.process.lengths.tolist() == pytest.approx(LAW)
    x0 = prior.encode(["a", "bba"])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    pairs = zip((prior, again), generators, strict=True)
    bounds = [p.bound_terms(x0, generator=g) for p, g in pairs]
    assert torch.equal(*bounds)


def test_bound_and_loss_pay_for_the_length(prior, monkeypatch):
    x0 = prior.encode(["a", "bba"])
    terms = prior.bound_terms(x0, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(type(prior.process), "log_length", lambda *_: 0.0)
    free = prior.bound_terms(x0, generator=torch.Generator().manual_seed(0))
    paid = (terms - free).mean(0)
    torch.testing.assert_close(paid, -torch.tensor([0.2, 0.5], dtype=torch.float64).log())


def test_the_bound_of_one_letter_is_exact(prior):
    # One letter: every time asks the same question, and what is filled up costs nothing.
    x0 = prior.encode(["a", "b"])
    state = torch.tensor([3, 2, 2])
    wanted = -(prior.denoiser(state, 0.5)[0, :2].double() + math.log(0.2))
    terms = prior.bound_terms(x0, num_times=20_000, generator=torch.Generator().manual_seed(1))
    # Stratified; the plain error overstates it, so that 4 of them fail by chance less than 6e-5.
    assert ((terms.mean(0) - wanted).abs() < 4 * terms.std(0) / 20_000**0.5).all()


def test_the_gradient_is_finite(prior):
    prior.denoiser.requires_grad_(True)
    prior.train().loss(prior.encode(["a", "bba"])).backward()
    gradients = [p.grad for p in prior.denoiser.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_a_range_of_lengths_shares_the_network(prior):
    short = prior.between(1, 2)
    x0 = short.chain(4).x0(short.chain(4).sample((200,)))
    assert set((x0 != 2).sum(-1).tolist()) == {1, 2}
    assert short.denoiser is prior.denoiser
    assert prior.process.lengths.tolist() == pytest.approx(LAW)


def test_designs_of_several_lengths(prior):
    likes_a = Potential(lambda x0: (x0 == 0).sum(-1).double())
    posterior = SMC(prior.chain(3), likes_a, num_particles=200).run(seed=0)
    words = prior.decode(
        posterior.resample(50)["x"] if "x" in posterior.samples else posterior.x0[0]
    )
    assert all(1 <= len(word) <= 3 and "_" not in word for word in words)


def test_what_is_built_is_to_be_trained():
    program = MaskedDiffusion.build("ab_", 3, lengths=LAW, **SHAPE)
    assert program.denoiser.training
    x0 = program.encode(["aba"])
    torch.nn.init.normal_(program.denoiser.vocabulary.weight)
    generators = [torch.Generator().manual_seed(0) for _ in "abc"]
    losses = {float(program.loss(x0, generator=g).detach()) for g in generators}
    assert len(losses) == 3  # dropout is on
    assert not program.eval().denoiser.training


def test_one_length_has_no_range():
    with pytest.raises(CapabilityError) as caught:
        MaskedDiffusion.build("ab", 3, name="all alike", **SHAPE).between(1)
    assert str(caught.value) == (
        "all alike: all sequences have 3 tokens; train a prior on sequences of several lengths."
    )


def test_other_noise_and_other_laws_are_refused():
    with pytest.raises(CapabilityError, match="sequences of several lengths are masked"):
        UniformDiffusion.build("ab_", 3, lengths=LAW, **SHAPE)
    with pytest.raises(ValueError, match="the lengths 0 to 3, got 2 numbers"):
        MaskedDiffusion.build("ab_", 3, lengths=[0.5, 0.5], **SHAPE)
