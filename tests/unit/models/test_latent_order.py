"""A prior with a learned order of its tokens: where it is followed, kept and refused."""

import itertools

import pytest
import torch

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import Path, RevealOrder
from ppl_diffusion.models import LatentDiffusion, latent_order, load
from ppl_diffusion.models.latent_order import ORDER_FILE
from ppl_diffusion.smc import factorised
from ppl_diffusion.testing import ModelContract
from ppl_diffusion.testing.dense import all_states

SHAPE = {"dim": 8, "depth": 1, "heads": 2, "encoder_depth": 1}
CODES = {"num_slots": 2, "num_codes": 3}
ROWS = [[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 0, 2]]


@pytest.fixture(name="prior")
def _prior():
    torch.manual_seed(0)
    built = LatentDiffusion.build("abc", 4, **CODES, **SHAPE)
    return built.eval()


def learned(prior, **options):
    settings = {"steps": 3, "batch_size": 8, "generator": torch.Generator().manual_seed(0)}
    return prior.learn_order(torch.tensor(ROWS), **{**settings, **options})


class TestOrder(ModelContract):
    def make_model(self):
        built = LatentDiffusion.build("abc", 2, **CODES, **SHAPE).eval()
        return built.learn_order(all_states(3, 2), latent_steps=1, steps=20, batch_size=16)

    def least(self, model, rows):
        """Sum over all paths: tokens are revealed at either of two steps, codes at the first."""
        token = [[3] * k + [v] * (4 - k) for k, v in itertools.product((2, 3), range(3))]
        code = [[3, v, v, v] for v in range(3)]
        paths = torch.tensor(list(itertools.product(token, token, code, code))).mT
        chain = model.chain(self.steps)
        assert chain.kernel.order is model.order
        probs, ends = chain.log_prob(paths).exp(), chain.x0(paths)
        assert float(probs.sum()) == pytest.approx(1, abs=1e-6)
        return -torch.stack([probs[(ends == row).all(-1)].sum() for row in rows]).log()


def test_every_step_of_tokens_is_learned_as_often(prior, monkeypatch):
    """The bound is the mean over steps drawn alike: learning at one of them is another target."""
    drawn, plain = [], latent_order.estimated_cost

    def recorded(*arguments):
        drawn.append(arguments[5])
        return plain(*arguments)

    monkeypatch.setattr(latent_order, "estimated_cost", recorded)
    learned(prior, token_steps=4)
    counts = torch.stack([torch.bincount(t, minlength=5) for t in drawn])
    assert counts.tolist() == [[0, 2, 2, 2, 2]] * 3


def test_likelihoods_of_positions_are_refused_with_an_order(prior):
    with pytest.raises(CapabilityError, match="learned order are drawn from tables of states"):
        factorised(learned(prior).chain(), torch.zeros(4, 3))


def test_only_the_order_is_learned(prior):
    before = {name: value.clone() for name, value in prior.denoiser.state_dict().items()}
    found = learned(prior, token_steps=3)
    assert prior.order is None
    assert found.path == Path.sequential(2, 3)
    assert found.order.table.shape == (2, 3, 2, 4)
    assert not found.order.table.requires_grad
    assert found.denoiser is prior.denoiser
    assert all(p.grad is None for p in prior.denoiser.parameters())
    assert all(torch.equal(before[n], v) for n, v in prior.denoiser.state_dict().items())
    assert torch.equal(found.order.table, learned(prior, token_steps=3).order.table)


def test_the_default_path_alone_has_the_order(prior):
    found = learned(prior)
    x0 = torch.tensor(ROWS)
    assert found.chain().kernel.order is found.order
    assert found.chain(latent_steps=2, token_steps=2).kernel.order is found.order
    other = Path.sequential(1, 2)
    assert found.chain(other).kernel.order is None
    seeded = [torch.Generator().manual_seed(0) for _ in range(4)]
    ours, theirs = (
        found.bound(x0, other, generator=seeded[0]),
        prior.bound(x0, other, generator=seeded[1]),
    )
    assert torch.equal(ours.loss, theirs.loss)
    ours, theirs = (
        found.bound(x0, generator=seeded[2]),
        prior.bound(x0, found.path, generator=seeded[3]),
    )
    assert not torch.equal(ours.loss, theirs.loss)
    with pytest.raises(CapabilityError, match="which only chain\\(\\) follows; give num_steps"):
        found.token_chain(latent=found.encode_latent(x0))
    found.token_chain(2, latent=found.encode_latent(x0))


def test_orders_are_kept(prior, tmp_path):
    found = learned(prior)
    found.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.order.table, found.order.table)
    assert not again.order.table.requires_grad
    path = found.chain().sample((20,))
    assert torch.equal(again.chain().log_prob(path), found.chain().log_prob(path))
    (tmp_path / ORDER_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="which holds its order"):
        load(tmp_path)
    prior.save(tmp_path / "plain")
    assert not (tmp_path / "plain" / ORDER_FILE).exists()
    assert "order" not in prior.settings()


def test_what_cannot_be_learned_is_refused(prior):
    with pytest.raises(ValueError, match="one step draws all tokens at once"):
        learned(prior, token_steps=1)
    with pytest.raises(ValueError, match="learn_order: steps"):
        learned(prior, steps=0)
    with pytest.raises(ValueError, match="there are no sequences"):
        prior.learn_order(torch.zeros(0, 4, dtype=torch.int64))
    vectors = LatentDiffusion.build("abc", 4, num_slots=2, latent_dim=3, **SHAPE)
    with pytest.raises(CapabilityError, match="this latent holds vectors; use a prior with codes"):
        learned(vectors)


def test_an_order_for_another_prior_is_refused(prior):
    told = {"vocabulary": "abc", "length": 4, "path": Path.sequential(2, 2)}
    with pytest.raises(ValueError, match="of 5 tokens, not 4"):
        LatentDiffusion(prior.denoiser, order=RevealOrder(torch.zeros(2, 3, 1, 5)), **told)
    with pytest.raises(ValueError, match="but latent and path have 2, 3 and 2"):
        LatentDiffusion(prior.denoiser, order=RevealOrder(torch.zeros(2, 3, 2, 4)), **told)
    found = learned(prior)
    found.path = Path.sequential(2, 3)
    with pytest.raises(ValueError, match="but latent and path have 2, 3 and 3"):
        found.bound(torch.tensor(ROWS))
