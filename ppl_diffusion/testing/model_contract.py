"""What every model program must satisfy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from ppl_diffusion.models import load
from ppl_diffusion.models.cards import PROGRAM_FILE
from ppl_diffusion.models.program import FAMILIES, DiffusionProgram
from ppl_diffusion.testing.dense import all_states

STANDARD_ERRORS = 5.0
"""False-alarm rate of the bound's test: below 1e-3 for up to 100 sequences; seeds are fixed."""


class ModelContract:
    """Inherit, implement :meth:`make_model`, and pytest runs the contract on your family.

    The model must be tiny (``S ** length`` at most a few hundred) and have a network to train::

        class TestMyModel(ModelContract):
            def make_model(self):
                return MyDiffusion.build("abc", 2, dim=8, depth=1, heads=1)

    :cvar grid: steps of the coarser of the two chains whose exact likelihoods are compared with the
        bound; their difference is what the continuous-time limit may be away.
    :cvar steps: of the chains that are sampled.
    """

    grid: int = 16
    steps: int = 3

    def make_model(self) -> DiffusionProgram:
        """Return the model under test."""
        raise NotImplementedError

    def least(self, model: DiffusionProgram, rows: Tensor) -> Tensor:
        """Return what no bound may lie below, ``-log p(x0)`` of the law that it bounds, ``(n,)``.

        Here of the continuous-time limit; a model whose bound is that of one chain overrides it.

        :param rows: clean sequences, int64 ``(n, L)``.
        """
        coarse, fine = (-model.chain(k * self.grid).marginal().log_prob(rows) for k in (1, 2))
        # An error of order 1 / T halves with the grid, so what is left is about the difference.
        return fine - 2.0 * (fine - coarse).abs()

    @pytest.fixture(name="model")
    def _model(self) -> DiffusionProgram:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = self.make_model().eval()  # dropout is another law each time
            # A fresh network often predicts the same everywhere, where many mistakes cannot show.
            for parameter in _parameters(model):
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    def test_its_family_is_registered(self, model: DiffusionProgram) -> None:
        assert FAMILIES[model.family] is type(model)
        assert model.process.vocab_size == model.denoiser.vocab_size == len(model.vocabulary)

    def test_samples_are_clean_sequences(self, model: DiffusionProgram) -> None:
        chain = model.chain(self.steps)
        path = chain.sample((50,), generator=torch.Generator().manual_seed(1))
        tokens = chain.tokens(path)  # a path may pack more than tokens
        assert tokens.shape == (50, self.steps + 1, model.length)
        assert tokens.dtype == torch.int64
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < model.process.num_states
        assert int(chain.x0(path).min()) >= 0
        assert int(chain.x0(path).max()) < len(model.vocabulary)

    def test_the_program_returns_one_clean_sequence(self, model: DiffusionProgram) -> None:
        trace = pyro.poutine.trace(model).get_trace(self.steps)
        tokens = trace.nodes["_RETURN"]["value"]
        assert tokens.shape == (model.length,)
        assert torch.equal(model.encode(model.decode(tokens)), tokens)
        assert "path" in trace.nodes

    def test_encode_and_decode_invert_each_other(self, model: DiffusionProgram) -> None:
        ids = _clean(model)
        texts = model.decode(ids)
        assert len(set(texts)) == len(ids)
        assert torch.equal(model.encode(texts), ids)
        assert [model.decode(model.encode(text)) for text in texts] == texts

    def test_the_loss_is_finite_and_trains(self, model: DiffusionProgram) -> None:
        loss = model.loss(_clean(model), generator=torch.Generator().manual_seed(2))
        assert loss.shape == ()
        assert bool(loss.isfinite())
        loss.backward()
        reached = [p.grad for p in _parameters(model) if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in reached)
        assert any(bool(gradient.any()) for gradient in reached), "no parameter has a gradient"

    @torch.no_grad()
    def test_the_bound_lies_above_the_code_length(self, model: DiffusionProgram) -> None:
        rows, repeats = _clean(model), 50
        many = rows.repeat(repeats, 1)
        generator = torch.Generator().manual_seed(3)
        terms = model.bound_terms(many, num_times=40, generator=generator)
        assert terms.shape == (40, len(many))
        assert terms.dtype == torch.float64
        bounds = terms.mean(0).reshape(repeats, -1)
        error = bounds.std(0) / repeats**0.5
        assert bool((bounds.mean(0) + STANDARD_ERRORS * error >= self.least(model, rows)).all())

    def test_what_is_saved_comes_back(self, model: DiffusionProgram, tmp_path: Path) -> None:
        model.save(tmp_path)
        again = load(tmp_path)
        assert type(again) is type(model)
        assert again.settings() == model.settings()
        here, there = _state(model), _state(again)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
        assert not any(p.requires_grad for p in _parameters(again))
        # Whole numbers exactly; vectors are of float32, and memory decides the order of its sums.
        before, after = (_draw(m, self.steps) for m in (model, again))
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)

    def test_a_folder_of_an_unknown_family_says_so(
        self, model: DiffusionProgram, tmp_path: Path
    ) -> None:
        model.save(tmp_path)
        file = tmp_path / PROGRAM_FILE
        file.write_text(file.read_text().replace(f'"{model.family}"', '"nobody\'s"'))
        with pytest.raises(ValueError, match="import the module that defines it"):
            load(tmp_path)

    def test_moving_it_nowhere_changes_nothing(self, model: DiffusionProgram) -> None:
        before = _draw(model, self.steps)
        assert model.to(model.device) is model
        assert torch.allclose(_draw(model, self.steps), before, rtol=1e-5, atol=1e-5)


def _clean(model: DiffusionProgram) -> Tensor:
    return all_states(len(model.vocabulary), model.length)


def _draw(model: DiffusionProgram, steps: int) -> Tensor:
    return model.chain(steps).sample((20,), generator=torch.Generator().manual_seed(4))


def _parameters(model: DiffusionProgram) -> list[Tensor]:
    network: Any = model.denoiser
    return list(network.parameters())


def _state(model: DiffusionProgram) -> dict[str, Tensor]:
    network: Any = model.denoiser
    return dict(network.state_dict())
